"""uint8 pixels to the network's input; the same for training, evaluation and audit."""

import torch
from torch import Tensor

# ImageNet's channel mean and standard deviation, which the encoder's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 RGB N×H×W×3 on any device to N×3×H×W in channels_last memory, normalised per channel.

    Args:
        dtype: of the result; in bfloat16 the values are those of float32, rounded once.
    """
    assert images.dtype == torch.uint8
    count, height, width, channels = images.shape
    assert channels == 3
    # Rows of W·3 values, so that one vectorised pass does it: bfloat16 holds 0 to 255 exactly.
    mean = torch.tensor(MEAN, device=images.device)
    std = torch.tensor(STD, device=images.device)
    factor, offset = ((1 / (255 * std)).repeat(width), (-mean / std).repeat(width))
    rows = torch.addcmul(offset, images.reshape(count, height, width * channels).to(dtype), factor)
    # N×H×W×3 seen as N×3×H×W is channels_last already: no copy.
    return rows.to(dtype).reshape(images.shape).permute(0, 3, 1, 2)
