"""What a camera wrote beside the pixels: EXIF, read as untrusted data.

Any field that is absent or absurd is None; nothing here raises because of what a file holds.
"""

import datetime
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

_MAX_TEXT = 200
_SMALLEST = 1e-9  # no photo has a shorter exposure, nor a smaller f-number or lens
_EXIF_IFD = 0x8769
_MAKE, _MODEL, ORIENTATION = 0x010F, 0x0110, 0x0112
_EXPOSURE_TIME, _F_NUMBER, _FOCAL_LENGTH = 0x829A, 0x829D, 0x920A
# The first is 16 bits wide: 65535 there says that the value is in one of the others.
_ISO_TAGS = (0x8827, 0x8833, 0x8832, 0x8831)
_BODY_SERIAL, _LENS_MODEL, _LENS_SERIAL = 0xA431, 0xA434, 0xA435
# (time, its subseconds) as shot, else as digitised; never IFD0's DateTime, which editors rewrite.
_TIMES = ((0x9003, 0x9291), (0x9004, 0x9292))
_SUBJECT_AREA, _SUBJECT_LOCATION = 0x9214, 0xA214
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003

_TIMESTAMP = re.compile(r"([0-9]{4})[:/.-]([0-9]{2})[:/.-]([0-9]{2})[ T]([0-9]{2}):([0-9]{2}):([0-9]{2})")
# A point has no extent: it stands for a square of this part of the photo's short side.
_POINT_SIDE = 0.2

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Capture:
    """How a photo was taken; None where absent or absurd.

    ``captured_at`` is the camera's local time (naive, with subseconds), ``exposure_s`` in seconds,
    ``focal_mm`` in millimetres. ``subject_area`` is x0, y0, x1, y1 as fractions of the upright photo.
    """

    captured_at: datetime.datetime | None = None
    camera: str | None = None
    camera_serial: str | None = None
    lens: str | None = None
    lens_serial: str | None = None
    iso: int | None = None
    exposure_s: float | None = None
    f_number: float | None = None
    focal_mm: float | None = None
    subject_area: Box | None = None


def read_capture(exif: Image.Exif, width: int, height: int) -> Capture:
    """Read the fields of ``Capture``; ``width`` and ``height`` are the pixels as stored, before turning."""
    try:
        details: Mapping[int, Any] = exif.get_ifd(_EXIF_IFD)
    except Exception:
        # Pillow unpacks the whole block at once, and a damaged one can raise nearly anything.
        details = {}
    return Capture(
        captured_at=_captured_at(details),
        camera=_camera(_text(_get(exif, _MAKE)), _text(_get(exif, _MODEL))),
        camera_serial=_text(_get(details, _BODY_SERIAL)),
        lens=_text(_get(details, _LENS_MODEL)),
        lens_serial=_text(_get(details, _LENS_SERIAL)),
        iso=_iso(details),
        # The bounds are a day, the pinhole camera and the largest telescopes.
        exposure_s=_positive(_get(details, _EXPOSURE_TIME), 86_400.0),
        f_number=_positive(_get(details, _F_NUMBER), 1024.0),
        focal_mm=_positive(_get(details, _FOCAL_LENGTH), 100_000.0),
        subject_area=_subject_area(details, width, height, orientation(exif)),
    )


def orientation(exif: Image.Exif) -> int:
    """Return how the stored pixels are turned, 1 to 8 as in EXIF; 1 where absent or absurd."""
    value = _get(exif, ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _get(tags: Mapping[int, Any], tag: int) -> Any:
    """Return a tag's value, None where absent or undecodable: Pillow decodes a value when asked for it."""
    try:
        return tags.get(tag)
    except Exception:  # whatever a damaged value makes the decoder raise, the field is not there
        return None


def _text(value: Any) -> str | None:
    """Return one clean line: up to the first NUL, without control characters, cut at 200 characters."""
    if isinstance(value, str):
        # Pillow reads text as Latin-1, many phones write UTF-8.
        value = value.encode("latin-1", "replace")
    if not isinstance(value, bytes):
        return None
    raw = value.split(b"\0", 1)[0]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    # Categories C*: controls, and the invisible characters that turn the direction of text.
    kept = "".join(c for c in text if c.isspace() or not unicodedata.category(c).startswith("C"))
    return " ".join(kept.split())[:_MAX_TEXT].rstrip() or None


def _number(value: Any) -> float | None:
    """Return a finite number, the first of several; None for anything else, a zero denominator included."""
    if isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, (str, bytes, bool)) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any, largest: float) -> float | None:
    number = _number(value)
    return number if number is not None and _SMALLEST <= number <= largest else None


def _iso(tags: Mapping[int, Any]) -> int | None:
    values = [_number(_get(tags, tag)) for tag in _ISO_TAGS]
    usable = [int(v) for v in values if v is not None and 1 <= v < 2**31]
    return next((v for v in usable if v != 65_535), usable[0] if usable else None)


def _camera(make: str | None, model: str | None) -> str | None:
    if make is None or model is None:
        return model or make
    # "NIKON CORPORATION" and "NIKON D90" is one name, "NIKON D90".
    if model.lower().startswith(make.lower().split()[0]):
        return model
    return f"{make} {model}"[:_MAX_TEXT].rstrip()


def _captured_at(tags: Mapping[int, Any]) -> datetime.datetime | None:
    for time_tag, subsecond_tag in _TIMES:
        match = _TIMESTAMP.fullmatch(_text(_get(tags, time_tag)) or "")
        if match is None:
            continue
        try:
            taken = datetime.datetime(*(int(part) for part in match.groups()))  # type: ignore[arg-type]
        except ValueError:  # 0000:00:00, the 31st of February
            continue
        if taken.year < 1800:  # older than photography
            continue
        fraction = _text(_get(tags, subsecond_tag)) or ""
        if fraction.isascii() and fraction.isdigit():
            taken = taken.replace(microsecond=int(fraction[:6].ljust(6, "0")))
        return taken
    return None


def _subject_area(tags: Mapping[int, Any], width: int, height: int, turned: int) -> Box | None:
    values = _numbers(_get(tags, _SUBJECT_AREA), (2, 3, 4)) or _numbers(_get(tags, _SUBJECT_LOCATION), (2,))
    if values is None or width < 1 or height < 1:
        return None
    # The area is in the camera's pixels; a photo made smaller later still names the camera's size.
    shot_width, shot_height = _number(_get(tags, _PIXEL_WIDTH)), _number(_get(tags, _PIXEL_HEIGHT))
    if shot_width and shot_height and abs(shot_width * height / (shot_height * width) - 1) < 0.01:
        whole_width, whole_height = shot_width, shot_height
    else:
        whole_width, whole_height = float(width), float(height)
    x, y = values[:2]
    if len(values) == 2:
        if x == y == 0:  # a field left unset
            return None
        box_width = box_height = _POINT_SIDE * min(whole_width, whole_height)
    else:
        # Three values are a circle and its diameter, four a centre and a size.
        box_width, box_height = values[2], values[-1]
    if not (0 <= x <= whole_width and 0 <= y <= whole_height):
        return None
    if not (0 < box_width <= whole_width and 0 < box_height <= whole_height):
        return None
    corners = [
        _upright(
            _clip((x + side * box_width / 2) / whole_width),
            _clip((y + side * box_height / 2) / whole_height),
            turned,
        )
        for side in (-1, 1)
    ]
    (xa, ya), (xb, yb) = corners
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def _numbers(value: Any, counts: tuple[int, ...]) -> tuple[float, ...] | None:
    if not isinstance(value, tuple) or len(value) not in counts:
        return None
    numbers = tuple(n for n in map(_number, value) if n is not None)
    return numbers if len(numbers) == len(value) else None


def _clip(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))


def _upright(u: float, v: float, turned: int) -> tuple[float, float]:
    """Move a point of the stored picture, as fractions, to where it lies in the upright one."""
    return {
        1: (u, v),
        2: (1 - u, v),
        3: (1 - u, 1 - v),
        4: (u, 1 - v),
        5: (v, u),
        6: (1 - v, u),
        7: (1 - v, 1 - u),
        8: (v, 1 - u),
    }[turned]
