"""Does Ray Train slow training down? ``python -m benchmarks.training`` (a quick look: ``--rounds 1``).

``jobs.train`` with one worker and with two, and ``benchmarks.bare_training``, take turns on the same patches
with all cores of this machine. A rate is that of the second epoch of three, or of all steps after the first
ten. Writes results/training.csv.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from bdnet.card import DEFAULT_MODEL, read_card
from bdnet.recipes import default
from benchmarks.command import run
from benchmarks.data import data_folder
from benchmarks.tables import write_csv
from pipeline.training import plan

ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """Time training."""

    rounds: int = ROUNDS
    """Runs of each."""


def ray_train(patches: str, arch: str, workers: int, out: Path) -> float:
    """Crops a second of ``jobs.train`` in its second epoch, without its validation.

    The last epoch uses up crops that were cut before, and would flatter the rate.
    """
    arguments = [patches, "--out", str(out), "--arch", arch, "--init", "none", "--epochs", "3"]
    run("jobs.train", *arguments, "--workers", str(workers), "--all-photos")
    history = json.loads((out / "history.json").read_text())
    batch = default().batch_size * workers
    steps = plan(patches, default(), 0, 0).crops_per_epoch // batch
    return steps * batch / history[1]["seconds"]


def main() -> int:
    """Train in turns and write results/training.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    arch = read_card(DEFAULT_MODEL).arch
    rates: dict[str, list[float]] = {"bare PyTorch loop": [], "1 worker": [], "2 workers": []}
    with tempfile.TemporaryDirectory() as folder:
        patches = str(Path(folder, "photos"))
        run("jobs.prepare", str(data_folder() / "blurraw"), "--cut", "photos", "--out", patches)
        for number in range(settings.rounds):
            bare = run("benchmarks.bare_training", patches, "--arch", arch)
            rates["bare PyTorch loop"].append(bare["crops_per_second"])
            for workers, name in ((1, "1 worker"), (2, "2 workers")):
                out = Path(folder, f"{workers}-{number}")
                rates[name].append(ray_train(patches, arch, workers, out))
            print({name: f"{its[-1]:.2f}" for name, its in rates.items()}, file=sys.stderr)
    bare_rate = statistics.median(rates["bare PyTorch loop"])
    rows = []
    for name, its in rates.items():
        median = statistics.median(its)
        rows.append(
            {
                "loop": name,
                "arch": arch,
                "rounds": settings.rounds,
                "crops_per_second": f"{median:.2f}",
                "of_bare_loop": f"{median / bare_rate:.3f}",
            }
        )
    write_csv("training", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
