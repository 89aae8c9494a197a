"""Damage that decoders paint over: a photo is ok only if its pixels are all there."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdnet.photo import decode
from tests.bdnet.test_photo import assert_typed, busy, encode, scene, turned

EOI = b"\xff\xd9"
PHOTO = encode(busy(640, 480), "JPEG", quality=90)
GREY = encode(busy(640, 480).convert("L"), "JPEG", quality=90)
PROGRESSIVE = encode(busy(640, 480), "JPEG", progressive=True)
RESTARTING = encode(busy(640, 480), "JPEG", restart_marker_rows=1)
IN_ONE_SCAN = {"colour": PHOTO, "grey": GREY, "restarting": RESTARTING}
JPEGS = {**IN_ONE_SCAN, "progressive": PROGRESSIVE}


def cut_and(data: bytes, where: float, rest: bytes) -> bytes:
    """The first part of a file, at least all of its headers, and something else."""
    headers = data.index(b"\xff\xda") + 20
    return data[: headers + int(where * (len(data) - headers - 40))] + rest


@pytest.mark.parametrize(
    ("name", "where"),
    # Of the last scan of a progressive photo, the last bit of some coefficients, nothing shows the loss.
    [
        (name, where)
        for name in JPEGS
        for where in (0.1, 0.5, 0.9, 0.99)
        if name != "progressive" or where < 0.9
    ],
)
@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(EOI, id="an end marker"),
        pytest.param(EOI + bytes(5000), id="an end marker and a trailer"),
        pytest.param(bytes(5000), id="zeros"),
        pytest.param(b"\xff" * 5000, id="ones"),
        pytest.param(np.random.default_rng(0).bytes(5000) + EOI, id="random bytes"),
        pytest.param(encode(scene(), "JPEG"), id="another photo"),
    ],
)
def test_a_jpeg_that_goes_on_as_something_else_is_truncated(name, where, rest):
    photo = decode(cut_and(JPEGS[name], where, rest), None)
    assert_typed(photo)
    assert photo.status == "truncated"


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("trailer", [b"\0", bytes(70_000), b"\xff" * 3000, PHOTO, b"ftypmp42" * 99])
def test_what_follows_the_end_marker_is_no_matter(name, trailer):
    whole, followed = decode(JPEGS[name]), decode(JPEGS[name] + trailer)
    assert (whole.status, followed.status) == ("ok", "ok")
    np.testing.assert_array_equal(whole.pixels, followed.pixels)


@pytest.mark.parametrize("working_size", [None, 640, 100, 60])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (16, 16), (17, 33), (640, 16), (501, 333)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 2},
        {"subsampling": 1},
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 2, "subsampling": 2},
        {"restart_marker_blocks": 3, "progressive": True, "subsampling": 2},
        {"quality": 1},
        {"quality": 100},
    ],
)
def test_an_honest_jpeg_is_never_called_broken(size, options, working_size):
    for image in (busy(640, 480).resize(size), Image.new("RGB", size), Image.new("L", size, 128)):
        photo = decode(encode(image, "JPEG", **options), working_size)
        assert photo.status == "ok", photo.error
        if working_size is None:
            with Image.open(io.BytesIO(encode(image, "JPEG", **options))) as expected:
                np.testing.assert_array_equal(photo.pixels, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("excess", [1, 16, 900])
def test_a_few_strange_bytes_before_the_end_marker_are_forgiven(excess):
    assert decode(PHOTO[:-2] + bytes(excess) + EOI).status == "ok"


def test_far_more_pixel_data_than_picture_is_unreadable():
    data = PHOTO.index(b"\xff\xda") + 14
    photo = decode(PHOTO[:-2] + PHOTO[data : data + 5000] + EOI)
    assert (photo.status, photo.pixels) == ("unreadable", None)


def test_a_lost_stretch_between_restart_markers_is_found():
    restarts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", RESTARTING)]
    photo = decode(RESTARTING[: restarts[3]] + RESTARTING[restarts[11] :])
    assert (photo.status, photo.error) == (
        "truncated",
        "a part of the pixel data is lost: restart markers are missing",
    )


def test_a_progressive_jpeg_whose_later_scans_are_missing_is_not_scored_as_blurry():
    scans = [found.start() for found in re.finditer(rb"\xff\xda", PROGRESSIVE)]
    assert len(scans) > 5
    for last in scans[1:]:
        photo = decode(PROGRESSIVE[:last] + EOI)
        assert (photo.status, photo.error) == ("truncated", "scans are missing: the picture lacks its detail")


def test_a_broken_jpeg_keeps_what_the_camera_wrote():
    exif = turned(6)
    exif[0x0110] = "Camera 1"
    photo = decode(cut_and(encode(busy(), "JPEG", exif=exif), 0.5, EOI))
    assert (photo.status, photo.width, photo.height) == ("truncated", 80, 120)
    assert photo.capture.camera == "Camera 1"


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(IN_ONE_SCAN)),
    where=st.floats(0, 1),
    rest=st.binary(max_size=400),
    end=st.sampled_from([b"", EOI]),
)
def test_a_jpeg_cut_anywhere_is_ok_only_if_it_shows_nearly_the_same(name, where, rest, end):
    data = IN_ONE_SCAN[name]
    photo = decode(data[: int(where * len(data))] + rest + end)
    assert_typed(photo)
    if photo.status == "ok":
        assert photo.pixels is not None
        difference = np.abs(photo.pixels.astype(int) - decode(data).pixels)
        assert difference.mean() < 1


@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
@pytest.mark.parametrize("options", [{"lossless": False, "quality": 80}, {"lossless": True}])
def test_a_webp_with_a_filled_tail_is_truncated(options, filling):
    data = encode(busy(640, 480), "WEBP", **options)
    half = len(data) // 2
    assert decode(data).status == "ok"
    assert decode(data[:half] + filling * (len(data) - half)).status == "truncated"


@pytest.mark.parametrize("options", [{"lossless": False}, {"lossless": True, "method": 0}])
@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_a_webp_of_one_colour_is_whole_though_its_data_is_mostly_zeros(colour, options):
    assert decode(encode(Image.new("RGB", (2000, 2000), colour), "WEBP", **options)).status == "ok"


@pytest.fixture(scope="module")
def heic():
    """Encode a picture as HEIC; where the extra isn't installed these tests skip."""
    pillow_heif = pytest.importorskip("pillow_heif")

    def encode_heic(image: Image.Image, **options) -> bytes:
        buffer = io.BytesIO()
        pillow_heif.from_pillow(image).save(buffer, quality=95, chroma=444, **options)
        return buffer.getvalue()

    return encode_heic


def test_a_heic_is_read_upright(heic):
    photo = decode(heic(scene()))
    assert (photo.status, photo.format, photo.width, photo.height) == ("ok", "heic", 96, 64)
    assert np.abs(photo.pixels.astype(int) - np.asarray(scene())).mean() < 5

    exif = turned(6)
    exif[0x0110] = "Camera 1"
    photo = decode(heic(scene(), exif=exif.tobytes()))
    assert (photo.width, photo.height) == (64, 96)
    upright = np.asarray(scene().transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(photo.pixels - upright).mean() < 5
    assert photo.capture.camera == "Camera 1"


def test_a_cut_or_filled_heic_is_truncated(heic):
    data = heic(busy())
    for length in range(12, len(data), len(data) // 40):
        photo = decode(data[:length])
        assert_typed(photo)
        assert photo.status == "truncated", length
    half = len(data) // 2
    assert decode(data[:half] + bytes(len(data) - half)).status == "truncated"


def test_a_heic_bomb_is_too_large(heic):
    data = heic(scene())
    at = data.index(b"ispe") + 8
    photo = decode(data[:at] + (50_000).to_bytes(4, "big") * 2 + data[at + 8 :])
    assert_typed(photo)
    assert photo.status == "too_large"
