"""Score a model, or soft blur maps, on labelled photos: ``python -m jobs.evaluate DATASET --out URI``."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from bdnet.card import DEFAULT_MODEL
from bdnet.refine import Refinement
from jobs.command import UsageError, run
from pipeline.evaluation import Evaluation, Threshold, evaluate


@dataclass(frozen=True)
class Settings:
    """Score a model, or a folder of soft blur maps, against the masks of a dataset."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET|PATCHES")]
    """Folder or URI with images/, masks/ and index.csv, or with the shards of jobs.prepare."""
    out: str
    """Folder or URI for result.json and photos.parquet."""
    model: str | None = None
    """Shipped model's name, or a model's folder or URI. Without --maps the default is bdnet-topdown."""
    maps: str | None = None
    """Folder or URI of soft maps NAME.png (grey, high = blurred) to score in place of a model."""
    split: str = "test"
    """Split of the index to score."""
    threshold: Threshold = "0.5"
    """Blurred from 0.5 on, or above each map's own Otsu threshold."""
    refine: Refinement = "none"
    """Post-process the model's maps with the photo's colours: dense CRF or votes of superpixels."""
    workers: int | None = None
    """Detectors that run at once; by default as many as the cluster's CPUs or GPUs feed."""


def work(settings: Settings) -> dict[str, Any]:
    """Score the model or the maps."""
    if settings.model is not None and settings.maps is not None:
        raise UsageError("--model and --maps exclude each other; give one of them")
    if settings.refine != "none" and settings.maps is not None:
        raise UsageError("--refine works on a model's maps; --maps are scored as they are")
    if settings.workers is not None and settings.workers < 1:
        raise UsageError("--workers must be at least 1")
    model = DEFAULT_MODEL if settings.model is None and settings.maps is None else settings.model
    return evaluate(
        Evaluation(
            source=settings.source,
            out=settings.out,
            model=model,
            maps=settings.maps,
            split=settings.split,
            threshold=settings.threshold,
            refinement=settings.refine,
            workers=settings.workers,
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run(Settings, work, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
