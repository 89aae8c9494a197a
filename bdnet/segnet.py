"""SegNet: VGG16 mirrored, its poolings undone at the places where they found their maxima.

Badrinarayanan, Kendall, Cipolla: "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", IEEE TPAMI 39, 2017.
"""

from torch import Tensor, nn
from torch.nn import functional

from bdnet.output import CLASSES, Output
from bdnet.vgg import VGG16Encoder


class SegNet(nn.Module):
    """VGG16 with batch normalisation as encoder; the decoder's convolutions in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VGG16Encoder(batch_norm=True)
        convs = [layer for layer in self.encoder.features if isinstance(layer, nn.Conv2d)]
        layers: list[nn.Module] = []
        for layer in reversed(self.encoder.features):
            if isinstance(layer, nn.MaxPool2d):
                layers.append(nn.MaxUnpool2d(2, stride=2))
            elif isinstance(layer, nn.Conv2d) and layer is not convs[0]:
                outputs = layer.in_channels
                layers += [
                    nn.Conv2d(layer.out_channels, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
        self.decoder = nn.ModuleList(layers)
        self.score = nn.Conv2d(convs[0].out_channels, CLASSES, 3, padding=1)

    def forward(self, images: Tensor) -> Output:
        """Score normalised float images N×3×H×W of any size."""
        values = images
        pooled: list[tuple[Tensor, list[int]]] = []
        for layer in self.encoder.features:
            if isinstance(layer, nn.MaxPool2d):
                size = list(values.shape[-2:])
                values, indices = functional.max_pool2d(values, 2, ceil_mode=True, return_indices=True)
                pooled.append((indices, size))
            else:
                values = layer(values)
        for layer in self.decoder:
            if isinstance(layer, nn.MaxUnpool2d):
                indices, size = pooled.pop()
                values = layer(values, indices, output_size=size)
            else:
                values = layer(values)
        return Output(self.score(values))
