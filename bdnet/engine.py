"""A trained network made fast on CPUs: fewer operations that give the same values.

Batch normalisations become part of the convolutions beside them; a convolution, the addition of a shortcut
and the ReLU after it become one call of oneDNN, in bf16 with weights in its own layout. These are the
operations that ``torch.compile`` generates, without its wait for a C++ compiler at every new shape.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bdnet.encoder import ResNetEncoder
from bdnet.resnet import Block


class FusedConv(nn.Module):
    """A convolution with what follows it: out = relu(conv(x) + shortcut), both optional."""

    def __init__(self, conv: nn.Conv2d, relu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.where = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
        self.relu = "relu" if relu else None
        self.dtype = dtype
        weight = conv.weight.detach().to(dtype)
        if dtype == torch.bfloat16:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.where)
        else:
            # oneDNN lays them out for the shape that comes, all within 20 ms. Laid out beforehand they suit
            # one shape: without AVX-512 bdnet-fast took 1.4 to 1.6 times as long, small photos 10 times.
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)

    def forward(self, values: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """N×C×H×W, and a shortcut of the result's shape, to ``dtype``."""
        values = values.to(self.dtype)
        run = torch.ops.mkldnn._convolution_pointwise
        if shortcut is None:
            return run(values, self.weight, self.bias, *self.where, self.relu or "none", [], "")
        return run.binary(
            values, shortcut, self.weight, self.bias, *self.where, "add", 1.0, self.relu, [], None
        )


class FusedBlock(nn.Module):
    """A residual block: the last convolution adds the shortcut and rectifies."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            FusedConv(fuse_conv_bn_eval(*pair), relu=True, dtype=dtype) for pair in block.pairs()
        )
        self.downsample = None if block.downsample is None else _fused(block.downsample, dtype)

    def forward(self, values: Tensor) -> Tensor:
        """N×C×H×W, as the block it stands for."""
        *first, last = self.convs
        shortcut = values if self.downsample is None else self.downsample(values)
        for conv in first:
            values = conv(values)
        return last(values, shortcut)


def optimize(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of ``net`` for evaluation on this CPU, which takes and computes in ``dtype``."""
    return _fused(copy.deepcopy(net).eval(), dtype).eval()


def _fused(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace what can be fused in ``module`` and below it."""
    if isinstance(module, Block):
        return FusedBlock(module, dtype)
    if isinstance(module, nn.Conv2d):
        return FusedConv(module, relu=False, dtype=dtype)
    if isinstance(module, nn.ConvTranspose2d | nn.Linear):
        return module.to(dtype)
    if isinstance(module, ResNetEncoder):
        assert isinstance(module.conv1, nn.Conv2d)
        assert isinstance(module.bn1, nn.BatchNorm2d)
        module.conv1 = FusedConv(fuse_conv_bn_eval(module.conv1, module.bn1), relu=True, dtype=dtype)
        module.bn1 = module.relu = nn.Identity()
    # Wherever a ModuleList here holds convolutions and ReLUs, they run in its order too.
    if isinstance(module, nn.Sequential | nn.ModuleList):
        _fuse_neighbours(module, dtype)
    for name, child in list(module.named_children()):
        setattr(module, name, _fused(child, dtype))
    return module


def _fuse_neighbours(layers: nn.Sequential | nn.ModuleList, dtype: torch.dtype) -> None:
    """Make one layer of norm → 1×1 convolution, and of convolution → norm → ReLU, as far as it is there."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.Conv2d):
            continue
        before = layers[index - 1] if index else None
        if isinstance(before, nn.BatchNorm2d) and layer.kernel_size == (1, 1):
            layer = _norm_before(before, layer)
            layers[index - 1] = nn.Identity()
        at = index + 1
        after = layers[at] if at < len(layers) else None
        if isinstance(after, nn.BatchNorm2d):
            layer = fuse_conv_bn_eval(layer, after)
            layers[at] = nn.Identity()
            at += 1
            after = layers[at] if at < len(layers) else None
        relu = isinstance(after, nn.ReLU)
        if relu:
            layers[at] = nn.Identity()
        layers[index] = FusedConv(layer, relu, dtype)


def _norm_before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """The 1×1 convolution that gives what ``conv`` gives after ``norm``."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    offset = norm.bias - norm.running_mean * factor
    joint = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_size=1)
    assert joint.bias is not None
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    with torch.no_grad():
        joint.weight.copy_(conv.weight * factor[:, None, None])
        joint.bias.copy_(bias + conv.weight[:, :, 0, 0] @ offset)
    return joint
