"""FCN-32s to FCN-2s on VGG16, the paper's first comparison.

Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. That paper ends
at 8s; 4s and 2s go on in its way down to pool1. Where it pads the photo by 100 pixels, the first fully
connected layer is padded by 3 here: the same alignment without the waste. There the skips are added in one
training after the other, or at once with small fixed factors; here at once, without factors.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from bdnet.decoder import enlarge
from bdnet.output import CLASSES, Output
from bdnet.vgg import CHANNELS, VGG16Encoder

FULLY_CONNECTED = 4096


class FCNEncoder(VGG16Encoder):
    """VGG16 with its two hidden fully connected layers as convolutions."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.fc6 = nn.Conv2d(CHANNELS[-1], FULLY_CONNECTED, kernel_size=7, padding=3)
        self.fc7 = nn.Conv2d(FULLY_CONNECTED, FULLY_CONNECTED, kernel_size=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float images N×3×H×W to pool1 … pool4 and fc7, strides 2, 4, 8, 16, 32."""
        values = images
        pools = []
        for layer in self.features:
            values = layer(values)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(values)
        for layer in (self.fc6, self.fc7):
            values = self.dropout(functional.relu(layer(values)))
        return [*pools[:-1], values]

    @staticmethod
    def adapted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Torchvision's VGG16 weights with the two fully connected layers in the shape of convolutions."""
        adapted = dict(state)
        for linear, conv, kernel in (("classifier.0", "fc6", 7), ("classifier.3", "fc7", 1)):
            if f"{linear}.weight" in state:
                weight = adapted.pop(f"{linear}.weight")
                adapted[f"{conv}.weight"] = weight.reshape(FULLY_CONNECTED, -1, kernel, kernel)
                adapted[f"{conv}.bias"] = adapted.pop(f"{linear}.bias")
        return adapted


class FCN(nn.Module):
    """Scores of the deepest feature and of the finer ones down to stride ``finest``, summed.

    Args:
        encoder: gives five features, strides 2 to 32.
        channels: of these features.
        finest: 32, 16, 8, 4 or 2.
    """

    def __init__(self, encoder: nn.Module, channels: tuple[int, ...], finest: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.first = finest.bit_length() - 2  # index of the finest feature that is scored
        self.scores = nn.ModuleList(
            nn.Conv2d(count, CLASSES, kernel_size=1) for count in channels[self.first :]
        )
        for score in self.scores:
            assert isinstance(score, nn.Conv2d)
            assert score.bias is not None
            # As published: a new score says nothing at first.
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W of any size."""
        features = self.encoder(images)[self.first :]
        summed = self.scores[-1](features[-1])
        for score, feature in zip(reversed(self.scores[:-1]), reversed(features[:-1]), strict=True):
            summed = enlarge(summed, 2, feature) + score(feature)
        return Output(enlarge(summed, 2 ** (self.first + 1), images))
