"""Real photos for benchmarks that need many, or larger ones."""

import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from benchmarks.data import data_folder

SOURCES = 30


def small_photos(rng: random.Random, long_side: int = 320) -> Iterator[bytes]:
    """JPEGs without end, each another crop of a photo of BDNET_DATA's blurraw/; no two are equal."""
    names = sorted((data_folder() / "blurraw" / "images").iterdir())
    photos = []
    for name in rng.sample(names, SOURCES):
        with Image.open(name) as image:
            photos.append(ImageOps.fit(image.convert("RGB"), (2 * long_side, 2 * long_side)))
    seen: set[bytes] = set()
    while True:
        photo = rng.choice(photos)
        width, height = (
            (long_side, long_side * 3 // 4) if rng.random() < 0.7 else (long_side * 3 // 4, long_side)
        )
        left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=rng.randint(60, 95))
        digest = hashlib.sha256(buffer.getvalue()).digest()
        if digest not in seen:
            seen.add(digest)
            yield buffer.getvalue()


def large_photos(megapixels: int) -> list[bytes]:
    """The 27 photos of BDNET_DATA's archive/, of 3 megapixels, or enlarged to 12 or 48."""
    factor = {3: 1, 12: 2, 48: 4}[megapixels]
    photos = []
    for path in sorted((data_folder() / "archive").glob("*.jpg")):
        if factor == 1:
            photos.append(path.read_bytes())
            continue
        with Image.open(path) as image:
            larger = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        larger.save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def write_copies(folder: Path, photos: list[bytes], count: int) -> None:
    """Make a folder of ``count`` files from these photos, each as often as the others."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(photos[number % len(photos)])
