"""DSS: side outputs of every scale, short connections from the deeper to the shallower ones.

Hou, Cheng, Hu, Borji, Tu, Torr: "Deeply Supervised Salient Object Detection with Short Connections",
CVPR 2017.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdnet.decoder import resize
from bdnet.output import Output
from bdnet.vgg import VGG16Encoder

# Of each side, shallow to deep: channels and kernel of its two convolutions.
SIDES = ((128, 3), (128, 3), (256, 5), (256, 5), (512, 5), (512, 7))
# Which deeper sides each of the first four hears.
HEARS = {0: (5, 4, 3, 2), 1: (5, 4, 3, 2), 2: (5, 4), 3: (5, 4)}
# The sides whose average with the fusion is the answer at test time: 3, 4 and 5 of the paper's 1 to 6.
TESTED = (2, 3, 4)


class DSSEncoder(VGG16Encoder):
    """VGG16 whose last two poolings overlap, as published: 3×3 in place of 2×2."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        poolings = [index for index, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        for index in poolings[-2:]:
            self.features[index] = nn.MaxPool2d(3, stride=2, padding=1)


class DSS(nn.Module):
    """Six side outputs and their fusion, one channel each: the logit of blurred."""

    def __init__(self, encoder: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, count, kernel, padding=kernel // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(count, count, kernel, padding=kernel // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(count, 1, kernel_size=1),
            )
            for inputs, (count, kernel) in zip(channels, SIDES, strict=True)
        )
        self.joins = nn.ModuleList(
            nn.Conv2d(1 + len(heard), 1, kernel_size=1) for _, heard in sorted(HEARS.items())
        )
        self.fuse = nn.Conv2d(len(SIDES), 1, kernel_size=1)
        for conv in (*self.joins, self.fuse):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.constant_(conv.weight, 1 / conv.in_channels)
            nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W of any size."""
        *features, deepest = self.encoder(images)
        features.append(self.pool(deepest))
        sides = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        # From deep to shallow: what is heard has itself heard.
        for index in sorted(HEARS, reverse=True):
            heard = [resize(sides[other], sides[index]) for other in HEARS[index]]
            sides[index] = self.joins[index](torch.cat([sides[index], *heard], dim=1))
        maps = [resize(side, images) for side in sides]
        fused = self.fuse(torch.cat(maps, dim=1))
        if self.training:
            # The paper adds up the losses of all sides and of the fusion.
            return Output(two_class(fused), sides=tuple(two_class(side) for side in maps), side_weight=1.0)
        chosen = torch.stack([maps[index] for index in TESTED] + [fused]).float()
        probability = torch.sigmoid(chosen).mean(dim=0)
        return Output(two_class(torch.logit(probability, eps=1e-6)))


def two_class(blurred: Tensor) -> Tensor:
    """Logits N×1×H×W of blurred as N×2×H×W over (sharp, blurred): their softmax is the sigmoid."""
    return torch.cat([torch.zeros_like(blurred), blurred], dim=1)
