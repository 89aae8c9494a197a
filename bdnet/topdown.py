"""The default network: BDNet's encoder to stride 16, a pooled context, a top-down decoder of 64 channels.

What the paper names as BDNet's failures are large flat regions and soft boundaries. Two scores per stride
leave no room to reason about either; here features of 64 channels travel from coarse to fine (Lin et al.:
"Feature Pyramid Networks for Object Detection", CVPR 2017), starting from averages over the whole photo and
over its 2² and 4² parts (Zhao et al.: "Pyramid Scene Parsing Network", CVPR 2017); each stride is supervised.
BDNet's finest skip, a normalised 1×1 score of the stem, stays.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdnet.decoder import enlarge, resize, score
from bdnet.encoder import ENCODERS, ResNetEncoder
from bdnet.output import BLUR_KINDS, Output

WIDTH = 64
DEEP = 256
CONTEXT_BINS = (1, 2, 4)
SIDE_WEIGHT = 0.3


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; sides shrink by the stride alone."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """Two dilated 3×3 convolutions beside the identity."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first = conv(channels, channels, dilation=dilation)
        self.second = conv(channels, channels, dilation=dilation)

    def forward(self, features: Tensor) -> Tensor:
        """N×C×H×W to the same."""
        return features + self.second(self.first(features))


class Context(nn.Module):
    """Averages over the photo's 1, 2² and 4² parts, joined to the features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bins = nn.ModuleList(conv(inputs, WIDTH, kernel=1) for _ in CONTEXT_BINS)
        self.join = conv(inputs + WIDTH * len(CONTEXT_BINS), outputs)

    def forward(self, features: Tensor) -> Tensor:
        """N×inputs×H×W to N×outputs×H×W."""
        pooled = [
            resize(reduce(functional.adaptive_avg_pool2d(features, parts)), features)
            for parts, reduce in zip(CONTEXT_BINS, self.bins, strict=True)
        ]
        return self.join(torch.cat([features, *pooled], dim=1))


class TopDown(nn.Module):
    """Class scores of every pixel and of the photo's kind of blur.

    Args:
        slim: pool the stem's maxima by three instead of two, so that all that follows costs four ninths while
            the stem, where blur is seen first, keeps its resolution; and smooth the finest features once
            instead of twice. The weights are a part of those of the whole network.
    """

    def __init__(self, slim: bool = False) -> None:
        super().__init__()
        stem, *levels = ENCODERS["resnet18"][:-1]
        self.pooled_by = 3 if slim else 2
        pooling = nn.MaxPool2d(self.pooled_by, ceil_mode=True) if slim else None
        self.encoder = ResNetEncoder("resnet18", stages=3, pooling=pooling)
        # The last stage is narrower than ResNet's layer4, which has no better start than this one has.
        self.deep = nn.Sequential(conv(levels[-1], DEEP, stride=2), Residual(DEEP, 1), Residual(DEEP, 2))
        self.context = Context(DEEP, WIDTH)
        self.laterals = nn.ModuleList(conv(channels, WIDTH, kernel=1) for channels in levels)
        depths = (1 if slim else 2, *(2 for _ in levels[1:]))
        self.smooths = nn.ModuleList(
            nn.Sequential(*(conv(WIDTH, WIDTH) for _ in range(depth))) for depth in depths
        )
        self.sides = nn.ModuleList(score(WIDTH) for _ in levels)
        self.score = nn.Sequential(nn.Dropout2d(0.1), score(WIDTH))
        self.stem_score = nn.Sequential(nn.BatchNorm2d(stem), score(stem))
        self.kind = nn.Linear(levels[-1] + WIDTH, len(BLUR_KINDS))

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W (see ``preprocess.normalize``) of any size."""
        stem, *levels = self.encoder(images)
        pyramid = [self.context(self.deep(levels[-1]))]
        for index in reversed(range(len(levels))):
            lateral = self.laterals[index](levels[index])
            pyramid.append(self.smooths[index](lateral + enlarge(pyramid[-1], 2, levels[index])))
        coarse = self.score(pyramid[-1])
        # In channels_last memory two channels take four times as long to interpolate as two planes.
        half = enlarge(coarse.float().contiguous(), self.pooled_by, stem) + self.stem_score(stem)
        logits = enlarge(half.contiguous(), 2, images)
        sides: tuple[Tensor, ...] = ()
        if self.training:
            sides = tuple(side(f) for side, f in zip(self.sides, reversed(pyramid[:-1]), strict=True))
        return Output(
            logits, self._kind(coarse, levels[-1], pyramid[1]), sides=sides, side_weight=SIDE_WEIGHT
        )

    def _kind(self, scores: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Kind of the blurred pixels alone: features of the third level, averaged where blur was found."""
        blurred = torch.sigmoid(scores[:, 1:] - scores[:, :1]).detach()
        weight = functional.adaptive_avg_pool2d(blurred, (level.shape[-2], level.shape[-1])) + 1e-3
        features = torch.cat([level, context], dim=1) * weight
        return self.kind(features.sum(dim=(2, 3)) / weight.sum(dim=(2, 3)))
