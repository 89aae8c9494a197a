"""Cut a DATASET into patch datasets: Parquet shards of lossless image and mask patches.

The cuts are the paper's (BDNet 2020): BlurDB1 takes random 256² windows, more from photos of the rarer kind;
BlurDB2 takes all windows of a grid and the whole photo resized; ``photos`` keeps whole photos, from which
training takes random crops. One task writes one shard, and everything random is seeded by photo: the same
seed gives the same bytes whatever the cluster.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from PIL import Image

from bdnet import photo as photos_in
from bdnet.output import BLUR_KINDS
from pipeline import cluster, storage
from pipeline.dataset import (
    LabelledPhoto,
    at_training_size,
    check_pairs,
    parse_mask,
    read_dataset,
    read_pair,
)
from pipeline.progress import Progress
from pipeline.schema import PATCHES

Cut = Literal["blurdb1", "blurdb2", "photos"]

PATCH = 256
GRID_STRIDE = 128
RANDOM_CROPS = {"motion": 12, "defocus": 5}
PHOTOS_PER_SHARD = 32
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Window:
    """A rectangle of a photo, in pixels of its training size."""

    left: int
    top: int
    width: int
    height: int


def windows(cut: Cut, kind: str, width: int, height: int, rng: np.random.Generator) -> list[Window]:
    """The windows that a cut takes of one photo.

    Raises:
        ValueError: the photo is smaller than a patch.
    """
    if cut == "photos":
        return [Window(0, 0, width, height)]
    if min(width, height) < PATCH:
        raise ValueError(f"it is {width}×{height}, smaller than a {PATCH}² patch; use --cut photos")
    if cut == "blurdb1":
        return [
            Window(int(rng.integers(width - PATCH + 1)), int(rng.integers(height - PATCH + 1)), PATCH, PATCH)
            for _ in range(RANDOM_CROPS[kind])
        ]
    grid = [Window(x, y, PATCH, PATCH) for y in _grid(height) for x in _grid(width)]
    return [*grid, Window(0, 0, width, height)]


def _grid(side: int) -> list[int]:
    """Starts of the windows along one side, with one more at the edge by the paper's rule.

    A window that would end exactly at the edge is not taken, except the only one of a side of 256: that alone
    gives the paper's number of patches.
    """
    starts = list(range(0, max(1, side - PATCH), GRID_STRIDE))
    if side % GRID_STRIDE > GRID_STRIDE / 3:
        starts.append(side - PATCH)
    return starts


def cut_photo(photo: LabelledPhoto, cut: Cut, seed: int) -> Iterator[dict[str, object]]:
    """Yield the patches of one photo as rows of ``schema.PATCHES``."""
    native, mask = read_pair(photo)
    pixels, mask = at_training_size(photo, native, mask)
    height, width = mask.shape
    try:
        chosen = windows(cut, photo.kind, width, height, _photo_rng(photo.name, seed))
    except ValueError as error:
        raise ValueError(f"{photo.image_uri}: {error}") from error
    for window in chosen:
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        image_patch, mask_patch = Image.fromarray(pixels).crop(box), Image.fromarray(mask).crop(box)
        if cut == "blurdb2" and image_patch.size != (PATCH, PATCH):
            image_patch = image_patch.resize((PATCH, PATCH), Image.Resampling.BICUBIC)
            mask_patch = mask_patch.resize((PATCH, PATCH), Image.Resampling.NEAREST)
        # Whole photos of training size keep their own file: it is smaller and nothing is lost.
        own_file = cut == "photos" and pixels is native
        image_bytes = storage.read_bytes(photo.image_uri) if own_file else _png(image_patch)
        yield {
            "photo": photo.name,
            "kind": photo.kind,
            "split": photo.split,
            "cut": cut,
            **asdict(window),
            "blurred_fraction": float((np.asarray(mask_patch) > 0).mean()),
            "image": image_bytes,
            "mask": _png(mask_patch.convert("1")),
        }


def prepare(dataset: str, cut: Cut, out: str, seed: int, split: str) -> dict[str, Any]:
    """Check a dataset, cut it and write the shards; the manifest comes last, so a half-written one is none.

    Raises:
        ValueError: the dataset is wrong, or ``out`` lies in it or already holds a patch dataset.
    """
    if storage.is_inside(out, dataset):
        raise ValueError(f"--out {out} lies inside {dataset}; choose a folder outside the data")
    manifest = storage.join(out, MANIFEST)
    if storage.exists(manifest):
        raise ValueError(f"{out} already holds a patch dataset; remove it or choose another --out")
    photos = read_dataset(dataset, split)
    check_pairs(photos, smallest=0 if cut == "photos" else PATCH)
    # Neighbours in an index are often alike; mixed shards make every batch a mixture.
    order = sorted(photos, key=lambda photo: _hash(f"{seed}/order/{photo.name}"))
    tables = [
        pa.Table.from_pylist([{**asdict(photo), "shard": index // PHOTOS_PER_SHARD} for photo in group])
        for index in range(0, len(order), PHOTOS_PER_SHARD)
        for group in [order[index : index + PHOTOS_PER_SHARD]]
    ]
    progress = Progress("photos", len(photos))
    shards: dict[str, str] = {}
    by_kind = Counter[str]()
    with cluster.connect() as shares:
        written = ray.data.from_arrow(tables).map_batches(
            partial(_write_shard, cut=cut, seed=seed, out=out),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=shares.decode_cpus,
        )
        for row in written.iter_rows():
            progress.add(row["photos"])
            shards[row["shard"]] = row["digest"]
            by_kind.update({kind: row[kind] for kind in BLUR_KINDS})
    progress.close()
    assert progress.done == len(photos), "a shard is missing"
    content: dict[str, Any] = {
        "cut": cut,
        "seed": seed,
        "split": split,
        "photos": len(photos),
        "patches": by_kind.total(),
    }
    content |= {"by_kind": dict(by_kind), "source": dataset, "shards": dict(sorted(shards.items()))}
    storage.write_bytes(manifest, json.dumps(content, indent=2).encode())
    return {"patches": by_kind.total(), "shards": len(shards), "by_kind": dict(by_kind)}


def shard_uris(patches: str) -> list[str]:
    """URIs of a patch dataset's shards, in order.

    Raises:
        ValueError: there is no complete patch dataset.
    """
    try:
        manifest = json.loads(storage.read_bytes(storage.join(patches, MANIFEST)))
        return [storage.join(patches, name) for name in manifest["shards"]]
    except FileNotFoundError as error:
        raise ValueError(
            f"{patches} is no complete patch dataset ({MANIFEST} is missing); make it with jobs.prepare"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{patches}/{MANIFEST} is not one that jobs.prepare wrote; see what lies there"
        ) from error


def manifest_digest(patches: str) -> str:
    """sha256 of a patch dataset's manifest, which holds the digest of each shard."""
    return hashlib.sha256(storage.read_bytes(storage.join(patches, MANIFEST))).hexdigest()


def read_shard(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one shard, as rows of ``schema.PATCHES`` or the columns asked for.

    Raises:
        ValueError: it is no patch shard.
        OSError: what storage says.
    """
    data = storage.read_bytes(uri)
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        for name in PATCHES.names:
            if name not in parquet.schema_arrow.names:
                raise ValueError(f"column '{name}' is missing")
        return parquet.read(list(columns) if columns else PATCHES.names)
    except (ValueError, OSError) as error:  # OSError is what pyarrow raises for a damaged footer
        fault = " ".join(str(error).split())
        raise ValueError(f"{uri} is no patch shard ({fault}); cut the patches with jobs.prepare") from error


def decode_patch(row: dict[str, Any], working_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode one row of ``schema.PATCHES``: image uint8 H×W×3 and mask uint8 H×W, 255 = blurred.

    At a ``working_size`` the image may be smaller than its mask.

    Raises:
        ValueError: its bytes are no image.
    """
    photo = photos_in.decode(row["image"], working_size)
    if photo.pixels is None:
        raise ValueError(f"patch of {row['photo']}: {photo.status}: {photo.error}; prepare the patches again")
    return photo.pixels, parse_mask(row["mask"], f"mask of {row['photo']}")


def _write_shard(photos: pa.Table, cut: Cut, seed: int, out: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for record in photos.to_pylist():
        photo = LabelledPhoto(**{name: record[name] for name in LabelledPhoto.__dataclass_fields__})
        rows.extend(cut_photo(photo, cut, seed))
    table = pa.Table.from_pylist(rows, schema=PATCHES)
    name = f"shard-{photos['shard'][0].as_py():05d}.parquet"
    buffer = io.BytesIO()
    # PNG and JPEG don't compress again.
    pq.write_table(table, buffer, compression="none", row_group_size=64)
    storage.write_bytes(storage.join(out, name), buffer.getvalue())
    kinds = Counter(row["kind"] for row in rows)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return pa.table(
        {
            "shard": [name],
            "digest": [digest],
            "photos": [len(photos)],
            **{kind: [kinds[kind]] for kind in BLUR_KINDS},
        }
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _photo_rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, _hash(name)])
