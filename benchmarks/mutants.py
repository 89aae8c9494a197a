"""What becomes of damaged photos? ``python -m benchmarks.mutants``.

Makes mutants of real photos in every format, always the same ones, decodes each in a process of its own, as
audits do with what is suspect, in bounded memory, and counts by format, mutation and status. ``differs`` of a
mutant that is ok: its pixels are far from the original's, so that it is scored though it is broken. A process
that dies counts as a crash, one that doesn't end as a hang.
"""

import io
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdnet.card import WORKING_SIZE
from bdnet.photo import Limits, Photo
from benchmarks.data import data_folder
from benchmarks.tables import write_csv
from pipeline.decoding import Isolated

PHOTOS = 2
LONG_SIDE = 1024
# Address space of a decoding process beside what its libraries map.
MEMORY = 2 * 2**30
# Levels of 255 by which pixels differ on average: a few are what requantising costs.
FAR = 4.0

Mutation = Callable[[bytes, np.random.Generator], bytes]


def originals() -> Iterator[tuple[str, bytes]]:
    """Yield (format, file) of a few real photos in every format."""
    for path in sorted((data_folder() / "archive").glob("*_S.jpg"))[:PHOTOS]:
        with Image.open(path) as photo:
            photo.thumbnail((LONG_SIDE, LONG_SIDE))
            for name, kind, options in FORMATS:
                picture = photo.convert("CMYK") if name == "jpeg cmyk" else photo
                buffer = io.BytesIO()
                if kind == "HEIF":
                    import pillow_heif

                    pillow_heif.from_pillow(picture).save(buffer, quality=70)
                else:
                    picture.save(buffer, kind, **options)
                yield name, buffer.getvalue()


FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("jpeg", "JPEG", {"quality": 90}),
    ("jpeg optimised", "JPEG", {"quality": 80, "optimize": True}),
    ("jpeg restarts", "JPEG", {"quality": 90, "restart_marker_rows": 1}),
    ("jpeg progressive", "JPEG", {"quality": 90, "progressive": True}),
    ("jpeg cmyk", "JPEG", {"quality": 90}),
    ("png", "PNG", {}),
    ("webp", "WEBP", {"quality": 80}),
    ("webp lossless", "WEBP", {"lossless": True, "method": 0}),
    ("tiff", "TIFF", {}),
    ("tiff deflate", "TIFF", {"compression": "tiff_adobe_deflate"}),
    ("tiff jpeg", "TIFF", {"compression": "jpeg"}),
    ("gif", "GIF", {}),
    ("bmp", "BMP", {}),
    ("heic", "HEIF", {}),
)


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def ended_early(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with the file's last bytes put behind: its end marker, whatever that is."""
    return data[: rng.integers(len(data) // 10, len(data) * 9 // 10)] + data[-12:]


def tail_of(value: int) -> Mutation:
    def filled(data: bytes, rng: np.random.Generator) -> bytes:
        kept = int(rng.integers(len(data) // 10, len(data) * 9 // 10))
        return data[:kept] + bytes([value]) * (len(data) - kept)

    return filled


def bits_flipped(data: bytes, rng: np.random.Generator) -> bytes:
    flipped = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 20)):
        flipped[at] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def header_absurd(data: bytes, rng: np.random.Generator) -> bytes:
    """Numbers of the first bytes, or of the last where a TIFF has its directory, become extreme ones."""
    absurd = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(min(700, len(data) - 4)))
        if data[:2] in (b"II", b"MM") and rng.random() < 0.7:
            at = len(data) - 4 - int(rng.integers(300))
        value = rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 50_000])
        absurd[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), int(value))
    return bytes(absurd)


def run_zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    """Zero some sectors of 512 bytes, as a disk loses them."""
    sectors = int(rng.choice([1, 8, 32]))
    at = 512 * int(rng.integers(1, max(2, len(data) // 512 - sectors)))
    return data[:at] + bytes(512 * sectors) + data[at + 512 * sectors :]


def chunk_removed(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(len(data))), int(rng.choice([1, 100, 4096, 16_384]))
    return data[:at] + data[at + size :]


def chunk_doubled(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(len(data))), int(rng.choice([1, 100, 4096, 16_384]))
    return data[: at + size] + data[at:]


def chunk_of_noise(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = int(rng.integers(len(data) // 20, len(data))), int(rng.choice([100, 4096, 16_384]))
    return (data[:at] + rng.bytes(size) + data[at + size :])[: len(data)]


def signature_of_another(data: bytes, rng: np.random.Generator) -> bytes:
    """What a wrong suffix would be if suffixes counted: a file that begins as another format."""
    signatures = (
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\1\0WEBPVP8 ",
        b"II*\0",
        b"GIF89a",
        b"BM",
    )
    signature = signatures[rng.integers(len(signatures))]
    return signature + data[len(signature) :]


MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "truncated": (truncated, 12),
    "cut, then its end": (ended_early, 6),
    "tail of zeros": (tail_of(0), 4),
    "tail of ones": (tail_of(255), 4),
    "bits flipped": (bits_flipped, 12),
    "absurd header": (header_absurd, 16),
    "sectors zeroed": (run_zeroed, 8),
    "chunk removed": (chunk_removed, 8),
    "chunk doubled": (chunk_doubled, 8),
    "noise": (chunk_of_noise, 6),
    "signature of another": (signature_of_another, 3),
}


def bound_memory() -> None:
    """Bound what this process and those that it starts may map, beside what its libraries do."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def status_of(photo: Photo) -> str:
    """Its status; one that ``Isolated`` gives where the decoder is at fault has a name of its own."""
    for fault, words in (
        ("crash", ("the decoder crashed", "its decoder was killed")),
        ("hang", ("decoding took",)),
    ):
        if (photo.error or "").startswith(words):
            return fault
    return photo.status


def is_far(pixels: np.ndarray, original: np.ndarray) -> bool:
    """Whether pixels, uint8 [H, W, 3], are another picture than the original's."""
    if pixels.shape != original.shape:
        return True
    return float(np.abs(pixels.astype(np.int16) - original).mean()) > FAR


def main() -> int:
    """Decode all mutants and write results/mutants.csv."""
    rng = np.random.default_rng(0)
    counts: Counter[tuple[str, str, str]] = Counter()
    differs: Counter[tuple[str, str, str]] = Counter()
    bound_memory()
    with Isolated() as isolated:
        for name, data in originals():
            original = isolated.decode(data, WORKING_SIZE, Limits()).pixels
            assert original is not None
            for mutation, (mutate, times) in MUTATIONS.items():
                for _ in range(times):
                    photo = isolated.decode(mutate(data, rng), WORKING_SIZE, Limits())
                    key = name, mutation, status_of(photo)
                    counts[key] += 1
                    differs[key] += photo.pixels is not None and is_far(photo.pixels, original)
    rows = [
        {
            **dict(zip(("format", "mutation", "status"), key, strict=True)),
            "mutants": counts[key],
            "differs": differs[key] if key[2] == "ok" else "",
        }
        for key in sorted(counts)
    ]
    by_status: Counter[str] = Counter()
    for key, count in counts.items():
        by_status[key[2]] += count
    write_csv("mutants", rows)
    print(f"{sum(counts.values()):,} mutants, {sum(differs.values())} ok but different: {dict(by_status)}")
    return 1 if by_status["crash"] or by_status["hang"] else 0


if __name__ == "__main__":
    sys.exit(main())
