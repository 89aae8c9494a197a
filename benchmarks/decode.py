"""How fast can a photo be made small? ``.venv-peers/bin/python -m benchmarks.decode`` (``make bench-peers``).

Milliseconds of one core from a JPEG's bytes to RGB of 640 pixels on the long side, at 3, 12 and 48
megapixels, all decoders in turns; ``off`` is the mean difference from Pillow's full decoding, reduced, in
grey values. ``bdnet`` is what an audit does: Pillow's, at a reduced DCT scale, with the checks that every
byte is there.
Writes results/decode.csv.
"""

import io
import statistics
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2.functional import resize

from bdnet.photo import decode, size_at
from benchmarks.photos import large_photos
from benchmarks.tables import write_csv

SIDE = 640
PHOTOS = 9
ROUNDS = 3


def reduced(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def pillow_draft(data: bytes, size: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", size)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def bdnets(data: bytes, size: tuple[int, int]) -> np.ndarray:
    pixels = decode(data, SIDE).pixels
    assert pixels is not None
    return pixels


def torchvisions(data: bytes, size: tuple[int, int]) -> np.ndarray:
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return resize(pixels, [size[1], size[0]], antialias=True).permute(1, 2, 0).numpy()


def opencv(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """At the smallest of its scales that is large enough."""
    with Image.open(io.BytesIO(data)) as image:
        factor = max(f for f in (1, 2, 4, 8) if image.width // f >= size[0])
    flag = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[factor]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), size, interpolation=cv2.INTER_AREA)


def simplejpegs(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """At the smallest scale that is large enough, then Pillow's reduction."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=size[0], min_height=size[1], fastdct=False)
    return reduced(pixels, size)


DECODERS: dict[str, Callable[[bytes, tuple[int, int]], np.ndarray]] = {
    "Pillow, full size": pillow,
    "Pillow, draft": pillow_draft,
    "bdnet": bdnets,
    "torchvision, full size": torchvisions,
    "OpenCV, reduced": opencv,
    "simplejpeg, reduced": simplejpegs,
}


def main() -> int:
    """Write results/decode.csv."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = []
    for megapixels in (3, 12, 48):
        photos = large_photos(megapixels)[:PHOTOS]
        taken: dict[str, list[float]] = {name: [] for name in DECODERS}
        off: dict[str, list[float]] = {name: [] for name in DECODERS}
        for _ in range(ROUNDS):
            for data in photos:
                with Image.open(io.BytesIO(data)) as image:
                    size = size_at(*image.size, SIDE)
                reference = pillow(data, size).astype(np.int16)
                for name, run in DECODERS.items():
                    began = time.thread_time()
                    pixels = run(data, size)
                    taken[name].append(time.thread_time() - began)
                    if pixels.shape == reference.shape:  # bdnet's are upright
                        off[name].append(float(np.abs(pixels - reference).mean()))
        for name in DECODERS:
            rows.append(
                {
                    "megapixels": megapixels,
                    "decoder": name,
                    "ms": f"{1000 * statistics.median(taken[name]):.1f}",
                    "off": f"{statistics.mean(off[name]):.2f}" if off[name] else "",
                }
            )
    write_csv("decode", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
