"""How near the network comes to this machine: ``python -m benchmarks.network [--compiled]``.

Milliseconds of a photo of 640×448 in each way of running the same network, in turns, and how much that is of
the rate of a bfloat16 matrix product (4096³, in the same turns). ``ready_s`` is how long the first photos
take. Writes results/network.csv.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bdnet.engine import optimize
from bdnet.model import CPU_BATCH, has_fast_bfloat16
from bdnet.networks import build
from bdnet.preprocess import normalize
from benchmarks.command import write_csv
from benchmarks.experiments import HEIGHT, WIDTH

ARCHITECTURES = ("bdnet-topdown", "bdnet-resnet18")
ROUNDS = 7
MATRIX = 4096
EAGER_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Time each way of running a network."""

    compiled: bool = False
    """Compile with torch.compile too: some minutes and a C++ compiler."""


def ways(net: nn.Module, compiled: bool) -> dict[str, tuple[int, Callable[[Tensor], Tensor]]]:
    """Each way to run the network: photos at a time, and uint8 N×H×W×3 to logits."""
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

    found = {
        "eager fp32": (EAGER_BATCH, autocast(plain, torch.float32)),
        "fused fp32": (CPU_BATCH, fused(torch.float32)),
    }
    if has_fast_bfloat16(torch.device("cpu")):
        found["eager bf16"] = (EAGER_BATCH, autocast(plain, torch.bfloat16))
        found["fused bf16, 8 at a time"] = (EAGER_BATCH, fused(torch.bfloat16))
        found["fused bf16"] = (CPU_BATCH, fused(torch.bfloat16))
        if compiled:
            best = torch.compile(plain, dynamic=False, options={"freezing": True})
            found["compiled bf16"] = (CPU_BATCH, autocast(best, torch.bfloat16))
    return found


def seconds(work: Callable[..., object], *arguments: Tensor) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def main() -> int:
    """Write results/network.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    half = torch.randn(MATRIX, MATRIX).bfloat16()
    rows = []
    for arch in ARCHITECTURES:
        torch.manual_seed(0)
        net = build(arch).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, HEIGHT, WIDTH))
        gflop = counter.get_total_flops() / 1e9
        runners = ways(net, settings.compiled)
        images = {
            n: torch.randint(0, 256, (n, HEIGHT, WIDTH, 3), dtype=torch.uint8) for n, _ in runners.values()
        }
        ready = {name: seconds(run, images[n]) for name, (n, run) in runners.items()}
        taken: dict[str, list[float]] = {name: [] for name in runners}
        products = []
        for _ in range(ROUNDS):
            products.append(seconds(torch.matmul, half, half))
            for name, (n, run) in runners.items():
                taken[name].append(seconds(run, images[n]) / n)
        product = 2 * MATRIX**3 / statistics.median(products) / 1e9
        for name, its in taken.items():
            each = statistics.median(its)
            rows.append(
                {
                    "arch": arch,
                    "way": name,
                    "ms": f"{1000 * each:.1f}",
                    "gflop": f"{gflop:.1f}",
                    "gflop_per_s": f"{gflop / each:.0f}",
                    "matrix_product_gflop_per_s": f"{product:.0f}",
                    "of_matrix_product": f"{gflop / each / product:.2f}",
                    "ready_s": f"{ready[name]:.1f}",
                }
            )
    write_csv("network", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
