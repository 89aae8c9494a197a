"""U-Net: features of each scale joined to what comes up from the coarser ones.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.
With padded convolutions, so that the map has the photo's size, and batch normalisation, as it starts from
scratch; without that paper's dropout at the end of the contracting path.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdnet.decoder import resize
from bdnet.output import CLASSES, Output

CHANNELS = (64, 128, 256, 512, 1024)


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions, each normalised and rectified."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNetEncoder(nn.Module):
    """Five double convolutions with poolings between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            double_conv(inputs, outputs) for inputs, outputs in zip((3, *CHANNELS), CHANNELS, strict=False)
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float images N×3×H×W to five features; feature i is N×C_i×⌈H/2^i⌉×⌈W/2^i⌉."""
        features = [self.stages[0](images)]
        for stage in self.stages[1:]:
            features.append(stage(self.pool(features[-1])))
        return features


class UNet(nn.Module):
    """The expanding path on any encoder whose features halve from one to the next."""

    def __init__(self, encoder: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        coarse_to_fine = list(reversed(channels))
        pairs = list(itertools.pairwise(coarse_to_fine))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, stride=2) for deep, fine in pairs)
        self.joins = nn.ModuleList(double_conv(2 * fine, fine) for _, fine in pairs)
        self.score = nn.Conv2d(channels[0], CLASSES, kernel_size=1)

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W of any size."""
        *skips, values = self.encoder(images)
        for up, join, skip in zip(self.ups, self.joins, reversed(skips), strict=True):
            height, width = skip.shape[-2:]
            values = join(torch.cat([skip, up(values)[..., :height, :width]], dim=1))
        logits = self.score(values)
        # On an encoder whose first feature is already halved the map is enlarged.
        if logits.shape[-2:] != images.shape[-2:]:
            logits = resize(logits, images)
        return Output(logits)
