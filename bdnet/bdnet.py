"""BDNet: ResNet encoder, FCN-2s decoder, blur-kind branch.

Shen, Dong, Wang, Kong, Wu, Shu: "Automatic Extraction of Blur Regions on a Single Image Based on Semantic
Segmentation", IEEE Access 8, 2020, doi 10.1109/ACCESS.2020.2978084.
"""

import torch
from torch import Tensor, nn

from bdnet.decoder import FCN2sDecoder, SkipNorm, TopHead
from bdnet.encoder import ENCODERS, ResNetEncoder
from bdnet.output import BLUR_KINDS, Output

# Top head of each depth: the heavy one belongs to the deep encoders.
TOPS: dict[str, TopHead] = {
    "resnet18": "light",
    "resnet34": "light",
    "resnet50": "full",
    "resnet101": "full",
    "resnet152": "full",
}


class BDNet(nn.Module):
    """Class scores of every pixel and of the photo's kind of blur."""

    def __init__(
        self,
        encoder: str = "resnet18",
        top: TopHead | None = None,
        dropout: float = 0.5,
        norm: SkipNorm = "batch",
        finest: int = 2,
    ) -> None:
        super().__init__()
        channels = ENCODERS[encoder]
        self.encoder = ResNetEncoder(encoder)
        self.decoder = FCN2sDecoder(channels, top or TOPS[encoder], dropout, norm, finest)
        self.kind = nn.Linear(channels[-1], len(BLUR_KINDS))

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W (see ``preprocess.normalize``) of any size."""
        features = self.encoder(images)
        logits = self.decoder(features, (images.shape[-2], images.shape[-1]))
        return Output(logits, self.kind(features[-1].mean(dim=(2, 3))))


class TypedBDNet(nn.Module):
    """BDNet on ResNet-18 with one mask channel per kind of blur: every pixel is sharp, motion or defocus."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNetEncoder("resnet18")
        self.decoder = FCN2sDecoder(ENCODERS["resnet18"], TOPS["resnet18"], classes=1 + len(BLUR_KINDS))

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W of any size."""
        features = self.encoder(images)
        scores = self.decoder(features, (images.shape[-2], images.shape[-1])).float()
        sharp, kinds = scores[:, :1], scores[:, 1:]
        # A softmax over these two is the softmax over all three with the kinds added up.
        logits = torch.cat([sharp, torch.logsumexp(kinds, dim=1, keepdim=True)], dim=1)
        # Of the photo: how much of each kind its pixels show.
        share = torch.softmax(scores, dim=1)[:, 1:].mean(dim=(2, 3))
        return Output(logits, (share + 1e-6).log(), kind_maps=kinds)
