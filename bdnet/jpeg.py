"""Whether a JPEG holds all of its picture: libjpeg paints over what is missing, and Pillow doesn't tell.

Found without decoding: pixel data that another marker breaks off (an end marker too early, a run of 0xFF,
random bytes, another file's header), a tail of zeros, restart markers that are missing, scans of a
progressive photo that are missing. Together with ``PixelData``, which never shows libjpeg an end marker, a
photo in one scan is ok only if its very last block came from data.

Not found, for a JPEG has no checksums: damage that decodes to about as many blocks as there were (flipped
bits, short runs), and damage inside a progressive scan that leaves its markers intact.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import JpegImagePlugin

# In pixel data 0xFF is followed by zero (a stuffed byte), itself (filling) or a restart marker; whatever
# else follows is the next marker, for libjpeg too.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EOI, _SOS, _DRI = 0xD9, 0xDA, 0xDD
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_SEQUENTIAL = (0xC0, 0xC1)
# What may stand between scans: tables, the number of lines, restarts, comments, application data.
_BETWEEN_SCANS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, _DRI, 0xFE, *range(0xE0, 0xF0)})
_TOLERATED_EXCESS = 1024
_ALL_BITS = 16

_BROKEN_OFF = "the pixel data breaks off before its end"
_LOST_RESTARTS = "a part of the pixel data is lost: restart markers are missing"
_LOST_SCANS = "scans are missing: the picture lacks its detail"


@dataclass(frozen=True)
class Scans:
    """What a JPEG's markers say of its pixel data, which ends at byte ``end``.

    ``at_once``: all is in one scan, which is decoded as it is read; else libjpeg holds every coefficient
    in memory. ``fault`` says why the picture is not all there, None where the markers don't show that.
    """

    at_once: bool
    end: int
    fault: str | None


class PixelData(io.BytesIO):
    """A JPEG up to the end of its only scan, for Pillow to read.

    libjpeg invents the rest of a picture only when it meets a marker; out of bytes, it says so. It reads a
    few bytes ahead of the last block, so ones follow: they stand for no Huffman code.
    """

    def __init__(self, data: bytes, end: int) -> None:
        super().__init__(data)
        self._end = end
        self._padding = b"\xff\x00" * 8

    def read(self, size: int | None = -1) -> bytes:
        """Read up to ``size`` bytes; the last ones come by themselves, so that it shows who left them."""
        left = self._end - self.tell()
        if left <= 0:
            padding, self._padding = self._padding, b""
            return padding
        if left > _TOLERATED_EXCESS:
            left -= _TOLERATED_EXCESS
        return super().read(left if size is None or size < 0 else min(left, size))

    def has_excess(self) -> bool:
        """Whether the picture was complete so early that data before its end is lost or foreign."""
        return self._end - self.tell() >= _TOLERATED_EXCESS


def examine(image: JpegImagePlugin.JpegImageFile, data: bytes) -> Scans:
    """Read the markers of a JPEG as Pillow opened it, before any ``draft``."""
    frame = interval = 0
    # Of each component's coefficients: how many low bits are still to come.
    missing = {component: [_ALL_BITS] * 64 for component, *_ in image.layer}
    scan: tuple[list[int], int] | None = None  # its components, where its data starts
    seen_scan = at_once = lost = ended = False
    end = len(data)
    for code, start, stop in _markers(data):
        if scan is not None:
            components, began = scan
            if interval:
                restarts = sum(1 for _ in _RESTART.finditer(data, began, start))
                # One more, behind the last block, does no harm.
                lost |= restarts - (_units(image, components) - 1) // interval not in (0, 1)
            scan = None
            if at_once:  # whatever marker this is
                end, ended = start - 2, True
                break
        if code == _EOI:
            ended = True
            break
        if code == _SOS and stop <= len(data):
            scan = _note_scan(data[start + 2 : stop], missing), stop
            at_once = not seen_scan and frame in _HUFFMAN_SEQUENTIAL and len(scan[0]) == len(image.layer)
            seen_scan = True
        elif code == _DRI:
            interval = int.from_bytes(data[start + 2 : start + 4], "big")
        elif code in _FRAMES and not seen_scan:
            frame = frame or code
        elif seen_scan and code not in _BETWEEN_SCANS:
            break
    if not ended:
        return Scans(at_once, end, _BROKEN_OFF)
    if not at_once and any(any(bits) for bits in missing.values()):
        return Scans(at_once, end, _LOST_SCANS)
    return Scans(at_once, end, _LOST_RESTARTS if lost else None)


def _markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each marker's code, where it is followed by its segment, and where that ends."""
    at = 2
    while marker := _MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        stop = at if code in (0x01, 0xD8, _EOI) else at + int.from_bytes(data[at : at + 2], "big")
        yield code, at, stop
        at = max(at, stop)


def _note_scan(header: bytes, missing: dict[int, list[int]]) -> list[int]:
    """Lower ``missing`` by what this scan brings; return its components."""
    components = list(header[1 : 1 + 2 * header[0] : 2]) if header else []
    spectral = header[1 + 2 * len(components) :]
    if len(spectral) >= 3:
        first, last, low = spectral[0], spectral[1], spectral[2] & 15
        for component in components:
            for k in range(first, min(last, 63) + 1):
                if component in missing:
                    missing[component][k] = low
    return components


def _units(image: JpegImagePlugin.JpegImageFile, components: list[int]) -> int:
    """Return how many units (MCUs) a scan of these components has."""
    width, height = image.size
    sampling = {component: (h, v) for component, h, v, *_ in image.layer}
    h_max = max(1, *(h for h, _ in sampling.values()))
    v_max = max(1, *(v for _, v in sampling.values()))
    if len(components) == 1:  # not interleaved: just the blocks of its own plane
        h, v = sampling.get(components[0], (1, 1))
        return -(-width * h // h_max // 8) * -(-height * v // v_max // 8)
    return -(-width // (8 * h_max)) * -(-height // (8 * v_max))
