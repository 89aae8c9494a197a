"""How near the shipped networks come to this machine: ``python -m benchmarks.network [--compiled]``.

Milliseconds of a photo of 10:7 at working size in each way of running a network, in turns, and how much that
is of the rate of a bfloat16 matrix product (4096³, in the same turns). ``ready_s`` is how long the first
photos take. Writes results/network.csv.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bdnet.card import DEFAULT_MODEL, Card, shipped_models
from bdnet.engine import optimize
from bdnet.int8 import has_fast_int8, quantize
from bdnet.memory import keep_freed_memory
from bdnet.model import cpu_batch, has_fast_bfloat16, read_network
from bdnet.preprocess import normalize
from benchmarks.tables import write_csv

ROUNDS = 7
MATRIX = 4096
EAGER_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Time each way of running a network."""

    compiled: bool = False
    """Compile with torch.compile too: some minutes and a C++ compiler."""


def ways(net: nn.Module, card: Card, compiled: bool) -> dict[str, tuple[int, Callable[[Tensor], Tensor]]]:
    """Each way to run the network: photos at a time, and uint8 N×H×W×3 to logits."""
    batch = cpu_batch(card)  # an audit's
    plain = net.to(memory_format=torch.channels_last)

    def autocast(run: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        def logits(images: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return run(normalize(images)).logits

        return logits

    def fused(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        fast = optimize(net, dtype)

        def logits(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return fast(normalize(images, dtype)).logits

        return logits

    def int8(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        fast = quantize(net, card.ranges, dtype)

        def logits(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return fast(images.permute(0, 3, 1, 2)).logits

        return logits

    found = {
        "eager fp32, 8 at a time": (EAGER_BATCH, autocast(plain, torch.float32)),
        "fused fp32": (batch, fused(torch.float32)),
    }
    if has_fast_bfloat16(torch.device("cpu")):
        found["eager bf16, 8 at a time"] = (EAGER_BATCH, autocast(plain, torch.bfloat16))
        found["fused bf16, 8 at a time"] = (EAGER_BATCH, fused(torch.bfloat16))
        found["fused bf16"] = (batch, fused(torch.bfloat16))
        if compiled:
            best = cast(nn.Module, torch.compile(plain, dynamic=False, options={"freezing": True}))
            found["compiled bf16"] = (batch, autocast(best, torch.bfloat16))
    if card.ranges and has_fast_int8():
        dtype = torch.bfloat16 if has_fast_bfloat16(torch.device("cpu")) else torch.float32
        found["int8"] = (batch, int8(dtype))
    return found


def seconds_each(work: Callable[..., object], first: Tensor, *others: Tensor) -> float:
    """How long it takes for each of what ``first`` holds."""
    began = time.perf_counter()
    work(first, *others)
    return (time.perf_counter() - began) / len(first)


def main() -> int:
    """Write results/network.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    keep_freed_memory()
    half = torch.randn(MATRIX, MATRIX).bfloat16()
    gflop: dict[str, float] = {}
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    ready: dict[tuple[str, str], float] = {}
    for name in shipped_models():
        net, card = read_network(name)
        net.eval()
        width, height = card.working_size, round(card.working_size * 7 / 10)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, height, width))
        gflop[name] = counter.get_total_flops() / 1e9
        for way, (count, run) in ways(net, card, settings.compiled).items():
            images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
            runs[name, way] = partial(seconds_each, run, images)
            ready[name, way] = count * runs[name, way]()
    taken: dict[tuple[str, str], list[float]] = {which: [] for which in runs}
    products = []
    for _ in range(ROUNDS):
        products.append(seconds_each(torch.matmul, half, half) * MATRIX)
        for which, run_all in runs.items():
            taken[which].append(run_all())
    # How the default runs here; it has no ranges for int8.
    usual = "fused bf16" if (DEFAULT_MODEL, "fused bf16") in taken else "fused fp32"
    product = 2 * MATRIX**3 / statistics.median(products) / 1e9
    rows = []
    for (name, way), its in taken.items():
        each = statistics.median(its)
        row = {"model": name, "way": way, "ms": f"{1000 * each:.1f}", "gflop": f"{gflop[name]:.1f}"}
        row["gflop_per_s"] = f"{gflop[name] / each:.0f}"
        row["matrix_product_gflop_per_s"] = f"{product:.0f}"
        row["of_matrix_product"] = f"{gflop[name] / each / product:.2f}"
        default = taken.get((DEFAULT_MODEL, way), taken[DEFAULT_MODEL, usual])
        row["default_takes_times_this"] = f"{statistics.median(default) / each:.2f}"
        rows.append({**row, "ready_s": f"{ready[name, way]:.2f}"})
    write_csv("network", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
