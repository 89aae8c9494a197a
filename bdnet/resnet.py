"""ResNet-18 to 152 by its parts, with torchvision's parameter names and starts.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016. torchvision itself takes as
long to import as torch does, in every process that detects.
"""

from typing import cast

from torch import Tensor, nn

# Blocks of the four stages.
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
WITHOUT_BOTTLENECKS = ("resnet18", "resnet34")
STEM = 64
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
CLASSES = 1000


def channels(name: str) -> tuple[int, ...]:
    """Channels of the stem and of the four stages."""
    expansion = 1 if name in WITHOUT_BOTTLENECKS else EXPANSION
    return (STEM, *(expansion * width for width in WIDTHS))


class Block(nn.Module):
    """Two convolutions, or three with a bottleneck, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = EXPANSION * width if bottleneck else width
        if bottleneck:
            convs = [_conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, outputs, 1)]
        else:
            convs = [_conv(inputs, width, 3, stride), _conv(width, width, 3)]
        self.depth = len(convs)
        for number, conv in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions, each with its normalisation."""
        numbers = range(1, self.depth + 1)
        return [
            (cast(nn.Conv2d, getattr(self, f"conv{n}")), cast(nn.BatchNorm2d, getattr(self, f"bn{n}")))
            for n in numbers
        ]

    def forward(self, values: Tensor) -> Tensor:
        """N×inputs×H×W to N×outputs×⌈H/stride⌉×⌈W/stride⌉."""
        shortcut = values if self.downsample is None else self.downsample(values)
        *first, (last, norm) = self.pairs()
        for conv, its_norm in first:
            values = self.relu(its_norm(conv(values)))
        return self.relu(norm(last(values)) + shortcut)


def parts(name: str) -> dict[str, nn.Module]:
    """The layers of a ResNet by torchvision's names, drawn at random as torchvision draws them."""
    bottleneck = name not in WITHOUT_BOTTLENECKS
    layers = {
        "conv1": nn.Conv2d(3, STEM, kernel_size=7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(STEM),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    }
    inputs, *outputs = channels(name)
    for number, (width, depth) in enumerate(zip(WIDTHS, DEPTHS[name], strict=True), 1):
        blocks = []
        for index in range(depth):
            blocks.append(Block(inputs, width, 2 if index == 0 and number > 1 else 1, bottleneck))
            inputs = outputs[number - 1]
        layers[f"layer{number}"] = nn.Sequential(*blocks)
    # The classifier goes, but it is drawn: the same seed gives the same network as torchvision's.
    nn.Linear(inputs, CLASSES)
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return layers


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
