"""What a TIFF's directory says of its pixels before any is decoded: what they take, where they end."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageFile, TiffImagePlugin

from bdnet.exif import ORIENTATION

BITS, PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0
_WIDTH, _HEIGHT, _NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 256, 257, 254, 330, 50706
_COLOUR_FILTER_ARRAY = 32803
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT = 278, 322, 323
_EXIF_DIRECTORIES = (34665, 34853)
# Where the pixel data starts and how many bytes it has, as strips or as tiles.
_DATA_TAGS = ((273, 279), (324, 325))
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
# Pillow makes an object of each value of a tag but for bytes and text, so they are counted first. 60,000 rows
# of three colours, each a strip of its own, are fewer.
_MOST_TAGS, _MOST_VALUES, _BYTES_OR_TEXT = 65_535, 200_000, (1, 2, 7)
# Of a pixel of a strip or tile, which libtiff decodes whole.
_STRIP_BYTES = 8
# Of a pixel of a picture that Pillow turns at full size, on top.
_TURNED_BYTES = 4


class TiffFile(TiffImagePlugin.TiffImageFile):
    """Without Pillow's own bound on pixels, which a TIFF alone meets again when it is loaded."""

    def load_prepare(self) -> None:
        """Make room for the pixels."""
        if self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)
        super().load_prepare()


def tags_fault(data: bytes) -> str | None:
    """Say why a TIFF can't even be opened: its first directory, or its EXIF's, has too many values."""
    first = _directory(data)
    starts = {tag: value for tag, _, _, value in first.tags if tag in _EXIF_DIRECTORIES}
    for directory in (first, *(_directory(data, start) for start in starts.values())):
        if len(directory.tags) > _MOST_TAGS:
            return f"a directory of it has more than {_MOST_TAGS:,} tags"
        for tag, kind, count, _ in directory.tags:
            if kind not in _BYTES_OR_TEXT and count > _MOST_VALUES:
                return f"its tag {tag} has {count:,} values; the limit is {_MOST_VALUES:,}"
    return None


def stored_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Return (width, height) before turning; Pillow gives the size as it will be after."""
    return image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]


@dataclass(frozen=True)
class Strips:
    """How the pixels lie: a status and its reason where they are not a photo's, and the bytes that decoding
    takes beside the picture, for a strip or tile that is decoded whole and for a copy that is turned."""

    fault: tuple[str, str] | None = None
    beside: int = 0


def examine(image: TiffImagePlugin.TiffImageFile) -> Strips:
    """Find raw files and parts of pictures, and what decoding takes."""
    tags = image.tag_v2
    # A raw file's first picture is a thumbnail; its verdict would be given to the photo.
    preview = tags.get(_NEW_SUBFILE_TYPE, 0) == 1 and _SUB_IFDS in tags
    if preview or _DNG_VERSION in tags or tags.get(PHOTOMETRIC) == _COLOUR_FILTER_ARRAY:
        return Strips(("unsupported", "a camera's raw file; export it as JPEG or TIFF"))
    width, height = stored_size(image)
    extents = [tile.extents for tile in image.tile if tile.extents is not None]
    if (max(e[2] for e in extents), max(e[3] for e in extents)) != (width, height):
        shown = f"{image.width}×{image.height}"
        return Strips(("unreadable", f"pixel data for a part only of {shown} pixels"))
    turned = width * height * _TURNED_BYTES if tags.get(ORIENTATION, 1) != 1 else 0
    if image.tile[0].codec_name != "libtiff":  # Pillow itself reads by the row
        return Strips(beside=turned)
    columns, rows = tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)
    if not (isinstance(columns, int) and isinstance(rows, int)):
        strip = tags.get(_ROWS_PER_STRIP)
        columns, rows = width, min(height, strip) if isinstance(strip, int) else height
    return Strips(beside=columns * rows * _STRIP_BYTES + turned)


def ends_early(data: bytes, image: ImageFile.ImageFile | None) -> bool:
    """Whether a file that can't be decoded is shorter than it says; ``image`` is None if it didn't open."""
    if data[2:4] in (b"*\0", b"\0*"):
        directory = _directory(data)
        sizes = [(count * _TYPE_SIZES.get(kind, 0), offset) for _, kind, count, offset in directory.tags]
        # Values of at most 4 bytes lie in the directory itself.
        if max([directory.end, *(offset + size for size, offset in sizes if size > 4)]) > len(data):
            return True
    return isinstance(image, TiffImagePlugin.TiffImageFile) and _pixels_end(image) > len(data)


@dataclass(frozen=True)
class _Directory:
    """A directory of tags: where it ends, and of each tag its number, type, count and value or offset."""

    end: int
    tags: list[tuple[int, int, int, int]]


def _directory(data: bytes, start: int | None = None) -> _Directory:
    """Read the directory at ``start``, or the first one, as far as the file goes; of a BigTIFF too."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    big = b"+" in data[2:4]
    # Bytes of an offset, of the number of tags, and of a tag.
    offset, number, tag = (8, 8, 20) if big else (4, 2, 12)

    def whole(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    if start is None:
        start = whole(8 if big else 4, offset)
    first = start + number
    end = first + tag * whole(start, number)
    return _Directory(
        end,
        [
            (whole(at, 2), whole(at + 2, 2), whole(at + 4, offset), whole(at + 4 + offset, offset))
            for at in range(first, min(end, len(data)), tag)[: _MOST_TAGS + 1]
        ],
    )


def _pixels_end(image: TiffImagePlugin.TiffImageFile) -> int:
    ends = [0]
    for starts, sizes in ((image.tag_v2.get(a), image.tag_v2.get(b)) for a, b in _DATA_TAGS):
        if isinstance(starts, tuple) and isinstance(sizes, tuple):
            pairs = zip(starts, sizes, strict=False)
            ends += [
                start + size for start, size in pairs if isinstance(start, int) and isinstance(size, int)
            ]
    return max(ends)
