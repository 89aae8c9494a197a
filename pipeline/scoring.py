"""Score soft maps against masks, on an evaluation's tasks and actors: ITEM rows in, SCORED rows out."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from bdnet import metrics
from bdnet.detect import BLURRED_PROBABILITY
from bdnet.photo import decode
from bdnet.refine import Refinement, refine
from pipeline import dataset, models
from pipeline.patches import read_shard

Threshold = Literal["0.5", "otsu"]

READ_ROWS = 16

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
        *(pa.field(cell, pa.int64()) for cell in metrics.CELLS),
        pa.field("mae", pa.float64()),
        pa.field("error", pa.string()),
    ]
)


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
        of_split = read_shard(task["shard"]).filter(pc.equal(pc.field("split"), task["split"]))
        for batch in of_split.to_batches(READ_ROWS):
            where = [f"{task['shard']} patch of {name}" for name in batch["photo"].to_pylist()]
            no_map = pa.nulls(len(batch), pa.binary())
            columns = [batch["photo"], batch["kind"], batch["image"], no_map, batch["mask"]]
            yield pa.Table.from_arrays([*columns, pa.array(where, pa.string())], schema=ITEM)


class Detector:
    """Scores the network on ITEM rows; an actor, so that the network is loaded once."""

    def __init__(
        self, model: str, digest: str, threads: int, threshold: Threshold, refinement: Refinement
    ) -> None:
        self.model = models.load(model, digest, threads)
        self.threshold = threshold
        self.refinement = refinement

    def __call__(self, items: pa.Table) -> pa.Table:
        """One SCORED row per ITEM row."""
        return score_items(items, self._soft_map, self.threshold)

    def _soft_map(self, item: dict[str, Any]) -> np.ndarray:
        photo = decode(item["image"], self.model.card.working_size)
        if photo.pixels is None:
            raise ValueError(f"{item['where']}: {photo.status}: {photo.error}; replace the photo.")
        return refine(photo.pixels, self.model.probability(photo.pixels), self.refinement)


def given_map(item: dict[str, Any]) -> np.ndarray:
    """The soft map that another method wrote: float32 H×W in 0..1."""
    return dataset.parse_grey(item["soft_map"], item["where"]).astype(np.float32) / 255


def resized(soft: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring a soft map, float32 H×W, to the shape of a mask."""
    if soft.shape == shape:
        return soft
    return np.asarray(Image.fromarray(soft).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


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
            row |= dict(zip(metrics.CELLS, matrix.ravel().tolist(), strict=True)) | {"mae": mae}
        except ValueError as error:
            row["error"] = " ".join(str(error).split())
        rows.append(row)
    return pa.Table.from_pylist(rows, SCORED)


def score(soft: np.ndarray, truth: np.ndarray, threshold: Threshold) -> tuple[np.ndarray, float]:
    """Compare a soft map float32 (any size, 0..1, high = blurred) with a mask bool H×W.

    The map is resized to the mask, then thresholded: at 0.5, or at its own Otsu threshold over 256 levels.
    Returns the confusion matrix int64 [2, 2] and the mean absolute error of the soft map.
    """
    soft = resized(soft, truth.shape)
    if threshold == "otsu":
        levels = np.rint(soft * 255).astype(np.uint8)
        blurred = levels > metrics.otsu(levels)
    else:
        blurred = soft >= BLURRED_PROBABILITY
    return metrics.confusion(blurred, truth), float(np.abs(soft - truth).mean(dtype=np.float64))
