"""Score a model, or a folder of soft blur maps, on labelled photos or patches."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import ray.exceptions
import tyro

from bdnet.model import DEFAULT_MODEL
from pipeline.evaluation import Evaluation, Threshold, evaluate


@dataclass(frozen=True)
class Settings:
    """Score a model, or a folder of soft blur maps, against the masks of a dataset."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET|PATCHES")]
    """Folder or URI with images/, masks/ and index.csv, or with the shards of jobs.prepare."""
    out: str
    """Folder or URI for result.json and photos.parquet."""
    model: str | None = None
    """Shipped model's name, or a model's folder or URI. Without --maps the default is bdnet-resnet18."""
    maps: str | None = None
    """Folder or URI of soft maps NAME.png (grey, high = blurred) to score in place of a model."""
    split: str = "test"
    """Split of the index to score."""
    threshold: Threshold = "0.5"
    """Blurred from 0.5 on, or above each map's own Otsu threshold."""
    workers: int | None = None
    """Detectors that run at once; by default as many as the cluster's CPUs or GPUs feed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m jobs.evaluate")
    if settings.model is not None and settings.maps is not None:
        print("error: --model and --maps exclude each other; give one of them.", file=sys.stderr)
        return 2
    if settings.workers is not None and settings.workers < 1:
        print("error: --workers must be at least 1.", file=sys.stderr)
        return 2
    model = settings.model if settings.maps is not None else settings.model or DEFAULT_MODEL
    try:
        result = evaluate(
            Evaluation(
                source=settings.source,
                out=settings.out,
                model=model,
                maps=settings.maps,
                split=settings.split,
                threshold=settings.threshold,
                workers=settings.workers,
            )
        )
    except (ValueError, OSError, ray.exceptions.RayError) as error:
        # A fault on a worker comes with its traceback; the last line is the fault itself.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {lines[-1]}", file=sys.stderr)
        return 1
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
