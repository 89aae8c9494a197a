"""EXIF is other people's data: what is sound is read, what is absurd is None, nothing raises."""

import datetime
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from bdnet.exif import Capture, orientation, read_capture


def exif_with(details: dict, main: dict | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif.update(main or {})
    exif.get_ifd(0x8769).update(details)
    return exif


def read(details: dict, main: dict | None = None) -> Capture:
    return read_capture(exif_with(details, main), 400, 300)


def test_a_sound_block_is_read_whole_after_a_trip_through_a_file():
    exif = exif_with(
        {
            0x9003: "2024:02:29 13:14:15",
            0x9291: "07",
            0xA431: "0123",
            0xA434: "RF50mm F1.2 L USM",
            0xA435: "99",
            0x8827: 400,
            0x829A: IFDRational(1, 250),
            0x829D: IFDRational(28, 10),
            0x920A: IFDRational(50, 1),
            0x9214: (200, 150, 100, 60),
        },
        {0x010F: "Canon", 0x0110: "Canon EOS R5", 0x0112: 1},
    )
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300)).save(buffer, "JPEG", exif=exif)
    with Image.open(buffer) as image:
        capture = read_capture(image.getexif(), *image.size)
    assert capture == Capture(
        captured_at=datetime.datetime(2024, 2, 29, 13, 14, 15, 70_000),
        camera="Canon EOS R5",
        camera_serial="0123",
        lens="RF50mm F1.2 L USM",
        lens_serial="99",
        iso=400,
        exposure_s=pytest.approx(1 / 250),
        f_number=pytest.approx(2.8),
        focal_mm=50.0,
        subject_area=pytest.approx((0.375, 0.4, 0.625, 0.6)),
    )


def test_no_exif_is_all_none_and_upright():
    assert read_capture(Image.Exif(), 400, 300) == Capture()
    assert orientation(Image.Exif()) == 1


@pytest.mark.parametrize("value", [0, 9, -1, 65_536, "6", b"\6", (6, 6), 6.0, None, IFDRational(1, 0)])
def test_an_absurd_orientation_is_upright(value):
    assert orientation(exif_with({}, {0x0112: value})) == 1


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("SONY", "ILCE-7M4", "SONY ILCE-7M4"),
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("Apple", None, "Apple"),
        (None, "Pixel 8", "Pixel 8"),
        ("\0\0\0", "\0", None),
        (5, (1, 2), None),
    ],
)
def test_the_make_is_not_repeated(make, model, camera):
    main = {tag: value for tag, value in ((0x010F, make), (0x0110, model)) if value is not None}
    assert read({}, main).camera == camera


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("50mm\0\0\0\0", "50mm"),
        ("50mm\0left over", "50mm"),
        ("  a\r\n\tb\x1b[31m ", "a b[31m"),
        (b"raw bytes", "raw bytes"),
        ("Objektiv für".encode().decode("latin-1"), "Objektiv für"),
        (b"f\xfcr", "für"),
        ("abc\u202egpj".encode(), "abcgpj"),
        ("x" * 5000, "x" * 200),
        ("   ", None),
        (17, None),
    ],
)
def test_text_becomes_one_clean_short_line(value, text):
    assert read({0xA434: value}).lens == text


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({0x9003: "2024:01:02 03:04:05"}, datetime.datetime(2024, 1, 2, 3, 4, 5)),
        (
            {0x9003: "2024-01-02T03:04:05", 0x9291: "123456789"},
            datetime.datetime(2024, 1, 2, 3, 4, 5, 123456),
        ),
        ({0x9003: "2024:01:02 03:04:05", 0x9291: "no"}, datetime.datetime(2024, 1, 2, 3, 4, 5)),
        (
            {0x9003: "0000:00:00 00:00:00", 0x9291: "9", 0x9004: "2024:01:02 03:04:05"},
            datetime.datetime(2024, 1, 2, 3, 4, 5),
        ),
        ({0x9003: "2023:02:29 00:00:00"}, None),
        ({0x9003: "0001:01:01 00:00:00"}, None),
        ({0x9003: "2024:01:02 03:04:60"}, None),
        ({0x9003: "    :  :     :  :  "}, None),
        ({0x9003: 20240102}, None),
    ],
)
def test_the_time_is_as_shot_with_subseconds_or_none(details, expected):
    assert read(details).captured_at == expected


@pytest.mark.parametrize(
    ("details", "iso"),
    [
        ({0x8827: 100}, 100),
        ({0x8827: (200, 0)}, 200),
        ({0x8827: 65_535, 0x8832: 102_400}, 102_400),
        ({0x8827: 65_535}, 65_535),
        ({0x8827: 0}, None),
        ({0x8827: 2**31}, None),
        ({0x8827: 10**400}, None),
        ({0x8827: "100"}, None),
        ({0x8827: ()}, None),
    ],
)
def test_iso_fits_its_column_or_is_none(details, iso):
    assert read(details).iso == iso


@pytest.mark.parametrize(
    "value",
    [
        IFDRational(1, 0),
        IFDRational(0, 0),
        0,
        -1,
        float("nan"),
        float("inf"),
        10**400,
        4e9,
        5e-324,
        "1/60",
        (),
        b"1",
    ],
)
def test_an_absurd_exposure_aperture_or_focal_length_is_none(value):
    capture = read({0x829A: value, 0x829D: value, 0x920A: value})
    assert (capture.exposure_s, capture.f_number, capture.focal_mm) == (None, None, None)


@pytest.mark.parametrize(
    ("details", "area"),
    [
        ({0x9214: (200, 150, 100, 60)}, (0.375, 0.4, 0.625, 0.6)),
        ({0x9214: (200, 150, 120)}, (0.35, 0.3, 0.65, 0.7)),
        ({0x9214: (200, 150)}, (0.425, 0.4, 0.575, 0.6)),
        ({0xA214: (200, 150)}, (0.425, 0.4, 0.575, 0.6)),
        # At the edge, only what lies in the photo.
        ({0x9214: (400, 300, 100, 60)}, (0.875, 0.9, 1.0, 1.0)),
        # The photo was made smaller than the camera's 4000×3000, in which the area is told.
        ({0x9214: (2000, 1500, 1000, 600), 0xA002: 4000, 0xA003: 3000}, (0.375, 0.4, 0.625, 0.6)),
        # Another shape: it was cropped, and the camera's size says nothing.
        ({0x9214: (200, 150, 100, 60), 0xA002: 4000, 0xA003: 4000}, (0.375, 0.4, 0.625, 0.6)),
    ],
)
def test_the_subject_area_is_a_fraction_of_the_photo(details, area):
    assert read(details).subject_area == pytest.approx(area)


@pytest.mark.parametrize(
    "value",
    [
        (0, 0),
        (401, 10),
        (10, -1),
        (200, 150, 0, 0),
        (200, 150, 500, 10),
        (200, 150, float("nan"), 10),
        (1,),
        (1, 2, 3, 4, 5),
        200,
        "200 150",
        b"\0\1\0\1",
    ],
)
def test_an_absurd_subject_area_is_none(value):
    assert read({0x9214: value}).subject_area is None


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_subject_area_turns_with_the_photo(turn):
    stored = np.zeros((300, 400), np.uint8)
    stored[20:100, 40:80] = 255  # 80 high, 40 wide, around (60, 60)
    exif = exif_with({0x9214: (60, 60, 40, 80)}, {0x0112: turn})
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = turn
    upright = ImageOps.exif_transpose(image)

    area = read_capture(exif, 400, 300).subject_area

    left, top, right, bottom = upright.getbbox()
    assert area == pytest.approx(
        (left / upright.width, top / upright.height, right / upright.width, bottom / upright.height)
    )


@settings(max_examples=300)
@given(
    cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=8)
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_block_never_raises(cut, flips):
    whole = exif_with(
        {0x9003: "2024:02:29 13:14:15", 0x8827: 400, 0x829A: IFDRational(1, 250), 0x9214: (1, 2, 3, 4)},
        {0x010F: "Canon", 0x0112: 6},
    ).tobytes()
    data = bytearray(whole)
    for where, mask in flips:
        data[10 + where % (len(data) - 10)] ^= mask
    exif = Image.Exif()
    exif.load(bytes(data[: max(16, len(data) - cut)]))
    capture = read_capture(exif, 400, 300)
    assert capture.iso is None or 0 < capture.iso < 2**31
    assert 1 <= orientation(exif) <= 8
