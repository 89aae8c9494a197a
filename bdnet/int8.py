"""The default network's family in int8, for CPUs that multiply 8-bit numbers twice as fast as bf16 (VNNI).

A feature is uint8 with a scale: 255 stands for the largest value that training photos give it on average.
Weights are int8 with a scale for each output, and sums are exact. What adds features of two scales stays as
it was: shortcuts that change their shape, and the top-down path. Values differ a little from the network's
own, so this is for a model whose card has ``ranges``: it is scored as it runs.
"""

import math
import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bdnet.engine import FusedConv, optimize
from bdnet.preprocess import MEAN, STD, normalize

# What is trained for speed alone.
INT8_ARCHITECTURES = ("bdnet-topdown-slim",)
LEVELS = 255  # the largest uint8
WEIGHT_LEVELS = 127
# Not replaced by an ``Int8Conv``: the stem and its score are of their own kind, the others are no work.
NOT_QUANTIZED = ("encoder.conv1", "stem_score.", "context.bins.", "score.", "sides.")

# The first goes to the second alone, in modules that are named so.
PAIRS = (
    ("encoder.", ".convs.0", ".convs.1"),
    ("deep.", ".first.0", ".second.0"),
    ("smooths.", ".0.0", ".1.0"),
)


class Int8Conv(nn.Module):
    """A ``FusedConv`` that computes in int8.

    Args:
        conv: what it stands for.
        dtype: of the result where it isn't uint8.
        scale: of the input; what isn't uint8 yet is quantised with it.
        result: scale of the result, which is then uint8.
        shortcut: scale of the shortcut, where that is uint8.
    """

    def __init__(
        self,
        conv: FusedConv,
        dtype: torch.dtype,
        scale: float,
        result: float | None = None,
        shortcut: float | None = None,
    ) -> None:
        super().__init__()
        weight = conv.weight.to_dense().float()
        padding, stride, dilation, groups = conv.where
        self.scale = scale
        self.relu = conv.relu or "none"
        self.bias = None if conv.bias is None else conv.bias.float()
        integers, scales = rounded(weight)
        self.weight_scales = scales.flatten()
        self.weight_zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.weight = torch.ops.onednn.qconv_prepack(
            integers.to(torch.int8), self.weight_scales, scale, 0, stride, padding, dilation, groups, None
        )
        to = (1.0, 0, dtype) if result is None else (result, 0, torch.uint8)
        self.how = (stride, padding, dilation, groups, *to)
        self.add = (shortcut or 1.0, 0, "sum", 1.0)

    def forward(self, values: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """N×C×H×W; a shortcut of the result's shape and type is overwritten with the result."""
        if values.dtype != torch.uint8:
            values = quantized(values, self.scale)
        given = (values, self.scale, 0, self.weight, self.weight_scales, self.weight_zeros)
        if shortcut is None:
            return torch.ops.onednn.qconv_pointwise(*given, self.bias, *self.how, self.relu, [], "")
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *given, shortcut, self.bias, *self.how, *self.add, self.relu, [], ""
        )


class Int8Stem(nn.Module):
    """The first convolution, on the photo's own bytes: normalisation is part of its weights."""

    def __init__(self, conv: FusedConv, result: float) -> None:
        super().__init__()
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        weight = conv.weight.to_dense().float()
        joint = nn.Conv2d(3, len(weight), weight.shape[-1], stride=conv.where[1][0])
        assert joint.bias is not None
        assert conv.bias is not None
        with torch.no_grad():
            joint.weight.copy_(weight / (LEVELS * std))
            joint.bias.copy_(conv.bias - (weight * mean / std).sum(dim=(1, 2, 3)))
        self.conv = Int8Conv(FusedConv(joint, conv.relu is not None, conv.dtype), conv.dtype, 1.0, result)
        self.padding = conv.where[0]
        # What the network learned to see beyond the edges: zero after normalisation, the mean colour before.
        self.beyond = torch.tensor([round(LEVELS * value) for value in MEAN], dtype=torch.uint8)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB N×3×H×W to uint8 features."""
        count, _, height, width = images.shape
        down, right = self.padding
        # Whole rows are copied at once; single pixels of three bytes are not.
        row = self.beyond.repeat(width + 2 * right)
        padded = row.expand(count, height + 2 * down, len(row)).clone()
        padded = padded.view(count, height + 2 * down, width + 2 * right, 3)
        padded[:, down : down + height, right : right + width] = images.permute(0, 2, 3, 1)
        return self.conv(padded.permute(0, 3, 1, 2))


class Int8Score(nn.Module):
    """The stem's class scores. Normalisation gives channels that hardly ever answer weights a hundred times
    as large as the others', so weights are a sum of two int8 ones: a coarse one, and what that leaves."""

    def __init__(self, conv: FusedConv, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        weight = conv.weight.to_dense().float()
        coarse, scales = rounded(weight)
        rest = weight - coarse * scales
        assert conv.bias is not None
        both = nn.Conv2d(weight.shape[1], 2 * len(weight), 1)
        assert both.bias is not None
        with torch.no_grad():
            both.weight.copy_(torch.cat([coarse * scales, rest]))
            both.bias.copy_(torch.cat([conv.bias, torch.zeros_like(conv.bias)]))
        self.conv = Int8Conv(FusedConv(both, relu=False, dtype=torch.float32), dtype, scale)

    def forward(self, values: Tensor) -> Tensor:
        """uint8 N×C×H×W to N×classes×H×W."""
        # In channels_last memory so few channels take five times as long to add as planes.
        coarse, rest = self.conv(values).contiguous().chunk(2, dim=1)
        return coarse + rest


class Int8MaxPool(nn.Module):
    """``nn.MaxPool2d`` on uint8 features, which torch's own refuses."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.how = [[value, value] for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        self.ceil_mode = pool.ceil_mode

    def forward(self, values: Tensor) -> Tensor:
        """uint8 N×C×H×W."""
        return torch.ops.quantized.max_pool2d(values, *self.how, self.ceil_mode)


def can_measure_ranges() -> bool:
    """Whether this torch has oneDNN, whose convolutions are measured and replaced."""
    return torch.backends.mkldnn.is_available()


def has_fast_int8() -> bool:
    """Whether this CPU multiplies 8-bit numbers in hardware; without, their sums could overflow too."""
    return can_measure_ranges() and torch.cpu._is_vnni_supported()


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights O×C×H×W as whole numbers from -127 to 127 and a scale for each output, O×1×1×1."""
    scales = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) / WEIGHT_LEVELS
    return (weight / scales).round(), scales


def quantized(values: Tensor, scale: float) -> Tensor:
    """Values from 0 up as uint8; larger ones than 255 times the scale become 255."""
    # By way of int16: from floating point to uint8 torch converts one value at a time.
    return (values * (1 / scale)).round_().clamp_(max=LEVELS).to(torch.int16).to(torch.uint8)


@torch.inference_mode()
def measure_ranges(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The largest input of each convolution that ``quantize`` replaces, by the convolution's name: the mean
    of the batches' largest, since one photo's extreme would make all others' steps coarser.

    Args:
        net: a ``TopDown`` as it was trained.
        batches: photos uint8 N×H×W×3; no photo that the model is scored on.
    """
    exact = optimize(net, torch.float32)
    largest: dict[str, list[float]] = {name: [] for name in _replaced(exact)}
    for name, its in largest.items():
        exact.get_submodule(name).register_forward_pre_hook(
            lambda _, given, its=its: its.append(float(given[0].amax()))
        )
    for images in batches:
        exact(normalize(images))
    return {name: statistics.fmean(its) for name, its in largest.items()}


def quantize(net: nn.Module, ranges: Mapping[str, float], dtype: torch.dtype) -> nn.Module:
    """Return a copy of a ``TopDown`` that takes photos uint8 N×3×H×W and computes in int8.

    Args:
        net: the network as it was trained.
        ranges: from ``measure_ranges``.
        dtype: for what stays in floating point.

    Raises:
        ValueError: the ranges are not this network's.
    """
    exact, fast = optimize(net, torch.float32), optimize(net, dtype)
    names = _replaced(exact)
    if set(ranges) != set(names) or not all(0 <= largest < math.inf for largest in ranges.values()):
        raise ValueError("the card's ranges are not those of its network; train it again, or take them out")
    # Nothing but zeros came to some: any scale is right for them.
    scales = {name: (ranges[name] or 1.0) / LEVELS for name in names}
    results, shortcuts = _chains(scales)
    for name in names:
        replaced = Int8Conv(_conv(exact, name), dtype, scales[name], results.get(name), shortcuts.get(name))
        fast.set_submodule(name, replaced)
    stem, pool = scales["encoder.layer1.0.convs.0"], fast.get_submodule("encoder.maxpool")
    assert isinstance(pool, nn.MaxPool2d)
    fast.set_submodule("encoder.conv1", Int8Stem(_conv(exact, "encoder.conv1"), stem))
    fast.set_submodule("encoder.maxpool", Int8MaxPool(pool))
    fast.set_submodule("stem_score.1", Int8Score(_conv(exact, "stem_score.1"), dtype, stem))
    return fast


def _conv(net: nn.Module, name: str) -> FusedConv:
    module = net.get_submodule(name)
    assert isinstance(module, FusedConv)
    return module


def _replaced(net: nn.Module) -> list[str]:
    """Names of the convolutions that become ``Int8Conv``."""
    convs = [name for name, module in net.named_modules() if isinstance(module, FusedConv)]
    return [name for name in convs if not name.startswith(NOT_QUANTIZED)]


def _chains(scales: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Scales of the results and shortcuts that stay uint8: of what goes to a convolution and nowhere else."""
    results, shortcuts = {}, {}
    for within, first, second in PAIRS:
        for name in scales:
            following = name.removesuffix(first) + second
            if within in name and name.endswith(first) and following in scales:
                results[name] = scales[following]
    # The first stage changes no shape: its shortcuts are uint8 too.
    block = "encoder.layer1.{}.convs.{}".format
    count = sum(block(index, 0) in scales for index in range(len(scales)))
    for index in range(count):
        following = block(index + 1, 0) if index + 1 < count else "encoder.layer2.0.convs.0"
        results[block(index, 1)] = scales[following]
        shortcuts[block(index, 1)] = scales[block(index, 0)]
    return results, shortcuts
