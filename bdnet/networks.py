"""Every network by name: BDNet, what it is compared with, and its variants for the ablations."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from bdnet import vgg
from bdnet.bdnet import TOPS, BDNet, TypedBDNet
from bdnet.dss import DSS, DSSEncoder
from bdnet.encoder import ENCODERS, ResNetEncoder
from bdnet.fcn import FCN, FULLY_CONNECTED, FCNEncoder
from bdnet.segnet import SegNet
from bdnet.topdown import TopDown
from bdnet.unet import CHANNELS as UNET_CHANNELS
from bdnet.unet import UNet, UNetEncoder

STRIDES = (32, 16, 8, 4, 2)


class _PooledResNet(ResNetEncoder):
    """ResNet with the sixth feature that DSS wants: layer4 pooled."""

    def forward(self, images: Tensor) -> list[Tensor]:
        features = super().forward(images)
        return [*features, functional.max_pool2d(features[-1], 3, stride=2, padding=1)]


def _fcn_vgg(finest: int) -> FCN:
    # Pool1 to pool4 have the channels of the stage before them.
    return FCN(FCNEncoder(), (*vgg.CHANNELS[:-1], FULLY_CONNECTED), finest)


_RESNET18 = ENCODERS["resnet18"]

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "bdnet-topdown": TopDown,
    "bdnet-topdown-slim": partial(TopDown, slim=True),
    **{f"bdnet-{encoder}": partial(BDNet, encoder) for encoder in TOPS},
    "bdnet-typed-resnet18": TypedBDNet,
    **{f"fcn{stride}s-vgg16": partial(_fcn_vgg, stride) for stride in STRIDES},
    "unet": lambda: UNet(UNetEncoder(), UNET_CHANNELS),
    "segnet": SegNet,
    "dss": lambda: DSS(DSSEncoder(), (*vgg.CHANNELS, vgg.CHANNELS[-1])),
    # The comparison's decoders on BDNet's encoder.
    "fcn2s-resnet18": lambda: FCN(ResNetEncoder("resnet18"), _RESNET18, finest=2),
    "unet-resnet18": lambda: UNet(ResNetEncoder("resnet18"), _RESNET18),
    "dss-resnet18": lambda: DSS(_PooledResNet("resnet18"), (*_RESNET18, _RESNET18[-1])),
    # BDNet without one of its parts.
    **{f"bdnet-resnet18-{stride}s": partial(BDNet, finest=stride) for stride in STRIDES[:-1]},
    "bdnet-resnet18-scale": partial(BDNet, norm="scale"),
    "bdnet-resnet18-plain": partial(BDNet, norm="none"),
    "bdnet-resnet18-nodropout": partial(BDNet, dropout=0.0),
    "bdnet-resnet18-plain-nodropout": partial(BDNet, norm="none", dropout=0.0),
}


def build(arch: str) -> nn.Module:
    """Build a network by name, untrained. Each maps images to an ``output.Output`` and has an ``encoder``.

    Raises:
        ValueError: no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]()
