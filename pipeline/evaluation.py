"""Score a model, or a folder of soft maps, on labelled photos or patches.

Read → detect (or the given map) → one confusion matrix and one MAE per item, on Ray Data; the driver adds
the items of a photo together and derives every score from these matrices. Both sources of soft maps go
through ``score``, so a model and its peers are measured by the same lines.
"""

import io
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from bdnet import metrics
from bdnet.refine import Refinement
from pipeline import dataset, models, storage
from pipeline.cluster import Shares, connect, off_gpu_nodes
from pipeline.patches import MANIFEST, read_shard, shard_uris
from pipeline.progress import Progress
from pipeline.scoring import (
    READ_ROWS,
    SCORED,
    Detector,
    Threshold,
    given_map,
    read_patches,
    read_photos,
    score_items,
)


@dataclass(frozen=True)
class Evaluation:
    """What to score and where to write; exactly one of ``model`` and ``maps`` is set."""

    source: str
    out: str
    model: str | None = None
    maps: str | None = None
    split: str = "test"
    threshold: Threshold = "0.5"
    refinement: Refinement = "none"
    workers: int | None = None


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Score every labelled photo of a split; write OUT/photos.parquet; return the result.

    Raises:
        ValueError: the data, the maps or the model are wrong; one line with file and remedy, nothing written.
    """
    started = time.monotonic()
    assert (evaluation.model is None) != (evaluation.maps is None)
    source, out = storage.normalize(evaluation.source), storage.normalize(evaluation.out)
    if storage.is_inside(out, source):
        raise ValueError(f"--out {evaluation.out} lies inside {source}; choose a folder outside the data.")
    model = _resolve_model(evaluation.model) if evaluation.model is not None else None
    inputs = find_inputs(source, evaluation.split, evaluation.maps)
    scored = model[0] if model else evaluation.maps
    what = f"{inputs.items} items of split {evaluation.split} of {source}"
    print(f"scoring {what}: {scored}", file=sys.stderr, flush=True)
    with connect(evaluation.workers) as shares:
        rows = _gather(inputs, model, evaluation, shares)
    photos = photo_table(rows)
    result = {
        "dataset": source,
        "split": evaluation.split,
        "threshold": evaluation.threshold,
        "refinement": evaluation.refinement,
        **({"model": model[0], "model_digest": model[1]} if model else {"maps": evaluation.maps}),
        **({"patches": inputs.items} if inputs.patches else {}),
        **summarize(photos),
        "seconds": round(time.monotonic() - started, 1),
    }
    buffer = io.BytesIO()
    pq.write_table(photos, buffer)
    storage.write_bytes(storage.join(out, "photos.parquet"), buffer.getvalue())
    return result


@dataclass(frozen=True)
class Inputs:
    """Tasks for the readers (uris only, no pixels) and how many items they will yield."""

    tasks: list[dict[str, Any]]
    items: int
    patches: bool


def find_inputs(source: str, split: str, maps: str | None) -> Inputs:
    """Find and check what will be scored: the photos of a DATASET, or the shards of PATCHES.

    Raises:
        ValueError: neither lies there, or it is wrong, or a photo's map is missing.
    """
    shards = shard_uris(source) if storage.exists(storage.join(source, MANIFEST)) else []
    if shards:
        if maps is not None:
            raise ValueError(
                f"{source}: maps belong to whole photos; use --maps with a folder with index.csv."
            )
        splits = {shard: Counter(read_shard(shard, ["split"])["split"].to_pylist()) for shard in shards}
        every = sorted(set().union(*splits.values()))
        if split not in every:
            raise ValueError(f"{source}: no patch has split '{split}'; ask for one of {', '.join(every)}.")
        return Inputs(
            tasks=[{"shard": shard, "split": split} for shard in shards if split in splits[shard]],
            items=sum(counts.get(split, 0) for counts in splits.values()),
            patches=True,
        )
    photos = dataset.read_dataset(source, split)
    dataset.check_pairs(photos)
    map_uris = _find_maps(maps, photos) if maps is not None else {}
    tasks = [
        {
            "name": photo.name,
            "kind": photo.kind,
            "image_uri": None if maps is not None else photo.image_uri,
            "map_uri": map_uris.get(photo.name),
            "mask_uri": photo.mask_uri,
        }
        for photo in photos
    ]
    return Inputs(tasks, len(tasks), patches=False)


def _resolve_model(model: str) -> tuple[str, str]:
    """A model's shipped name or URI, and its digest."""
    # Workers have another working folder: a relative path becomes absolute here.
    resolved = models.resolved(model)
    # One that isn't there stops the job before Ray starts.
    return resolved, models.read_card(resolved).digest


def _find_maps(maps: str, photos: list[dataset.LabelledPhoto]) -> dict[str, str]:
    folder = storage.normalize(maps)
    files = dataset.files_by_stem(folder, dataset.IMAGE_SUFFIXES)
    for photo in photos:
        found = files.get(photo.name, [])
        if len(found) != 1:
            fault = f"has {len(found)} maps" if found else "has no map"
            raise ValueError(f"{folder}: photo '{photo.name}' {fault}; put one grey {photo.name}.png there.")
    return {photo.name: files[photo.name][0] for photo in photos}


def _gather(
    inputs: Inputs, model: tuple[str, str] | None, evaluation: Evaluation, shares: Shares
) -> list[dict[str, Any]]:
    readers = len(inputs.tasks) if inputs.patches else -(-inputs.items // READ_ROWS)
    items = ray.data.from_items(inputs.tasks, override_num_blocks=readers).map_batches(
        read_patches if inputs.patches else read_photos,
        batch_size=1 if inputs.patches else READ_ROWS,
        batch_format="pyarrow",
        num_cpus=shares.decode_cpus,
        **off_gpu_nodes(),
    )
    if model is None:
        scored = items.map_batches(
            lambda batch: score_items(batch, given_map, evaluation.threshold),
            batch_size=READ_ROWS,
            batch_format="pyarrow",
            num_cpus=shares.decode_cpus,
        )
    else:
        scored = items.map_batches(
            Detector,
            fn_constructor_args=(
                *model,
                shares.threads_per_detector,
                evaluation.threshold,
                evaluation.refinement,
            ),
            compute=ray.data.ActorPoolStrategy(size=min(shares.detectors, readers)),
            batch_size=READ_ROWS,
            batch_format="pyarrow",
            num_cpus=shares.detector_cpus,
            num_gpus=shares.detector_gpus or None,
        )
    rows: list[dict[str, Any]] = []
    progress = Progress("scored items", inputs.items)
    for row in scored.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        rows.append(row)
        progress.add(1)
    progress.close()
    # A score over fewer items than asked would look as good as one over all.
    if len(rows) != inputs.items:
        raise ValueError(
            f"{len(rows)} of {inputs.items} items came back; the data changed meanwhile: run again."
        )
    return rows


def photo_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Add up SCORED rows by photo, sorted by name: counts, items, mean MAE and the photo's own scores."""
    grouped = pa.Table.from_pylist(rows, SCORED).group_by(["name", "kind"])
    totals = grouped.aggregate(
        [*((cell, "sum") for cell in metrics.CELLS), ("mae", "mean"), ("mae", "count")]
    ).sort_by("name")
    totals = totals.rename_columns(["name", "kind", *metrics.CELLS, "mae", "items"])
    for name, values in metrics.score_stack(_confusions(totals)).items():
        totals = totals.append_column(name, pa.array(values, from_pandas=True))  # NaN becomes null
    return totals


def summarize(photos: pa.Table) -> dict[str, Any]:
    """Scores of a ``photo_table``: pooled over all pixels, per photo, by kind, and mean IoU's intervals."""
    kinds = sorted(set(photos["kind"].to_pylist()))
    interval = metrics.bootstrap_interval(_confusions(photos), lambda c: metrics.score_stack(c)["mean_iou"])
    of_each = photos["mean_iou"].to_numpy()
    interval_of_mean = metrics.bootstrap_interval(of_each, lambda drawn: drawn / len(of_each))
    return {
        **_pooled(photos),
        "mean_iou_interval": list(interval),
        "per_photo": {
            **metrics.scores_per_photo(_confusions(photos)),
            "mean_iou_interval": list(interval_of_mean),
        },
        "by_kind": {kind: _pooled(photos.filter(pc.equal(pc.field("kind"), kind))) for kind in kinds},
    }


def _pooled(photos: pa.Table) -> dict[str, Any]:
    return {
        "photos": len(photos),
        **metrics.scores(_confusions(photos).sum(0)),
        "mae": pc.mean(photos["mae"]).as_py(),
    }


def _confusions(photos: pa.Table) -> np.ndarray:
    return np.stack([photos[name].to_numpy() for name in metrics.CELLS], axis=1).reshape(-1, 2, 2)
