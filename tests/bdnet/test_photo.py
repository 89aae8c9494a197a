"""The decoder: every format and mode comes out upright; every broken file gets a status, never an error."""

import io
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

import bdnet.photo as photo_module
from bdnet.photo import Limits, Photo, decode, size_at

STATUSES = {"ok", "truncated", "unreadable", "unsupported", "too_large", "empty"}
LOSSLESS = ("PNG", "WEBP", "TIFF", "BMP", "GIF")
CARRIES_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """A picture that differs from all its mirror images and turns, of few colours so that a GIF holds it."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[: height // 2, : width // 2] = (250, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 250, 30)
    pixels[height // 2 :, : width // 4] = (30, 30, 250)
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str, **options) -> bytes:
    if format == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    if format == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def distance(photo: Photo, expected: Image.Image) -> float:
    assert photo.status == "ok", photo.error
    assert photo.pixels is not None
    want = np.asarray(expected.convert("RGB"), np.int16)
    assert photo.pixels.shape == want.shape
    return float(np.abs(photo.pixels - want).mean())


def assert_typed(photo: Photo) -> None:
    assert photo.status in STATUSES
    assert (photo.pixels is not None) == (photo.status == "ok")
    assert (photo.error is None) == (photo.status == "ok")
    if photo.error is not None:
        assert "\n" not in photo.error
        assert 0 < len(photo.error) <= 250
    if photo.pixels is not None:
        assert photo.pixels.dtype == np.uint8
        assert photo.pixels.shape[2] == 3
        assert photo.pixels.flags["C_CONTIGUOUS"]


def png(header: tuple[int, int, int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    ihdr = struct.pack(">IIBBBBB", *header, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in ((b"IHDR", ihdr), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_lossless_format_gives_its_very_pixels(format):
    photo = decode(encode(scene(), format))
    assert_typed(photo)
    assert distance(photo, scene()) == 0
    assert (photo.format, photo.width, photo.height) == (format.lower(), 96, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", CARRIES_EXIF)
def test_every_orientation_comes_out_upright(format, orientation):
    data = encode(scene(), format, exif=turned(orientation))
    tagged = scene()
    tagged.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(tagged)

    photo = decode(data)

    assert distance(photo, upright) < 2
    assert (photo.width, photo.height) == upright.size


@pytest.mark.parametrize("format", CARRIES_EXIF)
def test_a_turned_photo_is_reduced_by_its_own_long_side(format):
    photo = decode(encode(scene(), format, exif=turned(6)), working_size=48)
    assert photo.pixels is not None
    assert photo.pixels.shape == (48, 32, 3)
    assert (photo.width, photo.height) == (64, 96)
    # Upright, the blue corner lies top left, and the red one right of it.
    assert photo.pixels[4, 4].argmax() == 2
    assert photo.pixels[4, 27].argmax() == 0


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("1", "TIFF"),
        ("P", "PNG"),
        ("P", "BMP"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_every_mode_becomes_the_rgb_that_it_shows(mode, format):
    source = scene()
    if mode == "LAB":
        lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        converted = ImageCms.applyTransform(source, lab)
        assert converted is not None
    elif mode == "LA":
        converted = source.convert("L").convert("LA")
    else:
        converted = source.convert(mode)
    shown = converted.convert("RGB") if mode not in ("LAB", "CMYK") else source
    assert distance(decode(encode(converted, format)), shown) < 3


def test_an_adobe_ycck_jpeg_is_neither_inverted_nor_miscoloured():
    data = encode(scene().convert("CMYK"), "JPEG")
    assert b"Adobe" in data[:64]
    assert distance(decode(data), scene()) < 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_rather_than_clipped(format):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    photo = decode(encode(Image.fromarray(ramp), format))
    assert photo.pixels is not None
    np.testing.assert_allclose(photo.pixels[0, :, 0], np.arange(256), atol=1)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 3e6])
def test_float_pixels_are_scaled_to_the_usual_white_that_holds_them(white):
    ramp = np.linspace(0, white, 256, dtype=np.float32)[None].repeat(4, 0)
    ramp[1, 0] = np.nan
    photo = decode(encode(Image.fromarray(ramp), "TIFF"))
    assert photo.pixels is not None
    np.testing.assert_allclose(photo.pixels[0, :, 0], np.arange(256), atol=1)


def test_a_float_picture_with_a_few_pixels_beyond_white_is_not_darkened():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    ramp[1, 0] = 1.01
    photo = decode(encode(Image.fromarray(ramp), "TIFF"))
    assert photo.pixels is not None
    np.testing.assert_allclose(photo.pixels[0, :, 0], np.arange(256), atol=1)
    assert photo.pixels[1, 0, 0] == 255


def grey_tiff(pixels: bytes, width: int, height: int, bits: int, photometric: int) -> bytes:
    short, long = 3, 4
    entries = [
        *((256, long, width), (257, long, height), (258, short, bits), (259, short, 1)),
        *((262, short, photometric), (273, long, 200), (278, long, height), (279, long, len(pixels))),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    return head.ljust(200, b"\0") + pixels


def test_12_bit_grey_fills_the_range():
    ramp = np.linspace(0, 4095, 256).astype(int).tolist()
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(ramp[::2], ramp[1::2], strict=True))
    photo = decode(grey_tiff(packed, 256, 1, bits=12, photometric=1))
    assert photo.pixels is not None, photo.error
    np.testing.assert_allclose(photo.pixels[0, :, 0], np.arange(256), atol=1)


@pytest.mark.parametrize("bits", [8, 16])
def test_where_white_is_zero_a_scan_is_no_negative(bits):
    ramp = np.linspace(0, 2**bits - 1, 256).astype(f"<u{bits // 8}")
    photo = decode(grey_tiff(ramp.tobytes(), 256, 1, bits, photometric=0))
    assert photo.pixels is not None, photo.error
    np.testing.assert_allclose(photo.pixels[0, :, 0], np.arange(256)[::-1], atol=1)


def test_pillows_own_bound_on_pixels_refuses_no_tiff(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert distance(decode(encode(scene(), "TIFF")), scene()) == 0


@pytest.mark.parametrize("key", ["transparency", "interlace", "original_orientation"])
def test_a_text_in_a_png_is_no_fact_about_its_pixels(key):
    texts = PngImagePlugin.PngInfo()
    texts.add_text(key, "8")
    assert distance(decode(encode(scene(), "PNG", pnginfo=texts)), scene()) == 0


def test_transparent_pixels_show_white_and_their_hidden_colour_does_not_bleed():
    image = scene().convert("RGBA")
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, 48:] = 0  # the green corner
    image.putalpha(Image.fromarray(alpha))
    photo = decode(encode(image, "PNG"), working_size=48)
    assert photo.pixels is not None
    assert (photo.pixels[:, 26:] == 255).all()
    assert photo.pixels[4, 4].tolist() == [250, 30, 30]


def test_a_transparent_palette_entry_shows_white():
    image = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    red = image.getpixel((0, 0))
    photo = decode(encode(image, "PNG", transparency=red))
    assert photo.pixels is not None
    assert photo.pixels[0, 0].tolist() == [255, 255, 255]
    assert photo.pixels[0, -1].tolist() == [30, 250, 30]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_counts(format):
    other = Image.new("RGB", (96, 64), (1, 2, 3))
    photo = decode(encode(scene(), format, save_all=True, append_images=[other]))
    assert distance(photo, scene()) == 0


def test_an_mpo_is_a_jpeg():
    photo = decode(
        encode(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))], quality=95)
    )
    assert photo.format == "jpeg"
    assert distance(photo, scene()) < 3


@pytest.mark.parametrize(
    ("size", "working_size", "expected"),
    [
        ((6000, 4000), 640, (640, 427)),
        ((4000, 6000), 640, (427, 640)),
        ((640, 480), 640, (640, 480)),
        ((100, 50), 640, (100, 50)),
        ((6000, 4000), None, (6000, 4000)),
        ((5000, 2), 640, (640, 1)),
    ],
)
def test_the_long_side_is_at_most_the_working_size_and_nothing_is_enlarged(size, working_size, expected):
    assert size_at(*size, working_size) == expected


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_is_reduced_to_the_same_picture(progressive):
    large = scene(6000, 4000)
    photo = decode(encode(large, "JPEG", progressive=progressive))
    assert photo.pixels is not None
    assert photo.pixels.shape == (427, 640, 3)
    assert (photo.width, photo.height) == (6000, 4000)
    assert distance(photo, large.resize((640, 427), Image.Resampling.BICUBIC)) < 1


@pytest.mark.parametrize("width", [1279, 1280, 1281, 1999, 5127])
def test_reduced_dct_scale_does_not_shift_the_picture(width):
    x = np.linspace(0, 8 * np.pi, width)
    wave = (127 + 100 * np.sin(x))[None].repeat(333, 0).astype(np.uint8)
    image = Image.fromarray(wave)
    photo = decode(encode(image, "JPEG"))
    assert distance(photo, image.resize(size_at(width, 333, 640), Image.Resampling.BICUBIC)) < 0.6


def test_a_working_size_below_one_is_the_callers_mistake():
    with pytest.raises(ValueError, match="at least 1"):
        decode(b"x", working_size=0)


@pytest.mark.parametrize(
    ("data", "status", "format"),
    [
        (b"", "empty", None),
        (b"Dear diary, today I took no photo.", "unreadable", None),
        (b"BM is how this text begins, which proves nothing", "unreadable", None),
        (bytes(5000), "unreadable", None),
        (b"%PDF-1.7 ...", "unsupported", "pdf"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "svg"),
        (b"\n<!DOCTYPE html><html>404</html>", "unsupported", "html"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "unsupported", "camera raw"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "unsupported", "video"),
        (b"II*\0\x10\0\0\0CR\2\0", "unsupported", "camera raw"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported", "postscript"),
        (b"8BPS\0\1", "unsupported", "psd"),
        (b"\xff\xd8\xff", "truncated", "jpeg"),
        (b"\x89PNG\r\n\x1a\n", "truncated", "png"),
        (b"II*\0\x08\0\0\0", "truncated", "tiff"),
    ],
)
def test_what_is_no_readable_photo_says_so(data, status, format):
    photo = decode(data)
    assert_typed(photo)
    assert (photo.status, photo.format) == (status, format)


def test_a_raw_file_is_not_judged_by_its_thumbnail():
    data = encode(scene(), "TIFF", tiffinfo={254: 1, 330: 8})
    assert decode(data).status == "unsupported"


def test_a_tiff_whose_strips_cover_a_part_of_it_is_unreadable():
    photo = decode(
        BUSY["tiff"].replace(struct.pack("<HHII", 257, 4, 1, 80), struct.pack("<HHII", 257, 4, 1, 9_000))
    )
    assert (photo.status, photo.error) == ("unreadable", "pixel data for a part only of 9000×120 pixels")


def test_a_12_bit_jpeg_is_unsupported_rather_than_broken():
    data = bytearray(encode(scene(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert decode(bytes(data)).status == "unsupported"


def test_without_the_extra_a_heic_is_unsupported(monkeypatch):
    monkeypatch.delitem(photo_module._OPENERS, "heic", raising=False)
    photo = decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert_typed(photo)
    assert (photo.status, photo.format) == ("unsupported", "heic")


@pytest.mark.parametrize("name", [b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif", b"Comment"])
def test_a_png_header_that_claims_50000_by_50000_allocates_nothing(name, monkeypatch):
    allocated = []

    def refuse(mode, size, *_args):
        allocated.append((mode, size))
        raise MemoryError

    monkeypatch.setattr(Image.core, "new", refuse)
    monkeypatch.setattr(Image.core, "fill", refuse)
    text = (b"iTXt", name + b"\0\0\0\0\0some text")
    photo = decode(png((50_000, 50_000, 8, 2), text, (b"IDAT", zlib.compress(bytes(1000)))))
    assert_typed(photo)
    assert photo.status == "too_large"
    assert not allocated
    assert (photo.width, photo.height) == (50_000, 50_000)


def header_only_jpeg(width: int, height: int, progressive: bool = False) -> bytes:
    data = bytearray(encode(scene(), "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def test_what_decoding_takes_in_memory_is_bounded_rather_than_the_pixels():
    large = scene(960, 640)
    limits = Limits(max_memory=1_000_000)
    for format in LOSSLESS:
        assert decode(encode(large, format), working_size=24, limits=limits).status == "too_large"
    assert decode(encode(large, "JPEG"), working_size=24, limits=limits).status == "ok"
    assert decode(encode(large, "JPEG"), working_size=None, limits=limits).status == "too_large"
    assert decode(encode(large, "JPEG"), working_size=959, limits=limits).status == "too_large"
    # libjpeg keeps all coefficients of a progressive one, at every scale.
    progressive = encode(large, "JPEG", progressive=True)
    assert decode(progressive, working_size=24, limits=limits).status == "too_large"


def test_turning_a_tiff_takes_memory_for_another_copy():
    limits = Limits(max_memory=6 * 960 * 640)
    for orientation, status in ((1, "ok"), (6, "too_large")):
        data = encode(scene(960, 640), "TIFF", exif=turned(orientation))
        assert decode(data, working_size=24, limits=limits).status == status


@pytest.mark.parametrize("size", [(1, 400_000), (400_000, 1)])
def test_a_long_side_takes_memory_of_its_own(size):
    width, height = size
    lines = zlib.compress(bytes(height * (1 + width)))
    data = png((width, height, 8, 0), (b"IDAT", lines), (b"IEND", b""))
    assert decode(data, limits=Limits(max_memory=10_000_000)).status == "too_large"
    assert decode(data, limits=Limits(max_memory=30_000_000)).status == "ok"


def test_a_panorama_of_300_megapixels_passes_the_bounds():
    # Only the header is that large here: were it refused by size, the status would be too_large.
    assert decode(header_only_jpeg(30_000, 10_000)).status == "truncated"
    assert decode(header_only_jpeg(30_000, 20_000)).status == "too_large"
    assert decode(header_only_jpeg(30_000, 10_000, progressive=True)).status == "too_large"
    in_colour, with_alpha = (png((30_000, 10_000, 8, colour)) for colour in (2, 6))
    assert decode(in_colour).status == "unreadable"
    assert decode(with_alpha).status == "too_large"


def test_a_few_bytes_that_claim_a_large_jpeg_are_not_ok():
    assert decode(header_only_jpeg(4_000, 3_000)).status == "truncated"


def gif_bomb() -> bytes:
    frame = struct.pack("<HHHHB", 0, 0, 65_000, 65_000, 0)
    background = b"!\xf9\x04\x08\0\0\0\0"  # disposal that would fill the frame while opening
    return b"GIF89a" + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0) + background + b"," + frame + b"\x02\0;"


def webp_bomb() -> bytes:
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16_382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def bmp_bomb() -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


@pytest.mark.parametrize("bomb", [gif_bomb, webp_bomb, bmp_bomb])
def test_a_header_that_claims_too_much_is_too_large(bomb: Callable[[], bytes]):
    photo = decode(bomb())
    assert_typed(photo)
    assert photo.status == "too_large"


def wide_png() -> bytes:
    return png((2**32 - 1, 1, 8, 2), (b"IDAT", zlib.compress(b"0")))


def wide_bmp() -> bytes:
    info = struct.pack("<IIiHHIIiiII", 40, 2**32 - 16, 5, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + info + bytes(100)


def wide_tiff() -> bytes:
    entries = [
        *((256, 4, 1, 2**32 - 16), (257, 4, 1, 3), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 3), (279, 4, 1, 10)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(200)


@pytest.mark.parametrize("wide", [wide_png, wide_bmp, wide_tiff])
def test_a_side_that_is_no_photos_is_named_in_the_error_alone(wide: Callable[[], bytes]):
    photo = decode(wide())
    assert (photo.status, photo.width, photo.height) == ("too_large", None, None)
    assert "42949672" in (photo.error or "")


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_metadata_bomb_is_a_status(chunk):
    body = b"name\0\0" + zlib.compress(bytes(50_000_000))
    photo = decode(png((1, 1, 8, 2), (chunk, body), (b"IDAT", zlib.compress(bytes(4)))))
    assert_typed(photo)
    assert photo.status == "unreadable"


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("where", ["first directory", "EXIF's"])
def test_a_tiff_with_a_million_values_of_a_tag_is_not_opened(big, where, monkeypatch):
    many = (273, 3, 1_000_000, 0)
    tags = {"first directory": [many], "EXIF's": [(34665, 4, 1, 100)]}[where]
    head, number, tag = ("<4sIQ", "<Q", "<HHQQ") if big else ("<4sI", "<H", "<HHII")
    magic, start = (b"II+\0", 16) if big else (b"II*\0", 8)
    data = struct.pack(head, magic, *((8, start) if big else (start,))) + struct.pack(number, len(tags))
    data = (data + b"".join(struct.pack(tag, *its) for its in tags)).ljust(100, b"\0")
    data += struct.pack(number, 1) + struct.pack(tag, *many)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "_open", lambda image: pytest.fail("it was opened"))
    photo = decode(data)
    assert (photo.status, photo.error) == (
        "too_large",
        "its tag 273 has 1,000,000 values; the limit is 200,000",
    )


@pytest.mark.parametrize("format", ["WEBP", "PNG", "PNG text"])
def test_megabytes_of_exif_are_not_read_and_do_not_cost_the_photo(format, monkeypatch):
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("it was read"))
    if format == "PNG text":
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", "\nexif\n1\n" + "00" * 2_000_000)
        data = encode(scene(), "PNG", pnginfo=text)
    else:
        data = encode(scene(), format, exif=b"Exif\0\0" + bytes(2_000_000))
    photo = decode(data)
    assert (photo.status, photo.width, photo.height) == ("ok", 96, 64)


def test_no_part_of_a_webp_is_copied_for_each_of_its_chunks():
    data = encode(scene(), "WEBP") + b"ALPH\0\0\0\0" * 50_000
    tracemalloc.start()
    try:
        assert decode(data).status == "ok"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000  # half a kilobyte of each would be 25 MB


def test_more_bytes_than_the_limit_are_too_large():
    data = encode(scene(), "PNG")
    assert decode(data, limits=Limits(max_bytes=len(data))).status == "ok"
    assert decode(data, limits=Limits(max_bytes=len(data) - 1)).status == "too_large"


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError(), "too_large"), (RecursionError("too deep"), "unreadable")]
)
def test_running_out_of_memory_or_stack_is_a_status(monkeypatch, error, status):
    def fail(_image):
        raise error

    data = encode(scene(), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    photo = decode(data)
    assert_typed(photo)
    assert photo.status == status


def busy(width: int = 120, height: int = 80) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


BUSY = {
    "jpeg": encode(busy(), "JPEG", exif=turned(6)),
    "progressive": encode(busy(), "JPEG", progressive=True),
    "cmyk": encode(busy().convert("CMYK"), "JPEG"),
    "png": encode(busy(), "PNG", exif=turned(6)),
    "webp": encode(busy(), "WEBP", exif=turned(3)),
    "tiff": encode(busy(), "TIFF", exif=turned(5)),
    "tiff-deflate": encode(busy(), "TIFF", compression="tiff_adobe_deflate"),
    "gif": encode(busy(), "GIF"),
    "bmp": encode(busy(), "BMP"),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_cut_file_is_ok_only_if_its_picture_is_whole(name):
    data = BUSY[name]
    whole = decode(data)
    assert whole.status == "ok"
    lengths = sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 12, len(data))})
    statuses = []
    for length in lengths:
        photo = decode(data[:length])
        assert_typed(photo)
        if photo.status == "ok":
            np.testing.assert_array_equal(photo.pixels, whole.pixels)
        statuses.append(photo.status)
    assert decode(data[: len(data) // 2]).status == "truncated"
    assert set(statuses) <= {"empty", "unreadable", "truncated", "ok"}
    # Past the first bytes, by which the format is known, a cut file is called just that.
    assert set(statuses[1:]) <= {"truncated", "ok"}


def test_a_truncated_jpeg_keeps_what_its_header_said():
    photo = decode(BUSY["jpeg"][:-500])
    assert (photo.status, photo.format, photo.width, photo.height) == ("truncated", "jpeg", 80, 120)


def test_a_truncated_png_keeps_what_its_header_said():
    exif = turned(6)
    exif[0x0110] = "Cam"
    whole = encode(scene(), "PNG", exif=exif)
    assert whole.index(b"eXIf") < whole.index(b"IDAT")
    photo = decode(whole[:-12])
    assert (photo.status, photo.width, photo.height) == ("truncated", 64, 96)
    assert photo.capture.camera == "Cam"


def test_a_flipped_bit_in_png_pixels_is_found_by_its_checksum():
    data = bytearray(BUSY["png"])
    data[data.index(b"IDAT") + 2000] ^= 1
    assert decode(bytes(data)).status == "unreadable"


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(BUSY)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6),
    in_header=st.booleans(),
)
def test_damaged_bytes_give_a_status_and_never_an_error(name, flips, in_header):
    data = bytearray(BUSY[name])
    for where, mask in flips:
        data[int(where * (400 if in_header else len(data)))] ^= mask
    assert_typed(decode(bytes(data)))


@settings(max_examples=100)
@given(prefix=st.sampled_from([data[:n] for data in BUSY.values() for n in (3, 12, 30)]), rest=st.binary())
def test_any_bytes_give_a_status(prefix, rest):
    assert_typed(decode(prefix + rest))
    assert_typed(decode(rest))


def test_absurd_exif_does_not_cost_the_photo():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 4
    photo = decode(encode(scene(), "JPEG", exif=exif))
    assert distance(photo, scene()) < 2


def test_nothing_is_printed_about_a_broken_photo(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for data in BUSY.values():
            for length in (30, 200, len(data) // 2, len(data) - 3):
                decode(data[:length])
        decode(encode(scene(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256))))
        decode(encode(scene(), "TIFF", tiffinfo={277: 9}))
    assert capfd.readouterr() == ("", "")
