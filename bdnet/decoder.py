"""FCN-2s decoder: class scores at five strides, fused from coarse to fine.

Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; BDNet, 2020.
In place of FCN's fixed scale layers BDNet puts a batch normalisation in front of each skip's 1×1 score.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

CLASSES = 2  # sharp, blurred

TopHead = Literal["light", "full"]


def bilinear_upsampling(channels: int) -> nn.ConvTranspose2d:
    """Learned ×2 deconvolution, kernel 4, that starts as bilinear interpolation of each channel."""
    deconv = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1, bias=False)
    ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        deconv.weight.zero_()
        for channel in range(channels):
            deconv.weight[channel, channel] = ramp[:, None] * ramp[None, :]
    return deconv


def _score(channels: int) -> nn.Conv2d:
    """1×1 class scores, Xavier with gain √2 and bias 0.1."""
    conv = nn.Conv2d(channels, CLASSES, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(2))
    assert conv.bias is not None
    nn.init.constant_(conv.bias, 0.1)
    return conv


def _top(channels: int, head: TopHead, dropout: float) -> nn.Sequential:
    if head == "light":
        return nn.Sequential(nn.Dropout2d(dropout), nn.BatchNorm2d(channels), nn.ReLU(), _score(channels))
    middle = channels // 2
    # The paper pads this 3×3 by 3, as FCN's fc6 does, and crops later: the same values for more work.
    return nn.Sequential(
        nn.Conv2d(channels, middle, 3, padding=1),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        nn.Conv2d(middle, middle, 1),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        _score(middle),
    )


class FCN2sDecoder(nn.Module):
    """Five features, strides 2 to 32, to class scores at input size."""

    def __init__(self, channels: Sequence[int], top: TopHead, dropout: float = 0.5) -> None:
        super().__init__()
        *skips, deepest = channels
        self.top = _top(deepest, top, dropout)
        self.skips = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), _score(c)) for c in skips)
        self.ups = nn.ModuleList(bilinear_upsampling(CLASSES) for _ in channels)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits N×2×H×W for ``size`` = (H, W) of the input; any size, not only multiples of 32."""
        scores = self.top(features[-1])
        for index in reversed(range(len(self.skips))):
            skip = self.skips[index](features[index])
            # An odd side was rounded up on the way down: the doubled map is one row or column too large.
            scores = self.ups[index + 1](scores)[..., : skip.shape[-2], : skip.shape[-1]] + skip
        return self.ups[0](scores)[..., : size[0], : size[1]]
