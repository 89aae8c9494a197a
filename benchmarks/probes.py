"""Which learning rate suits each system? ``python -m benchmarks.probes --out DIR [--weights FILE]``.

The probe that chose the rates of comparison.csv, for those of its systems that results/probes.csv lacks. Its
photos have changed since the first rows were made (commit a24c2c5): this says what it would choose today. Two
minutes a system on two cores with bf16, an estimate; U-Net, SegNet, DSS and FCN on VGG16 take longer.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.comparison import SYSTEMS
from benchmarks.experiments import START, Lab


@dataclass(frozen=True)
class Settings:
    """Probe all systems, or those that are named."""

    lab: Annotated[Lab, tyro.conf.arg(name="")]
    systems: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names in comparison.csv; all that have a rate of their own, if none is given."""


def main() -> int:
    """Probe and write results/probes.csv after each rate."""
    settings = tyro.cli(Settings, description=__doc__)
    # A recipe of its own comes with its rate, and more crops with that of fewer.
    probed = {system.name: system for system in SYSTEMS if system.recipe == START}
    if unknown := set(settings.systems) - probed.keys():
        sys.exit(f"no such system: {', '.join(sorted(unknown))}; there are {', '.join(probed)}")
    for name in settings.systems or probed:
        print(f"{name}: {settings.lab.probe(probed[name]):g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
