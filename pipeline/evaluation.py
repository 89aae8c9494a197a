"""Score a model, or a folder of soft maps, on labelled photos or patches.

Read → detect (or the given map) → one confusion matrix and one MAE per item, on Ray Data; the driver adds
the items of a photo together and derives every score from these matrices. Both sources of soft maps go
through ``score``, so a model and its peers are measured by the same lines.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

import bdnet
from bdnet import metrics
from bdnet.model import read_card, shipped_models
from bdnet.photo import decode
from pipeline import dataset, storage
from pipeline.cluster import Shares, connect

Threshold = Literal["0.5", "otsu"]

READ_ROWS = 16
PATCH_COLUMNS = ("photo", "kind", "split", "image", "mask")

# What a detector needs of one item; ``image`` or ``soft_map`` is null, whichever isn't scored.
ITEM = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("soft_map", pa.binary()),
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("where", pa.string(), nullable=False),
    ]
)

# The pixels of one item by truth and prediction; blurred is positive. ``error`` in place of a score.
SCORED = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("tn", pa.int64()),
        pa.field("fp", pa.int64()),
        pa.field("fn", pa.int64()),
        pa.field("tp", pa.int64()),
        pa.field("mae", pa.float64()),
        pa.field("error", pa.string()),
    ]
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
    workers: int | None = None


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Score every labelled photo of a split; write OUT/result.json and OUT/photos.parquet; return the result.

    Raises:
        ValueError: the data, the maps or the model are wrong; one line with file and remedy, nothing written.
    """
    started = time.monotonic()
    assert (evaluation.model is None) != (evaluation.maps is None)
    source = storage.normalize(evaluation.source)
    if storage.is_inside(evaluation.out, source):
        raise ValueError(f"--out {evaluation.out} lies inside {source}; choose a folder outside the data.")
    model = _resolve_model(evaluation.model) if evaluation.model else None
    inputs = find_inputs(source, evaluation.split, evaluation.maps)
    _say(f"scoring {inputs.items} items of split {evaluation.split} of {source}: {model or evaluation.maps}")
    with connect(evaluation.workers) as shares:
        rows = _gather(inputs, model, evaluation.threshold, shares)
    photos = photo_table(rows)
    result = {
        "dataset": source,
        "split": evaluation.split,
        "threshold": evaluation.threshold,
        **({"model": model, "model_digest": read_card(model).digest} if model else {"maps": evaluation.maps}),
        **({"patches": inputs.items} if inputs.patches else {}),
        **summarize(photos),
        "seconds": round(time.monotonic() - started, 1),
    }
    buffer = io.BytesIO()
    pq.write_table(photos, buffer)
    storage.write_bytes(storage.join(evaluation.out, "photos.parquet"), buffer.getvalue())
    storage.write_bytes(storage.join(evaluation.out, "result.json"), json.dumps(result, indent=2).encode())
    return result


# What is scored


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
    shards = (
        [] if storage.exists(storage.join(source, "index.csv")) else storage.list_files(source, ".parquet")
    )
    if shards:
        if maps is not None:
            raise ValueError(
                f"{source}: maps belong to whole photos; use --maps with a folder with index.csv."
            )
        splits = {shard: _splits_of(shard) for shard in shards}
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


def _resolve_model(model: str) -> str:
    # Workers have another working folder: a relative path becomes absolute here.
    resolved = model if model in shipped_models() else storage.normalize(model)
    read_card(resolved)  # A model that isn't there stops the job before Ray starts.
    return resolved


def _find_maps(maps: str, photos: list[dataset.LabelledPhoto]) -> dict[str, str]:
    folder = storage.normalize(maps)
    files = dataset.files_by_stem(folder, dataset.IMAGE_SUFFIXES)
    for photo in photos:
        found = files.get(photo.name, [])
        if len(found) != 1:
            fault = f"has {len(found)} maps" if found else "has no map"
            raise ValueError(f"{folder}: photo '{photo.name}' {fault}; put one grey {photo.name}.png there.")
    return {photo.name: files[photo.name][0] for photo in photos}


def _splits_of(shard: str) -> dict[str, int]:
    """Rows of a shard by split."""
    fs, path = storage.filesystem(shard)
    try:
        with fs.open(path) as file:
            parquet = pq.ParquetFile(file)
            missing = [name for name in PATCH_COLUMNS if name not in parquet.schema_arrow.names]
            if missing:
                raise ValueError(f"column '{missing[0]}' is missing")
            counts = parquet.read(columns=["split"])["split"].value_counts().to_pylist()
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"{shard}: is no patch shard ({fault}); cut them with jobs.prepare.") from error
    return {entry["values"]: entry["counts"] for entry in counts}


# On the workers


def read_photos(tasks: pa.Table) -> pa.Table:
    """Fetch the files of DATASET tasks: one ITEM row each."""

    def fetch(task: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": task["name"],
            "kind": task["kind"],
            "image": dataset.read_file(task["image_uri"]) if task["image_uri"] else None,
            "soft_map": dataset.read_file(task["map_uri"]) if task["map_uri"] else None,
            "mask": dataset.read_file(task["mask_uri"]),
            "where": task["map_uri"] or task["image_uri"],
        }

    with ThreadPoolExecutor(dataset.READ_THREADS) as pool:
        return pa.Table.from_pylist(list(pool.map(fetch, tasks.to_pylist())), ITEM)


def read_patches(tasks: pa.Table) -> Iterator[pa.Table]:
    """Read the rows of one split from PATCHES shards, a few at a time: one ITEM row each."""
    for task in tasks.to_pylist():
        fs, path = storage.filesystem(task["shard"])
        with fs.open(path) as file:
            batches = pq.ParquetFile(file).iter_batches(READ_ROWS, columns=list(PATCH_COLUMNS))
            for batch in batches:
                rows = pa.Table.from_batches([batch]).filter(pc.equal(pc.field("split"), task["split"]))
                where = [f"{task['shard']} patch of {name}" for name in rows["photo"].to_pylist()]
                no_map = pa.nulls(len(rows), pa.binary())
                yield pa.Table.from_arrays(
                    [
                        rows["photo"],
                        rows["kind"],
                        rows["image"],
                        no_map,
                        rows["mask"],
                        pa.array(where, pa.string()),
                    ],
                    schema=ITEM,
                )


class Detector:
    """Scores the network on ITEM rows; an actor, so that the network is loaded once."""

    def __init__(self, model: str, threshold: Threshold, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = bdnet.load(model)
        self.threshold = threshold

    def __call__(self, items: pa.Table) -> pa.Table:
        """One SCORED row per ITEM row."""
        return score_items(items, self._soft_map, self.threshold)

    def _soft_map(self, item: dict[str, Any]) -> np.ndarray:
        photo = decode(item["image"], self.model.card.working_size)
        if photo.pixels is None:
            raise ValueError(f"{item['where']}: {photo.status}: {photo.error}; replace the photo.")
        return self.model.probability(photo.pixels)


def given_map(item: dict[str, Any]) -> np.ndarray:
    """The soft map that another method wrote: float32 H×W in 0..1."""
    return dataset.parse_grey(item["soft_map"], item["where"]).astype(np.float32) / 255


def score_items(
    items: pa.Table, soft_map: Callable[[dict[str, Any]], np.ndarray], threshold: Threshold
) -> pa.Table:
    """One SCORED row per ITEM row; a fault of the data is a row with ``error``, for the driver to raise."""
    rows = []
    for item in items.to_pylist():
        row: dict[str, Any] = {"name": item["name"], "kind": item["kind"]}
        try:
            truth = dataset.parse_mask(item["mask"], f"mask of {item['where']}") > 0
            matrix, mae = score(soft_map(item), truth, threshold)
            row |= dict(zip(("tn", "fp", "fn", "tp"), matrix.ravel().tolist(), strict=True)) | {"mae": mae}
        except ValueError as error:
            row["error"] = " ".join(str(error).split())
        rows.append(row)
    return pa.Table.from_pylist(rows, SCORED)


def score(soft: np.ndarray, truth: np.ndarray, threshold: Threshold) -> tuple[np.ndarray, float]:
    """Compare a soft map float32 (any size, 0..1, high = blurred) with a mask bool H×W.

    The map is resized to the mask, then thresholded: at 0.5, or at its own Otsu threshold over 256 levels.
    Returns the confusion matrix int64 [2, 2] and the mean absolute error of the soft map.
    """
    if soft.shape != truth.shape:
        size = (truth.shape[1], truth.shape[0])
        soft = np.asarray(Image.fromarray(soft).resize(size, Image.Resampling.BILINEAR))
    if threshold == "otsu":
        levels = np.rint(soft * 255).astype(np.uint8)
        blurred = levels > metrics.otsu(levels)
    else:
        blurred = soft >= 0.5
    return metrics.confusion(blurred, truth), float(np.abs(soft - truth).mean(dtype=np.float64))


# On the driver


def _gather(inputs: Inputs, model: str | None, threshold: Threshold, shares: Shares) -> list[dict[str, Any]]:
    ray.data.DataContext.get_current().enable_progress_bars = False
    readers = len(inputs.tasks) if inputs.patches else -(-inputs.items // READ_ROWS)
    items = ray.data.from_items(inputs.tasks, override_num_blocks=readers).map_batches(
        read_patches if inputs.patches else read_photos,
        batch_size=1 if inputs.patches else READ_ROWS,
        batch_format="pyarrow",
        num_cpus=shares.decode_cpus,
    )
    if model is None:
        scored = items.map_batches(
            lambda batch: score_items(batch, given_map, threshold),
            batch_size=READ_ROWS,
            batch_format="pyarrow",
            num_cpus=shares.decode_cpus,
        )
    else:
        scored = items.map_batches(
            Detector,
            fn_constructor_args=(model, threshold, shares.threads_per_detector),
            compute=ray.data.ActorPoolStrategy(size=shares.detectors),
            batch_size=READ_ROWS,
            batch_format="pyarrow",
            num_cpus=shares.detector_cpus,
            num_gpus=shares.detector_gpus or None,
        )
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    said = None
    for row in scored.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        rows.append(row)
        now = time.monotonic()
        said = said or now  # No estimate from the first row: the workers were still starting.
        if now - said > 5 or len(rows) == inputs.items:
            rate, said = len(rows) / (now - started), now
            left = (inputs.items - len(rows)) / rate
            _say(f"{len(rows)}/{inputs.items} scored, {rate:.1f}/s, {left:.0f} s left")
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
        [("tn", "sum"), ("fp", "sum"), ("fn", "sum"), ("tp", "sum"), ("mae", "mean"), ("mae", "count")]
    ).sort_by("name")
    totals = totals.rename_columns(["name", "kind", "tn", "fp", "fn", "tp", "mae", "items"])
    for name, values in metrics.score_stack(_confusions(totals)).items():
        totals = totals.append_column(name, pa.array(values, from_pandas=True))  # NaN becomes null
    return totals


def summarize(photos: pa.Table) -> dict[str, Any]:
    """Scores of a ``photo_table``: pooled over all pixels, per photo, by kind, and mean IoU's interval."""
    kinds = sorted(set(photos["kind"].to_pylist()))
    interval = metrics.bootstrap_interval(_confusions(photos), lambda c: metrics.score_stack(c)["mean_iou"])
    return {
        **_pooled(photos),
        "mean_iou_interval": list(interval),
        "per_photo": metrics.scores_per_photo(_confusions(photos)),
        "by_kind": {kind: _pooled(photos.filter(pc.equal(pc.field("kind"), kind))) for kind in kinds},
    }


def _pooled(photos: pa.Table) -> dict[str, Any]:
    return {
        "photos": len(photos),
        **metrics.scores(_confusions(photos).sum(0)),
        "mae": pc.mean(photos["mae"]).as_py(),
    }


def _confusions(photos: pa.Table) -> np.ndarray:
    return np.stack([photos[name].to_numpy() for name in ("tn", "fp", "fn", "tp")], axis=1).reshape(-1, 2, 2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
