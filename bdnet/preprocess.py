"""uint8 pixels to the network's input; the same for training, evaluation and audit."""

import torch
from torch import Tensor

PREPROCESSING_VERSION = "1"
WORKING_SIZE = 640  # long side, pixels

# ImageNet's channel mean and standard deviation, which the encoder's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB N×H×W×3 on any device to float32 N×3×H×W in channels_last memory, normalised per channel."""
    assert images.dtype == torch.uint8
    assert images.shape[-1] == 3
    mean = torch.tensor(MEAN, device=images.device) * 255
    std = torch.tensor(STD, device=images.device) * 255
    # N×H×W×3 seen as N×3×H×W is channels_last already: no copy.
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)
