"""FCN-2s decoder: class scores at five strides, fused from coarse to fine.

Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; BDNet, 2020.
In place of FCN's fixed scale layers BDNet puts a batch normalisation in front of each skip's 1×1 score.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdnet.output import CLASSES

TopHead = Literal["light", "full"]
SkipNorm = Literal["batch", "scale", "none"]

# FCN's factors on the features of stride 16 and 8, in its net that is trained in one go; the finer skips are
# BDNet's, FCN has no factor for them.
FCN_SCALES = {16: 1e-2, 8: 1e-4, 4: 1e-4, 2: 1e-4}


class Scale(nn.Module):
    """A fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        """Multiply."""
        return values * self.factor


def bilinear_upsampling(channels: int) -> nn.ConvTranspose2d:
    """Learned ×2 deconvolution, kernel 4, that starts as bilinear interpolation of each channel."""
    deconv = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1, bias=False)
    ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        deconv.weight.zero_()
        for channel in range(channels):
            deconv.weight[channel, channel] = ramp[:, None] * ramp[None, :]
    return deconv


def enlarge(features: Tensor, times: int, like: Tensor) -> Tensor:
    """Interpolate N×C×h×w to ``times`` its height and width; cut what reaches over the edges of ``like``.

    A stride rounds odd sides up: were features resized to ``like`` instead, they would be shifted against it,
    by an amount that depends on the photo's size.
    """
    height, width = like.shape[-2:]
    enlarged = functional.interpolate(features, scale_factor=times, mode="bilinear", align_corners=False)
    return enlarged[..., :height, :width]


def resize(features: Tensor, like: Tensor) -> Tensor:
    """Interpolate N×C×h×w to the height and width of ``like``, whatever the strides of the two."""
    return functional.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)


def score(channels: int, classes: int = CLASSES) -> nn.Conv2d:
    """1×1 class scores, Xavier with gain √2 and bias 0.1."""
    conv = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(2))
    assert conv.bias is not None
    nn.init.constant_(conv.bias, 0.1)
    return conv


def _skip(channels: int, stride: int, norm: SkipNorm, classes: int) -> nn.Sequential:
    before: dict[SkipNorm, nn.Module] = {
        "batch": nn.BatchNorm2d(channels),
        "scale": Scale(FCN_SCALES[stride]),
        "none": nn.Identity(),
    }
    return nn.Sequential(before[norm], score(channels, classes))


def _top(channels: int, head: TopHead, dropout: float, classes: int) -> nn.Sequential:
    if head == "light":
        return nn.Sequential(
            nn.Dropout2d(dropout), nn.BatchNorm2d(channels), nn.ReLU(), score(channels, classes)
        )
    middle = channels // 2
    # The paper pads this 3×3 by 3, as FCN's fc6 does, and crops later: the same values for more work.
    return nn.Sequential(
        nn.Conv2d(channels, middle, 3, padding=1),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        nn.Conv2d(middle, middle, 1),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        score(middle, classes),
    )


class FCN2sDecoder(nn.Module):
    """Five features, strides 2 to 32, to class scores at input size.

    Args:
        channels: of the five features.
        top: head on the deepest feature.
        dropout: probability in the top head.
        norm: what stands in front of each skip's score.
        finest: stride of the finest skip; 32 has none (FCN-32s), 2 all four (FCN-2s, the paper's).
        classes: scores per pixel.
    """

    def __init__(
        self,
        channels: Sequence[int],
        top: TopHead,
        dropout: float = 0.5,
        norm: SkipNorm = "batch",
        finest: int = 2,
        classes: int = CLASSES,
    ) -> None:
        super().__init__()
        *skips, deepest = channels
        self.top = _top(deepest, top, dropout, classes)
        self.first_skip = finest.bit_length() - 2  # index of the finest feature that is scored
        self.skips = nn.ModuleList(
            _skip(skips[index], 2 ** (index + 1), norm, classes)
            for index in range(self.first_skip, len(skips))
        )
        self.ups = nn.ModuleList(bilinear_upsampling(classes) for _ in channels)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits N×classes×H×W for ``size`` = (H, W) of the input, whether a multiple of 32 or not."""
        scores = self.top(features[-1])
        for index in reversed(range(len(features) - 1)):
            height, width = features[index].shape[-2:]
            # An odd side was rounded up on the way down: the doubled map is one row or column too large.
            scores = self.ups[index + 1](scores)[..., :height, :width]
            if index >= self.first_skip:
                scores = scores + self.skips[index - self.first_skip](features[index])
        return self.ups[0](scores)[..., : size[0], : size[1]]
