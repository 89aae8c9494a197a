"""Cut a labelled dataset into patches: ``python -m jobs.prepare DATASET --cut blurdb1 --out URI``."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs.command import UsageError, run
from pipeline import storage
from pipeline.patches import Cut, prepare


@dataclass(frozen=True)
class Settings:
    """Options of jobs.prepare."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Folder or URI with images/, masks/ and index.csv (name, kind, split)."""
    cut: Cut
    """blurdb1: random 256² windows; blurdb2: a grid of them and the photo resized; photos: whole photos."""
    out: str
    """Folder or URI of the patch dataset."""
    seed: int = 0
    """Seed of everything random."""
    split: str = "train"
    """Which photos, by the index's column split."""


def work(settings: Settings) -> dict[str, Any]:
    """Cut the dataset and count the patches."""
    if settings.seed < 0:
        raise UsageError("--seed must be at least 0")
    dataset, out = storage.normalize(settings.dataset), storage.normalize(settings.out)
    print(f"cutting {dataset} ({settings.split}) as {settings.cut} into {out}", file=sys.stderr)
    return prepare(dataset, settings.cut, out, settings.seed, settings.split)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run(Settings, work, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
