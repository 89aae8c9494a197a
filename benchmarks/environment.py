"""What a figure was measured on: hardware and versions, as columns of every CSV in results/."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow", "deltalake")


def describe() -> dict[str, str]:
    """Processor and whether it has bf16 arithmetic, cores, memory, Python and the packages that matter."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = names[0] if names else platform.processor()
    # One name stands for several generations of a processor.
    arithmetic = "with bf16" if "avx512_bf16" in info else "without bf16"
    return {
        "hardware": f"{processor} {arithmetic}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "versions": f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
