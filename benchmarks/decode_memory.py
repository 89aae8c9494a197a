"""What does decoding take in memory? ``python -m benchmarks.decode_memory``.

Decodes a large picture in every format and mode, each in a process of its own, and sets the peak beyond the
file itself beside what ``bdnet.photo`` reserves for it.
"""

import io
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdnet import photo
from bdnet.memory import MemoryBudget
from benchmarks.tables import write_csv

SIZE = (8000, 5000)
PIXELS = SIZE[0] * SIZE[1]
ONE_STRIP = {278: SIZE[1]}

# (name, format, mode, options of its encoder)
CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("jpeg", "JPEG", "RGB", {}),
    ("jpeg progressive 4:2:0", "JPEG", "RGB", {"progressive": True}),
    ("jpeg progressive 4:4:4", "JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("jpeg progressive", "JPEG", "CMYK", {"progressive": True}),
    ("png", "PNG", "1", {}),
    ("png", "PNG", "L", {}),
    ("png", "PNG", "LA", {}),
    ("png", "PNG", "P", {}),
    ("png transparent", "PNG", "P", {"transparency": 3}),
    ("png", "PNG", "RGB", {}),
    ("png transparent", "PNG", "RGB", {"transparency": (1, 2, 3)}),
    ("png", "PNG", "RGBA", {}),
    ("png", "PNG", "I;16", {}),
    ("tiff", "TIFF", "RGB", {}),
    ("tiff", "TIFF", "CMYK", {}),
    ("tiff", "TIFF", "LAB", {}),
    ("tiff", "TIFF", "I;16", {}),
    ("tiff", "TIFF", "I", {}),
    ("tiff", "TIFF", "F", {}),
    ("tiff turned", "TIFF", "RGB", {"tiffinfo": {274: 6}}),
    ("tiff turned", "TIFF", "CMYK", {"tiffinfo": {274: 6}}),
    ("tiff deflate", "TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("tiff deflate, one strip", "TIFF", "RGB", {"compression": "tiff_adobe_deflate", "tiffinfo": ONE_STRIP}),
    ("tiff jpeg, one strip", "TIFF", "RGB", {"compression": "jpeg", "tiffinfo": ONE_STRIP}),
    ("gif", "GIF", "P", {}),
    ("bmp", "BMP", "RGB", {}),
    ("webp", "WEBP", "RGB", {"quality": 50, "method": 0}),
    ("webp lossless", "WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
)


def picture(mode: str) -> Image.Image:
    """A smooth pattern of ``SIZE`` in a mode of Pillow's."""
    y, x = np.ogrid[0 : SIZE[1], 0 : SIZE[0]]
    grey = ((np.sin(x / 37) + np.cos(y / 53)) * 60 + 127).astype(np.uint8)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(grey.astype(kind))
    colour = Image.fromarray(np.dstack([grey, grey[::-1], grey[:, ::-1]]))
    if mode == "LAB":
        return Image.merge("LAB", colour.split())
    return colour.convert(mode)


def status_field(name: str) -> int:
    """Return a size of this process in bytes, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class _Noted(MemoryBudget):
    reserved = 0

    def reserve(self, size: int) -> Any:
        _Noted.reserved = size
        return super().reserve(size)


def measure(path: str, answer: Any) -> None:
    """Decode a file and send its status, the peak beyond now, and what was reserved."""
    photo._MEMORY = _Noted(photo.Limits().max_memory)
    data = Path(path).read_bytes()
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):  # what a decoder sets up once doesn't count
        small = io.BytesIO()
        Image.new("RGB", (8, 8)).save(small, kind)
        photo.decode(small.getvalue())
    before = status_field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = photo.decode(data).status
    answer.send((status, status_field("VmHWM") - before, _Noted.reserved))


def main() -> int:
    """Measure every case and write results/decode_memory.csv; 1 where one took more than was reserved."""
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, mode, options in CASES:
            path = Path(folder, "picture")
            picture(mode).save(path, kind, **options)
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=measure, args=(str(path), theirs))
            process.start()
            theirs.close()  # so that a process that dies without an answer is an EOFError here
            status, peak, reserved = ours.recv()
            process.join()
            rows.append(
                {
                    "format": name,
                    "mode": mode,
                    "status": status,
                    "megapixels": PIXELS // 10**6,
                    "peak_bytes_per_pixel": f"{peak / PIXELS:.2f}",
                    "reserved_bytes_per_pixel": f"{reserved / PIXELS:.2f}",
                }
            )
    write_csv("decode_memory", rows)
    # What a small decoding takes anyhow lies below a megapixel's worth.
    over = [
        row
        for row in rows
        if float(row["peak_bytes_per_pixel"]) > float(row["reserved_bytes_per_pixel"]) + 0.1
    ]
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
