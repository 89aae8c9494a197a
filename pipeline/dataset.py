"""Labelled photos: a DATASET is a folder or URI with ``images/``, ``masks/`` and ``index.csv``.

A dataset is refused whole, before any job writes anything: every fault is one line that names the file
(and the row or the photo) and the remedy.
"""

import csv
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from bdnet.card import WORKING_SIZE
from bdnet.output import BLUR_KINDS
from bdnet.photo import decode, size_at
from pipeline import storage
from pipeline.progress import Progress

COLUMNS = ("name", "kind", "split")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png",)
# Long side of the photos that train as they are. BlurRaw has 640 pixels, one photo 950.
LARGEST_AS_IS = 3 * WORKING_SIZE // 2
# Reading waits for storage much longer than it computes.
READ_THREADS = 8


@dataclass(frozen=True)
class LabelledPhoto:
    """One row of a dataset's index, and where its photo and its mask lie."""

    name: str
    kind: str
    split: str
    image_uri: str
    mask_uri: str


def read_dataset(uri: str, split: str | None = None) -> list[LabelledPhoto]:
    """Read and check a dataset's index; return the photos of ``split`` (of all splits) in its order.

    Photos and masks must exist; ``check_pairs`` also looks inside them.

    Raises:
        ValueError: one line with file, row or photo, and remedy: no index, a column or row missing, a photo
            listed twice, a name that leaves the folder, an unknown kind or split, an image or mask missing.
    """
    folder = storage.normalize(uri)
    index = storage.join(folder, "index.csv")
    rows = _read_index(index)
    if split is not None:
        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise ValueError(f"{index}: no photo has split '{split}'; ask for one of {', '.join(splits)}.")
        rows = [row for row in rows if row["split"] == split]
    images = files_by_stem(storage.join(folder, "images"), IMAGE_SUFFIXES)
    masks = files_by_stem(storage.join(folder, "masks"), MASK_SUFFIXES)
    found = []
    for row in rows:
        name = row["name"]
        paths = []
        for what, files, suffixes in (("images", images, IMAGE_SUFFIXES), ("masks", masks, MASK_SUFFIXES)):
            candidates = files.get(name, [])
            if len(candidates) != 1:
                listed = " or ".join(f"{what}/{name}{suffix}" for suffix in suffixes)
                fault = f"{listed} is missing" if not candidates else f"{' and '.join(candidates)} both exist"
                remedy = "add it or remove its row" if not candidates else "keep one of them"
                raise ValueError(f"{index}: photo '{name}': {fault}; {remedy}.")
            paths.append(candidates[0])
        found.append(LabelledPhoto(name, row["kind"], row["split"], *paths))
    return found


def read_pair(photo: LabelledPhoto) -> tuple[np.ndarray, np.ndarray]:
    """Read one photo at native size and its mask: uint8 H×W×3 upright RGB, and uint8 H×W, 255 = blurred.

    Raises:
        ValueError: either is unreadable, the mask isn't strictly 0/255, or their sizes differ.
    """
    decoded = decode(read_file(photo.image_uri), working_size=None)
    if decoded.status != "ok":
        raise ValueError(
            f"{photo.image_uri}: {decoded.status}: {_one_line(decoded.error)}; replace the photo."
        )
    pixels = decoded.pixels
    assert pixels is not None
    mask = parse_mask(read_file(photo.mask_uri), photo.mask_uri)
    if mask.shape != pixels.shape[:2]:
        raise ValueError(
            f"{photo.mask_uri}: the mask is {mask.shape[1]}×{mask.shape[0]} but the upright photo is "
            f"{pixels.shape[1]}×{pixels.shape[0]}; save the mask at the photo's size."
        )
    return pixels, mask


def training_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which a photo trains: one of many pixels at working size, as audits see it."""
    return size_at(width, height, WORKING_SIZE if max(width, height) > LARGEST_AS_IS else None)


def at_training_size(
    photo: LabelledPhoto, pixels: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A pair of ``read_pair`` at its ``training_size``; a mask's pixel is blurred where half of it is."""
    height, width = mask.shape
    size = training_size(width, height)
    if size == (width, height):
        return pixels, mask
    small = decode(read_file(photo.image_uri), WORKING_SIZE).pixels
    assert small is not None, "it was decoded before"
    part = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BOX))
    return small, np.where(part >= 128, np.uint8(255), np.uint8(0))


def parse_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask (1-bit or 8-bit grey) to uint8 H×W, strictly 0 or 255 = blurred.

    Raises:
        ValueError: the bytes are no such image; the message names ``name`` and the remedy.
    """
    pixels = parse_grey(data, name)
    grey = np.flatnonzero((pixels != 0) & (pixels != 255))
    if grey.size:
        raise ValueError(
            f"{name}: the mask is grey (value {pixels.flat[grey[0]]} among others); "
            "make it 0 where sharp and 255 where blurred."
        )
    return pixels


def parse_grey(data: bytes, name: str) -> np.ndarray:
    """Decode a 1-bit or 8-bit grey image to uint8 H×W.

    Raises:
        ValueError: the bytes are no such image; the message names ``name`` and the remedy.
    """
    try:
        # Other parsers of Pillow's start programs (EPS).
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            mode = image.mode
            pixels = np.array(image.convert("L") if mode == "1" else image)
    except UnidentifiedImageError as error:  # Its own text is the address of a buffer.
        raise ValueError(f"{name}: unreadable (not an image); save it as PNG.") from error
    # Pillow's parsers raise whatever broken bytes provoke; all of it means the same to the user.
    except Exception as error:
        raise ValueError(f"{name}: unreadable ({_one_line(error)}); save it as PNG.") from error
    if mode not in ("1", "L"):
        raise ValueError(f"{name}: has mode {mode}, not grey; save it as a 1-bit or 8-bit grey PNG.")
    return pixels


def check_pairs(photos: Sequence[LabelledPhoto], smallest: int = 0) -> None:
    """Read every pair once, so that a job stops before it writes anything.

    Raises:
        ValueError: the fault of the first photo, in order, that ``read_pair`` refuses or that has, at
            training size, a side of less than ``smallest`` pixels.
    """
    checked = Progress("checked photos", len(photos))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in pool.map(_check_pair, photos, [smallest] * len(photos)):
            checked.add(1)
    checked.close()


def _check_pair(photo: LabelledPhoto, smallest: int) -> None:
    _, mask = read_pair(photo)  # The pixels go at once: kept results would fill the memory.
    width, height = training_size(mask.shape[1], mask.shape[0])
    if min(height, width) < smallest:
        raise ValueError(
            f"{photo.image_uri} trains at {width}×{height}, smaller than a {smallest}² patch; "
            "use --cut photos or remove its row"
        )


def _read_index(index: str) -> list[dict[str, str]]:
    try:
        text = storage.read_bytes(index).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(
            f"{index}: not found; a dataset is a folder with images/, masks/ and index.csv."
        ) from error
    except OSError as error:
        raise ValueError(f"{index}: cannot be read ({_one_line(error)}); check access to it.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{index}: not UTF-8 text; save it as CSV in UTF-8.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{index} line {reader.line_num}: {error}; look for a lone quote above.") from error
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{index}: column '{missing[0]}' is missing; the first line must name {', '.join(COLUMNS)}."
        )
    rows: dict[str, dict[str, str]] = {}
    for line, row in lines:
        where = f"{index} line {line}"
        empty = [column for column in COLUMNS if not (row[column] or "").strip()]
        if empty:
            raise ValueError(f"{where}: '{empty[0]}' is empty; fill it in.")
        values = {column: row[column].strip() for column in COLUMNS}
        name = values["name"]
        if "/" in name or "\\" in name or ".." in name or not name.isprintable():
            raise ValueError(f"{where}: {name!r} is no photo name; use a file name without suffix or folder.")
        if values["kind"] not in BLUR_KINDS:
            raise ValueError(
                f"{where}: photo '{name}' has kind {values['kind']!r}; use {' or '.join(BLUR_KINDS)}."
            )
        if name in rows:
            raise ValueError(f"{where}: photo '{name}' is listed twice; keep one row.")
        rows[name] = values
    if not rows:
        raise ValueError(f"{index}: lists no photo; add a row per photo ({', '.join(COLUMNS)}).")
    return list(rows.values())


def files_by_stem(folder: str, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """The folder's own files with one of ``suffixes`` in any case, listed once, by name without suffix."""
    files: dict[str, list[str]] = {}
    _, inside = storage.filesystem(folder)
    for uri in storage.list_files(folder):
        # A local path stays as it is: a link keeps its own name.
        path = PurePosixPath(uri if storage.is_local(uri) else storage.filesystem(uri)[1])
        if path.parent == PurePosixPath(inside) and path.suffix.lower() in suffixes:
            files.setdefault(path.stem, []).append(uri)
    return files


def read_file(uri: str) -> bytes:
    """Read one file of a dataset. Raises ValueError, one line, where it can't be read."""
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise ValueError(f"{uri}: cannot be read ({_one_line(error)}); check access to it.") from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
