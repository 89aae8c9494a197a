"""BDNet: ResNet encoder, FCN-2s decoder, blur-kind branch.

Shen, Dong, Wang, Kong, Wu, Shu: "Automatic Extraction of Blur Regions on a Single Image Based on Semantic
Segmentation", IEEE Access 8, 2020, doi 10.1109/ACCESS.2020.2978084.
"""

from typing import NamedTuple

from torch import Tensor, nn

from bdnet.decoder import FCN2sDecoder, TopHead
from bdnet.encoder import ENCODERS, ResNetEncoder

BLUR_KINDS = ("motion", "defocus")

# The paper's networks by name: encoder and top head. The heavy top belongs to the deep encoders.
ARCHITECTURES: dict[str, tuple[str, TopHead]] = {
    "bdnet-resnet18": ("resnet18", "light"),
    "bdnet-resnet34": ("resnet34", "light"),
    "bdnet-resnet50": ("resnet50", "full"),
    "bdnet-resnet101": ("resnet101", "full"),
    "bdnet-resnet152": ("resnet152", "full"),
}


class Output(NamedTuple):
    """``logits`` N×2×H×W over (sharp, blurred); ``kind_logits`` N×2 over (motion, defocus)."""

    logits: Tensor
    kind_logits: Tensor


class BDNet(nn.Module):
    """Class scores of every pixel and of the photo's kind of blur."""

    def __init__(self, encoder: str = "resnet18", top: TopHead = "light", dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(encoder)
        self.decoder = FCN2sDecoder(ENCODERS[encoder].channels, top, dropout)
        self.kind = nn.Linear(ENCODERS[encoder].channels[-1], len(BLUR_KINDS))

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W (see ``preprocess.normalize``) of any size."""
        features = self.encoder(images)
        logits = self.decoder(features, (images.shape[-2], images.shape[-1]))
        return Output(logits, self.kind(features[-1].mean(dim=(2, 3))))


def build(arch: str) -> BDNet:
    """Build a network by name, untrained.

    Raises:
        ValueError: no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    return BDNet(*ARCHITECTURES[arch])
