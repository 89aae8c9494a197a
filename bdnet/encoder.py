"""ResNet encoder: the five feature maps that BDNet scores, under torchvision's names. ImageNet weights.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bdnet import resnet

# Channels of the taps at strides 2, 4, 8, 16, 32.
ENCODERS = {name: resnet.channels(name) for name in resnet.DEPTHS}


class ResNetEncoder(nn.Module):
    """ResNet without its classifier, under torchvision's parameter names.

    Args:
        name: in ``ENCODERS``.
        stages: three or all four.
        pooling: instead of ResNet's after the stem, which has stride 2.
    """

    def __init__(self, name: str, stages: int = 4, pooling: nn.Module | None = None) -> None:
        super().__init__()
        parts = resnet.parts(name)
        self.weights = f"ResNet{name.removeprefix('resnet')}_Weights.IMAGENET1K_V1"
        self.conv1, self.bn1, self.relu = parts["conv1"], parts["bn1"], parts["relu"]
        self.maxpool = pooling or parts["maxpool"]
        self.layer1, self.layer2, self.layer3 = parts["layer1"], parts["layer2"], parts["layer3"]
        if stages == 4:
            self.layer4 = parts["layer4"]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float images N×3×H×W to stages + 1 features.

        With ResNet's pooling feature i is N×C_i×⌈H/2^(i+1)⌉×⌈W/2^(i+1)⌉.
        """
        stem = self.relu(self.bn1(self.conv1(images)))
        features = [stem, self.layer1(self.maxpool(stem))]
        for layer in (self.layer2, self.layer3, getattr(self, "layer4", None)):
            if layer is not None:
                features.append(layer(features[-1]))
        return features


@dataclass(frozen=True)
class InitReport:
    """What an initialisation filled: parameter and buffer names of the encoder, and what it left alone."""

    source: str
    loaded: tuple[str, ...]
    not_in_source: tuple[str, ...]
    not_used: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"encoder: {len(self.loaded)} tensors from {self.source}"]
        for title, names in (("from scratch", self.not_in_source), ("not used", self.not_used)):
            if names:
                parts.append(f"{title}: {', '.join(sorted({name.split('.')[0] for name in names}))}")
        return "; ".join(parts)


def load_imagenet(encoder: nn.Module) -> InitReport:
    """Initialise from torchvision's ImageNet weights, downloaded once into torch's hub cache.

    Raises:
        ValueError: nobody trained this encoder on ImageNet.
    """
    name = getattr(encoder, "weights", None)
    if name is None:
        raise ValueError("this network's encoder has no ImageNet weights; start it with --init none")
    import torchvision  # takes seconds, which only those pay who begin a training with it

    weights = torchvision.models.get_weight(name)
    return load_state(
        encoder, weights.get_state_dict(progress=True, check_hash=True), f"torchvision {weights}"
    )


def load_state(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> InitReport:
    """Initialise from tensors under torchvision's keys; a partial state is fine and is reported.

    Raises:
        ValueError: nothing in ``state`` belongs to this encoder, or it is of another depth.
    """
    own = encoder.state_dict()
    if adapt := getattr(encoder, "adapted", None):
        state = adapt(state)
    loaded = {key: value for key, value in state.items() if key in own}
    if not loaded:
        raise ValueError(
            f"{source} holds no weights of this encoder under torchvision's names ({next(iter(own))}, …)"
        )
    for key, value in loaded.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(value.shape)}, this encoder needs "
                f"{tuple(own[key].shape)}; choose weights of the same depth"
            )
    not_used = sorted(set(state) - set(loaded))
    # A deeper network of the same blocks fits by shape, but its stages make no sense with blocks left out.
    stages = {key.split(".")[0] for key in own}
    if deeper := [key for key in not_used if key.startswith("layer") and key.split(".")[0] in stages]:
        raise ValueError(f"{source}: this encoder has no {deeper[0]}; choose weights of the same depth")
    encoder.load_state_dict(loaded, strict=False)
    return InitReport(
        source=source,
        loaded=tuple(sorted(loaded)),
        not_in_source=tuple(sorted(set(own) - set(loaded))),
        not_used=tuple(not_used),
    )
