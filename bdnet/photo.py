"""The one decoder: a photo's bytes become upright uint8 RGB, or a status that says why not.

Decided here, and part of ``decoder_version``: colour profiles are not applied; transparent parts are
shown on white; the first frame stands for an animation; a JPEG is read at the smallest DCT scale that
is still large enough, then resized like every other format, bicubic with antialiasing.

A photo is ok only if all its pixels are there, as far as its format lets that be known: PNG has checksums,
``bdnet.jpeg`` says what a JPEG tells, a cut or filled tail is found in WebP and HEIC, a cut one in TIFF and
BMP. Not found: bits flipped or sectors lost inside in WebP, HEIC, BMP and most TIFF, and a filled tail of an
uncompressed one, which may be a black border. ``python -m benchmarks.mutants`` counts what gets through.

The threads of a process together decode within ``Limits.max_memory``, whatever the photos are.
"""

import contextlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from bdnet import jpeg, tiff
from bdnet.exif import ORIENTATION, Capture, orientation, read_capture
from bdnet.memory import MemoryBudget

try:
    import pillow_heif  # an extra: pip install '.[heic]'
except ImportError:
    pillow_heif = None  # type: ignore[assignment]

_DECODER_VERSION = "4"  # raise it when the pixels or the status of any photo change

_MOST_EXIF_BYTES = 2**20
# The only text chunks of a PNG that Pillow reads facts from: its EXIF and its XMP.
_PNG_FACTS = ("Raw profile type exif", "XML:com.adobe.xmp")


class _Png(PngImagePlugin.PngImageFile):
    """Without other texts beside the facts: Pillow would take one named "interlace" for how pixels lie."""

    def _open(self) -> None:
        super()._open()
        self._drop_texts()

    def load_end(self) -> None:
        super().load_end()
        self._drop_texts()

    def _drop_texts(self) -> None:
        for name in [name for name, value in self.info.items() if isinstance(value, str)]:
            if name not in _PNG_FACTS:
                del self.info[name]


# The plugins are called by name, not through Image.open: nothing else (EPS runs Ghostscript) can be
# reached, and Pillow's own bound, which would refuse an honest panorama, needs no change for the whole
# process. An MPO is a JPEG whose first picture is the photo.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": _Png,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": tiff.TiffFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
}
if pillow_heif is not None:
    _OPENERS["heic"] = pillow_heif.HeifImageFile
    pillow_heif.options.DECODE_THREADS = 1  # photos are decoded in parallel as it is

_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"IIU\0", "camera raw"),
    (b"IIRO", "camera raw"),
    (b"IIRS", "camera raw"),
    (b"MMOR", "camera raw"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"FOVb", "camera raw"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\0\x0cjP  ", "jpeg 2000"),
    (b"\xff\x4f\xff\x51", "jpeg 2000"),
    (b"\0\0\0\x0cJXL ", "jpeg xl"),
    (b"\xff\x0a", "jpeg xl"),
    (b"8BPS", "psd"),
    (b"%PDF-", "pdf"),
    (b"%!PS", "postscript"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"\0\0\x01\xba", "video"),
    (b"PK\x03\x04", "zip"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SECTOR = 512
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow reports some damage through logging; without a handler Python prints that on stderr. (What libtiff
# itself writes there about a damaged compressed TIFF can't be silenced through Pillow.)
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Limits:
    """What the decoder accepts, checked on the header before any pixel is decoded.

    ``max_bytes`` and ``max_pixels`` bound the photo as it is stored, ``max_memory`` the bytes that decoding
    it takes at its peak, beside the file itself: hardly any for a JPEG that is read at a reduced scale.
    """

    max_bytes: int = 512 * 2**20
    max_pixels: int = 400_000_000
    max_memory: int = 1536 * 2**20


# What all threads of this process may take together. ``python -m benchmarks.decode_memory`` measures what
# ``_BYTES_PER_PIXEL`` promises, but for HEIC: its share is a guess, about twice what a plain one takes.
_MEMORY = MemoryBudget(Limits().max_memory)
# Pillow's own blocks of 16 MiB stay with the thread that freed them, as glibc sees it, and with eight
# threads that doubles the bound. Blocks of this size always go back to the system.
Image.core.set_block_size(64 * 2**20)
_SAMPLED_PIXELS = 2**20
# At the peak, by the mode that Pillow decodes to: the picture, its copy in another mode, and a little for
# the reduced one.
_BYTES_PER_PIXEL = {"L": 2, "RGB": 5, "CMYK": 5, "P": 6, "1": 6, "I": 14, "F": 14}
_OTHER_MODES, _TRANSPARENT, _WEBP, _HEIC = 9, 13, 17, 17
# Of a pixel of the result: reduced, turned, and brought out of Pillow.
_RESULT_BYTES = 14
# Of a row or column, beside its pixels: Pillow's pointers to rows, and the weights by which it is reduced.
_SIDE_BYTES = 48
# A header can claim a larger side, which is no photo's and fits no column of the table.
_LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True, eq=False)  # arrays have no single equality
class Photo:
    """A decoded photo, or why there is none.

    ``status`` is ok, truncated, unreadable, unsupported, too_large or empty, or timeout where the process
    that decoded was killed (``pipeline.decoding``); ``error`` one line, None when ok. ``pixels`` is uint8
    (H, W, 3) RGB, upright and contiguous, None unless ok. ``width`` and ``height`` are the whole photo's,
    upright; they, ``format`` (lower case) and ``capture`` hold what was read before a failure.
    """

    status: str
    error: str | None = None
    pixels: np.ndarray | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    capture: Capture = field(default_factory=Capture)


def decoder_version() -> str:
    """Part of the audit digest: where it is the same, photos get the same pixels and statuses."""
    return _DECODER_VERSION if "heic" in _OPENERS else f"{_DECODER_VERSION} without HEIC"


class _RefusedError(Exception):
    """A status and its reason, found by a check of our own."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def size_at(width: int, height: int, working_size: int | None) -> tuple[int, int]:
    """Return the (width, height) that a photo of this size has at ``working_size``; never larger."""
    if working_size is None or max(width, height) <= working_size:
        return width, height
    scale = working_size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def decode(data: bytes, working_size: int | None = 640, limits: Limits = Limits()) -> Photo:
    """Decode one photo; whatever the bytes are, the answer is a ``Photo``.

    The long side becomes at most ``working_size`` pixels (None: as it is); nothing is enlarged. Raises
    ValueError for a ``working_size`` below 1.
    """
    if working_size is not None and working_size < 1:
        raise ValueError(f"working size is {working_size}: give at least 1, or None for the photo's own size")
    if not data:
        return Photo("empty", "the file is empty")
    if len(data) > limits.max_bytes:
        return Photo("too_large", f"{len(data):,} bytes; the limit is {limits.max_bytes:,}")
    kind = _recognise(data)
    if kind is None:
        return Photo("unreadable", "not a picture: the content is of no known type")
    if kind not in _OPENERS:
        return Photo("unsupported", f"{kind} is not a photo format that can be read", format=kind)

    # Once more at each call, since anyone may reset the filters; unlike catch_warnings this is safe with
    # threads, and a filter that is already there is only moved.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    image: ImageFile.ImageFile | None = None
    width = height = None
    capture = Capture()
    try:
        if kind == "tiff" and (fault := tiff.tags_fault(data)) is not None:
            raise _RefusedError("too_large", fault)
        image = _OPENERS[kind](io.BytesIO(data))
        stored = width, height = _stored_size(image)
        # A PNG's EXIF may follow the pixels: unless it was seen, asking for it decodes them.
        early = kind != "png" or "exif" in image.info
        if early:
            turn, (width, height), capture = _taken(image, stored)
        box, memory = _prepare(image, kind, data, working_size, limits)
        with _MEMORY.reserve(memory):
            if not early:
                turn, (width, height), capture = _taken(image, stored)
            if kind in ("tiff", "heic"):  # Pillow turns these as it loads
                stored, turn = (width, height), 1
            pixels = _pixels(image, size_at(*stored, working_size), box, turn)
    except Exception as error:
        # Decoders of damaged data raise nearly anything, MemoryError and RecursionError included; all of
        # it is the photo's status, and the reason stays with the photo.
        status = _status(error, kind, data, image)
        if max(width or 0, height or 0) > _LARGEST_SIDE:
            width = height = None
        return Photo(status, _one_line(error), None, kind, width, height, capture)
    return Photo("ok", None, pixels, kind, width, height, capture)


def _recognise(data: bytes) -> str | None:
    """Name the type of a file by its first bytes; None where it looks like nothing known."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return "camera raw" if kind == "tiff" and data[8:10] == b"CR" else kind
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "video"}.get(data[8:12])
    if data[4:8] in (b"ftyp", b"moov", b"mdat"):
        brand = data[8:12]
        if brand in _HEIF_BRANDS:
            return "heic"
        return {b"avif": "avif", b"avis": "avif", b"crx ": "camera raw"}.get(brand, "video")
    # Two letters alone would take any text that starts with BM.
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return "bmp"
    head = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "html"
    if head.startswith(b"<") and b"<svg" in head:
        return "svg"
    return None


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return (width, height) before turning: of TIFF and HEIC Pillow gives the size as it will be after."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return tiff.stored_size(image)
    width, height = image.size
    return (height, width) if (image.info.get("original_orientation") or 1) >= 5 else (width, height)


def _prepare(
    image: ImageFile.ImageFile, kind: str, data: bytes, working_size: int | None, limits: Limits
) -> tuple[tuple[float, float, float, float] | None, int]:
    """Refuse by the header what must not be decoded; choose a JPEG's scale.

    Returns the part of the reduced JPEG that the photo covers (its last column can be a partial one),
    None where nothing is reduced; and the bytes of memory that decoding takes at its peak.
    """
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _RefusedError("too_large", f"{width}×{height} pixels; the limit is {limits.max_pixels:,}")
    box, fault, beside = None, None, 0
    target = size_at(width, height, working_size)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        # libjpeg paints grey over what is missing before an end marker. A block of 8×8 takes a bit or more.
        if len(data) * 8 < width * height // 64:
            fault = "truncated", f"{len(data):,} bytes can't hold {width}×{height} pixels"
        scans = jpeg.examine(image, data)
        if scans.fault is not None:
            fault = fault or ("truncated", scans.fault)
        if scans.at_once:
            image.fp = jpeg.PixelData(data, scans.end)
        else:
            beside = _coefficient_bytes(image)
        reduced = image.draft(None, target) if target != (width, height) else None
        if reduced is not None:
            box = reduced[1]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        strips = tiff.examine(image)
        if strips.fault is not None:
            raise _RefusedError(*strips.fault)
        beside = strips.beside
    memory = image.width * image.height * _bytes_per_pixel(image, kind) + beside
    memory += (image.width + image.height) * _SIDE_BYTES
    memory += target[0] * target[1] * _RESULT_BYTES
    if memory > limits.max_memory:
        raise _RefusedError(
            "too_large",
            f"decoding {width}×{height} pixels of this {kind} takes {memory / 2**20:,.0f} MiB of memory; "
            f"the limit is {limits.max_memory / 2**20:,.0f}",
        )
    if kind == "png":
        fault = _png_fault(data)
    if kind in ("webp", "heic") and _ends_in_filling(data, kind, width * height):
        fault = "truncated", "the pixel data ends in filling"
    if fault is not None:
        raise _RefusedError(*fault)
    return box, memory


def _bytes_per_pixel(image: ImageFile.ImageFile, kind: str) -> int:
    """Return what a pixel takes at the peak of decoding, reducing included."""
    if kind in ("webp", "heic"):
        return _WEBP if kind == "webp" else _HEIC
    if image.has_transparency_data:
        return _TRANSPARENT
    return _BYTES_PER_PIXEL.get(image.mode, _OTHER_MODES)


def _coefficient_bytes(image: JpegImagePlugin.JpegImageFile) -> int:
    """Return what libjpeg holds of a JPEG of several scans, whatever the scale: two bytes a coefficient."""
    largest = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
    return 2 * image.width * image.height * sum(h * v for _, h, v, _ in image.layer) // max(1, largest)


def _png_fault(data: bytes) -> tuple[str, str] | None:
    """Check what Pillow leaves out: that the pixel data has its checksums and the file its end."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if name == b"IEND":
            return None
        if name == b"IDAT" and zlib.crc32(view[at + 4 : end - 4]).to_bytes(4, "big") != view[end - 4 : end]:
            return "unreadable", "damaged pixel data: a checksum is wrong"
        at = end
    return "truncated", "the file ends before its last chunk"


def _ends_in_filling(data: bytes, kind: str, pixels: int) -> bool:
    """Whether the compressed pixels end in sectors of one value: what a disk or a download lost."""
    ends: Iterable[int] = (len(data),)
    if kind == "webp":
        named = (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")
        ends = (end for name, end in _riff_chunks(data) if name in named and end <= len(data))
    # Of one colour alone, a whole WebP is hardly more than zeros: a byte for 10,000 pixels.
    run = max(_SECTOR, pixels // 1024)
    fillings = (bytes(run), b"\xff" * run)
    # A file may have as many chunks as it likes: none is copied.
    return any(data.endswith(filling, max(0, end - run), end) for end in ends for filling in fillings)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the name of each chunk of a WebP and where it ends."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        at += 8 + length
        yield name, at
        at += length % 2


def _taken(image: ImageFile.ImageFile, stored: tuple[int, int]) -> tuple[int, tuple[int, int], Capture]:
    """Return how the photo is turned, its upright (width, height), and what the camera wrote."""
    exif = Image.Exif()
    written = image.info.get("exif") or image.info.get(_PNG_FACTS[0]) or b""
    if len(written) <= _MOST_EXIF_BYTES:
        with contextlib.suppress(Exception):  # a photo with damaged metadata is still a photo
            exif = image.getexif()
    if turned := image.info.get("original_orientation"):  # HEIC: turned by its decoder, and 1 from then on
        exif[ORIENTATION] = turned
    turn = orientation(exif)
    return turn, (stored[::-1] if turn >= 5 else stored), read_capture(exif, *stored)


def _pixels(
    image: ImageFile.ImageFile,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None,
    turn: int,
) -> np.ndarray:
    stream = image.fp
    image.load()
    if isinstance(stream, jpeg.PixelData) and stream.has_excess():
        raise _RefusedError("unreadable", "there is more pixel data than picture: a part is lost or foreign")
    plain = _plain(image)
    if plain.size != size:
        plain = plain.resize(size, Image.Resampling.BICUBIC, box=box)
    if plain.mode == "RGBA":
        white = Image.new("RGB", plain.size, "white")
        white.paste(plain, mask=plain.getchannel("A"))
        plain = white
    if plain.mode != "RGB":
        plain = plain.convert("RGB")
    if turn in _TURNS:
        plain = plain.transpose(_TURNS[turn])
    return np.array(plain)


def _plain(image: Image.Image) -> Image.Image:
    """Bring any mode to L, RGB, CMYK or RGBA: modes whose pixels can be averaged."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode.startswith("I;16"):
        bits = tags[tiff.BITS][0] if tiff.BITS in tags else 16
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - grey if tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO else grey)
    if image.mode in ("I", "F"):
        # Nothing says what white is: the smallest usual white that holds the brightest pixels. A hundredth
        # of them may be brighter where they are fractions: sharpening goes beyond white.
        values = np.array(image, dtype=np.float32)  # from here on in place: it can be large
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        some = values.ravel()[:: max(1, values.size // _SAMPLED_PIXELS)]
        brightest = float(values.max())
        bright = float(np.quantile(some, 0.99)) if image.mode == "F" else brightest
        white = next((usual for usual in (1.0, 255.0, 65_535.0) if bright <= usual), brightest)
        values.clip(0, white, out=values)
        values *= 255 / white
        return Image.fromarray(values.round(out=values).astype(np.uint8))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, to_rgb)
        assert converted is not None
        return converted
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


_UNSUPPORTED_WORDS = (
    "unsupported",
    "not yet supported",
    "cannot handle",
    "unknown pixel mode",
    "unknown data",
)


def _status(error: Exception, kind: str, data: bytes, image: ImageFile.ImageFile | None) -> str:
    """Name what went wrong; Pillow tells its reasons apart by their words alone."""
    if isinstance(error, _RefusedError):
        return error.status
    if isinstance(error, (MemoryError, Image.DecompressionBombError)):
        return "too_large"
    words = str(error).lower()
    if "truncated" in words or _ends_early(kind, data, image):
        return "truncated"
    return "unsupported" if any(w in words for w in _UNSUPPORTED_WORDS) else "unreadable"


def _ends_early(kind: str, data: bytes, image: ImageFile.ImageFile | None) -> bool:
    """Whether a file that can't be decoded is shorter than it says it is."""
    if kind == "jpeg":
        return b"\xff\xd9" not in data[-64:]
    if kind == "gif":
        return not data.endswith(b";")
    if kind == "webp":
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    if kind == "bmp":
        return int.from_bytes(data[2:6], "little") > len(data)
    if kind == "tiff":
        return tiff.ends_early(data, image)
    if kind == "heic":
        return _boxes_end(data) > len(data)
    fault = _png_fault(data)
    return fault is not None and fault[0] == "truncated"


def _boxes_end(data: bytes) -> int:
    """Return where the outermost boxes of an ISO media file end, as far as they follow each other."""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length < 8:  # 0: up to the end of the file
            return len(data)
        at += length
    return at


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "".join(c for c in text if c.isprintable())[:200] or type(error).__name__
