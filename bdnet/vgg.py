"""VGG16 encoder, with or without batch normalisation: the features before each of its five poolings.

Simonyan, Zisserman: "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015;
torchvision's code and names.
"""

from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512, 512)


class VGG16Encoder(nn.Module):
    """VGG16 without its classifier, under torchvision's parameter names."""

    def __init__(self, batch_norm: bool) -> None:
        import torchvision  # takes seconds, which the shipped models' processes need not pay

        super().__init__()
        self.weights = f"VGG16{'_BN' if batch_norm else ''}_Weights.IMAGENET1K_V1"
        constructor = torchvision.models.vgg16_bn if batch_norm else torchvision.models.vgg16
        self.features = constructor(weights=None).features
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # an odd side is rounded up, as a strided convolution does

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float images N×3×H×W to six features, N×C_i×⌈H/2^i⌉×⌈W/2^i⌉; the last is the last pooling."""
        taps = []
        values = images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                taps.append(values)
            values = layer(values)
        return [*taps, values]
