"""Make a small photo archive to try bdnet on: ``python -m infra.sample_archive DEST``.

The photographs are real ones that ship inside two PyPI packages; nothing is downloaded. The blur is computed
from them as a lens or a moving camera would make it, so each blurred pixel is known. Written under DEST:

``photos/``     the archive: sharp, regionally and wholly blurred, in several formats, and broken files
``masks/``      for each photo whose blur is known, ``<path in photos>.png``: 255 = blurred, upright size
``truth.json``  path in photos -> expected_status, kind (motion, defocus, null), blurred_fraction or null

Sources. scikit-learn, both CC BY 2.0, changed here: china.jpg by danielbuechele
(flickr.com/photos/danielbuechele/6061409035), flower.jpg by vultilion
(flickr.com/photos/vultilion/6056698931). scikit-image: astronaut (NASA, public domain), camera (Lav Varshney,
CC0), chelsea the cat (Stefan van der Walt, CC0), clock (Stefan van der Walt, public domain, really taken with
a moving camera), coffee (Rachel Michetti for Pikolo Espresso Bar, CC0), rocket (SpaceX, public domain) and
the motorcycle with its measured disparities (Middlebury stereo benchmark 2014, D. Scharstein et al.).

No shipped photograph is large: the 13-megapixel one is the motorcycle enlarged six times by Lanczos, and its
name says so. It is sharp at bdnet's working size, not at its own. Camera data in the files is invented.
"""

import io
import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import tyro
from PIL import ExifTags, Image, ImageDraw
from scipy import ndimage, signal

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

# Sensors record light linearly and blur adds light, not pixel values: highlights must stay bright.
GAMMA = 2.2
JPEG_QUALITY = 92
# Two pixels of defocus is where an eye begins to see it at these sizes (about 640 pixels wide).
SMALLEST_RADIUS = 2.0
ROTATE_FOR_DISPLAY = 6

# Hand-drawn outlines, in the source's pixels.
ASTRONAUT = [
    *[(18, 512), (24, 440), (16, 370), (24, 308), (52, 246), (106, 202), (114, 167), (143, 146), (178, 146)],
    *[(180, 133), (156, 122), (148, 90), (153, 48), (188, 17), (225, 9), (265, 20), (297, 58), (307, 102)],
    *[
        (293, 130),
        (264, 134),
        (259, 155),
        (289, 183),
        (308, 222),
        (314, 240),
        (338, 256),
        (354, 285),
        (366, 338),
    ],
    *[(400, 337), (447, 349), (482, 383), (501, 428), (505, 446), (512, 450), (512, 512)],
]
SAUCER = (75, 58, 480, 390)
CUP = (172, 14, 410, 212)
SPOON_HANDLE = [(395, 60), (420, 62), (425, 76), (400, 150), (390, 150)]
TREES = [
    *[(640, 427), (640, 138), (612, 132), (585, 142), (572, 180), (556, 215), (553, 262), (520, 292)],
    *[(505, 275), (450, 272), (400, 295), (365, 310), (352, 345), (318, 362), (305, 395), (296, 427)],
]
ROCKET = [(306, 404), (309, 150), (316, 130), (322, 127), (328, 130), (334, 150), (337, 404)]


@dataclass(frozen=True)
class Shot:
    """An upright photo, and what is known of its blur.

    ``pixels`` are (height, width, 3) or (height, width) uint8; ``mask`` is (height, width), True = blurred,
    or None where the photographer's own blur was never measured. ``mode`` and ``exif`` say how it is saved.
    """

    pixels: Pixels
    kind: str | None
    mask: Mask | None
    mode: str | None = None
    exif: Image.Exif | None = None


def make_sample_archive(dest: Path) -> list[Path]:
    """Write the archive, its masks and truth.json under ``dest``; files of the same names are replaced.

    Returns the photo files, broken ones among them, sorted; the sidecar .xml is not one. The same library
    versions write the same bytes. Raises ValueError where the packages with the photographs are missing.
    """
    photos = dest / "photos"
    truth: dict[str, dict[str, str | float | None]] = {}
    files: dict[str, bytes] = {}
    for name, shot in _shots().items():
        files[name] = _encode(name, shot)
        fraction = None if shot.mask is None else round(float(shot.mask.mean()), 4)
        truth[name] = {"expected_status": "ok", "kind": shot.kind, "blurred_fraction": fraction}
        if shot.mask is not None:
            _write(dest / "masks" / f"{name}.png", _png(shot.mask.astype(np.uint8) * 255))
    for name, (status, content) in _broken(files["2024/garage/motorcycle.jpg"]).items():
        files[name] = content
        truth[name] = {"expected_status": status, "kind": None, "blurred_fraction": None}
    for name, content in files.items():
        _write(photos / name, content)
    _write(
        photos / "2024/garage/motorcycle.xml", b"<?xml version='1.0'?>\n<photo><rating>5</rating></photo>\n"
    )
    text = json.dumps(truth, indent=2, sort_keys=True, ensure_ascii=False)
    _write(dest / "truth.json", f"{text}\n".encode())
    return sorted(photos / name for name in files)


def blur_by_layers(
    photo: Pixels, layers: npt.NDArray[np.intp], kernels: Sequence[Floats | None]
) -> tuple[Pixels, Mask]:
    """Photograph a scene of flat layers, each blurred on its own, in linear light.

    ``photo`` is (height, width, 3) uint8, all sharp; ``layers`` (height, width) numbers each pixel's layer,
    0 = farthest; ``kernels`` has one kernel per layer, None = stays sharp. Farther layers are continued
    behind nearer ones, so that no colour of a sharp subject leaks into the blur around it and a blurred
    subject is seen through at its edges. Returns the photo and its mask, True where more than half of what
    is seen there is blurred.
    """
    light = (photo / np.float32(255)) ** np.float32(GAMMA)
    result = np.zeros_like(light)
    blur_weight = np.zeros(layers.shape, np.float32)
    for number, kernel in enumerate(kernels):
        scene = light
        if (layers > number).any() and (layers <= number).any():
            rows, columns = ndimage.distance_transform_edt(
                layers > number, return_distances=False, return_indices=True
            )
            scene = light[rows, columns]
        cover = (layers >= number).astype(np.float32)
        if kernel is None:
            cover = ndimage.gaussian_filter(cover, 1.2)
        else:
            scene = np.stack([_convolve(channel, kernel) for channel in np.moveaxis(scene, 2, 0)], axis=2)
            cover = _convolve(cover, kernel)
        result += (scene - result) * cover[..., None]
        blur_weight += ((kernel is not None) - blur_weight) * cover
    # Grain comes after the lens: without it blurred areas would be smoother than any camera's.
    grain = np.random.default_rng(0).normal(0, 1.2, layers.shape)
    encoded = np.clip(result, 0, 1) ** (1 / GAMMA) * 255 + grain[..., None]
    return np.clip(np.rint(encoded), 0, 255).astype(np.uint8), blur_weight > 0.5


def disk(radius: float) -> Floats:
    """The image of a point out of focus: a (2r+1, 2r+1) disk with soft rim, float32, sum 1."""
    y, x = _grid(radius + 1)
    return _normalised(radius + 0.5 - np.hypot(x, y))


def line(length: float, degrees: float) -> Floats:
    """The image of a point in steady motion, ``degrees`` counterclockwise from the right; float32, sum 1."""
    y, x = _grid(length / 2 + 1)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    along, across = x * cos - y * sin, x * sin + y * cos
    beyond = np.maximum(np.abs(along) - length / 2, 0)
    return _normalised(1 - np.hypot(beyond, across))


def _shots() -> dict[str, Shot]:
    """Path in the archive -> photo."""
    return {
        f"2024/{name}": shot
        for scene in (_garage, _studio, _cafe, _launch, _lake, _garden, _formats)
        for name, shot in scene().items()
    }


def _garage() -> dict[str, Shot]:
    motorcycle, disparity = _read("skimage", "data/motorcycle_left.png"), _motorcycle_disparity()
    height, width, _ = motorcycle.shape
    enlarged = Image.fromarray(motorcycle).resize((width * 6, height * 6), Image.Resampling.LANCZOS)
    return {
        "garage/motorcycle.jpg": _sharp(motorcycle),
        "garage/motorcycle-background-defocused.jpg": _focused_at(49, motorcycle, disparity),
        "garage/motorcycle-focus-on-wall.jpg": _focused_at(15, motorcycle, disparity),
        "garage/motorcycle-defocused.jpg": _defocused(motorcycle, 9),
        "garage/motorcycle-shaken.jpg": _moved(motorcycle, 30, 20),
        "garage/motorcycle-enlarged-x6-13mp.jpg": _sharp(np.asarray(enlarged)),
    }


def _studio() -> dict[str, Shot]:
    astronaut = _read("skimage", "data/astronaut.png")
    crew = _outline(astronaut, polygons=[ASTRONAUT])
    grey = _defocused(astronaut, 10, behind=crew)
    upright = np.s_[:, 20:404]
    return {
        "studio/astronaut.jpg": _sharp(astronaut),
        "studio/astronaut-background-defocused.jpg": _defocused(astronaut, 9, behind=crew),
        "studio/astronaut-focus-on-background.jpg": _defocused(astronaut, 8, only=crew),
        "studio/astronaut-defocused.jpg": _defocused(astronaut, 7),
        "studio/astronaut-shaken.jpg": _moved(astronaut, 26, 70),
        "studio/portrait-grey.jpg": replace(grey, mode="L"),
        "studio/portrait-exif-rotated.jpg": replace(
            _defocused(astronaut[upright], 8, behind=crew[upright]),
            exif=_camera("2024:03:09 16:20:31", "50", 1 / 200, 2.8, ROTATE_FOR_DISPLAY),
        ),
    }


def _cafe() -> dict[str, Shot]:
    coffee = _read("skimage", "data/coffee.png")
    saucer = _outline(coffee, polygons=[SPOON_HANDLE], ellipses=[SAUCER, CUP])
    return {
        "café/espresso.jpg": _sharp(coffee),
        "café/espresso-table-defocused.jpg": _defocused(coffee, 9, behind=saucer),
        "café/espresso-shaken.jpg": _moved(coffee, 34, -35),
        "café/café crème, défocalisé.jpg": _defocused(coffee, 10),
    }


def _launch() -> dict[str, Shot]:
    rocket = _read("skimage", "data/rocket.jpg")
    return {
        "launch/rocket.jpg": _sharp(rocket),
        "launch/rocket-rising.jpg": _moved(rocket, 40, 90, only=_outline(rocket, polygons=[ROCKET])),
        "launch/rocket-defocused.jpg": _defocused(rocket, 8),
        "launch/rocket-shaken.jpg": _moved(rocket, 32, 50),
    }


def _lake() -> dict[str, Shot]:
    china = _read("sklearn", "datasets/images/china.jpg")
    trees = _outline(china, polygons=[TREES])
    # A burst of one camera: three photos within a second, told apart by SubSecTimeOriginal alone.
    burst = "2024:05:18 10:02:45"
    return {
        "lake/pagoda-burst-1.jpg": replace(_moved(china, 36, 8), exif=_camera(burst, "120", 1 / 30, 8)),
        "lake/pagoda-burst-2.jpg": replace(_sharp(china), exif=_camera(burst, "370", 1 / 250, 8)),
        "lake/pagoda-burst-3.jpg": replace(_defocused(china, 11), exif=_camera(burst, "620", 1 / 250, 8)),
        "lake/pagoda-trees-defocused.jpg": _defocused(china, 9, only=trees),
        "lake/pagoda-trees-in-wind.jpg": _moved(china, 28, 15, only=trees),
    }


def _garden() -> dict[str, Shot]:
    flower, cat = _read("sklearn", "datasets/images/flower.jpg"), _read("skimage", "data/chelsea.png")
    return {
        # The photographers' own shallow depth of field.
        "garden/flower.jpg": Shot(flower, "defocus", None),
        "garden/cat.jpg": Shot(cat, "defocus", None),
        "garden/flower-background-defocused.jpg": _defocused(flower, 12, behind=_petals(flower)),
        "garden/flower-shaken.jpg": _moved(flower, 30, -20),
        "garden/cat-defocused.jpg": _defocused(cat, 6),
    }


def _formats() -> dict[str, Shot]:
    coffee, rocket = _read("skimage", "data/coffee.png"), _read("skimage", "data/rocket.jpg")
    clock = _read("skimage", "data/clock_motion.png")
    return {
        "formats/cameraman-grey.jpg": replace(_sharp(_read("skimage", "data/camera.png")), mode="L"),
        "formats/clock-moving-camera-grey.jpg": replace(
            Shot(clock, "motion", np.ones(clock.shape[:2], np.bool_)), mode="L"
        ),
        "formats/espresso-cmyk.jpg": replace(_sharp(coffee), mode="CMYK"),
        "formats/pagoda.png": _sharp(_read("sklearn", "datasets/images/china.jpg")),
        'formats/<b>bold & "quoted".jpg': _sharp(rocket),
    }


def _broken(photo: bytes) -> dict[str, tuple[str, bytes]]:
    """File name -> (status the audit must give, content)."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
        for tag, body in chunks
    )
    return {
        "2024/broken/truncated.jpg": ("truncated", photo[: len(photo) * 6 // 10]),
        "2024/broken/text.jpg": (
            "unreadable",
            b"Not a photo: a note that someone saved under a photo's name.\n",
        ),
        "2024/broken/empty.jpg": ("empty", b""),
        "2024/broken/claims-50000x50000.png": ("too_large", bomb),
    }


def _sharp(photo: Pixels) -> Shot:
    return Shot(photo, None, np.zeros(photo.shape[:2], np.bool_))


def _defocused(photo: Pixels, radius: float, *, behind: Mask | None = None, only: Mask | None = None) -> Shot:
    return _blurred("defocus", photo, disk(radius), behind, only)


def _moved(
    photo: Pixels, length: float, degrees: float, *, behind: Mask | None = None, only: Mask | None = None
) -> Shot:
    return _blurred("motion", photo, line(length, degrees), behind, only)


def _blurred(kind: str, photo: Pixels, kernel: Floats, behind: Mask | None, only: Mask | None) -> Shot:
    """Blur all that lies behind a subject, or only a subject, or the whole photo."""
    if behind is not None:
        pixels, mask = blur_by_layers(photo, behind.astype(np.intp), [kernel, None])
    elif only is not None:
        pixels, mask = blur_by_layers(photo, only.astype(np.intp), [None, kernel])
    else:
        pixels, mask = blur_by_layers(photo, np.zeros(photo.shape[:2], np.intp), [kernel])
    return Shot(pixels, kind, mask)


def _focused_at(focus: float, photo: Pixels, disparity: Floats) -> Shot:
    """Focus a wide-open lens at one disparity (pixels): the circle of confusion grows linearly from there."""
    step, depth_of_field, growth = 4, 8.0, 0.4
    layers = ((disparity - disparity.min()) / step).astype(np.intp)
    centres = disparity.min() + step * (np.arange(layers.max() + 1) + 0.5)
    radii = growth * np.maximum(np.abs(centres - focus) - depth_of_field, 0)
    kernels = [disk(radius) if radius >= SMALLEST_RADIUS else None for radius in radii]
    pixels, mask = blur_by_layers(photo, layers, kernels)
    return Shot(pixels, "defocus", mask)


def _motorcycle_disparity() -> Floats:
    """(500, 741) float32, large = near. Pixels that were not measured get their neighbour's."""
    with np.load(io.BytesIO(_packaged("skimage", "data/motorcycle_disp.npz")), allow_pickle=False) as arrays:
        disparity: Floats = arrays["arr_0"]
    nearest = ndimage.distance_transform_edt(
        ~np.isfinite(disparity), return_distances=False, return_indices=True
    )
    filled: Floats = ndimage.median_filter(disparity[tuple(nearest)], 3)
    return filled


def _outline(
    photo: Pixels,
    polygons: Sequence[Sequence[tuple[int, int]]] = (),
    ellipses: Sequence[tuple[int, int, int, int]] = (),
) -> Mask:
    canvas = Image.new("1", (photo.shape[1], photo.shape[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon(polygon, fill=1)
    for ellipse in ellipses:
        draw.ellipse(ellipse, fill=1)
    return np.asarray(canvas)


def _petals(flower: Pixels) -> Mask:
    """The orange blossoms before the green: red outweighs blue. Small gaps are closed, soft rims included."""
    red, _, blue = np.moveaxis(ndimage.gaussian_filter(flower.astype(np.float32), (1.5, 1.5, 0)), 2, 0)
    orange = (red - blue > 40) & (red > 110)  # the stalks are darker, and out of focus
    orange[:, 520:] = False  # a yellow leaf that the lens itself has blurred
    orange = ndimage.binary_closing(np.pad(orange, 12, mode="edge"), iterations=6)
    orange = ndimage.binary_opening(orange, iterations=10)
    petals: Mask = ndimage.binary_dilation(orange, iterations=4)[12:-12, 12:-12]
    return petals


def _grid(reach: float) -> tuple[Floats, Floats]:
    side = np.arange(-math.ceil(reach), math.ceil(reach) + 1, dtype=np.float32)
    return side[:, None], side[None, :]


def _normalised(coverage: npt.NDArray[np.floating]) -> Floats:
    kernel = np.clip(coverage, 0, 1).astype(np.float32)
    return kernel / kernel.sum()


def _convolve(channel: Floats, kernel: Floats) -> Floats:
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(channel, ((rows, rows), (columns, columns)), mode="symmetric")
    blurred: Floats = signal.oaconvolve(padded, kernel, mode="valid")
    return blurred


def _packaged(package: str, path: str) -> bytes:
    """A file of an installed package, read as bytes: the packages' own loaders may download."""
    try:
        return resources.files(package).joinpath(path).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"the sample photographs of {package} are missing ({error}); "
            "run: pip install '.[demo]' in the checkout"
        ) from error


def _read(package: str, path: str) -> Pixels:
    with Image.open(io.BytesIO(_packaged(package, path))) as image:
        return np.asarray(image.convert("RGB"))


def _camera(taken: str, subsecond: str, exposure: float, f_number: float, orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Sample"
    exif[ExifTags.Base.Model] = "Sample Camera 1"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            ExifTags.Base.DateTimeOriginal: taken,
            ExifTags.Base.SubsecTimeOriginal: subsecond,
            ExifTags.Base.ISOSpeedRatings: 400,
            ExifTags.Base.ExposureTime: exposure,
            ExifTags.Base.FNumber: f_number,
            ExifTags.Base.FocalLength: 50.0,
            ExifTags.Base.BodySerialNumber: "S-0001",
            ExifTags.Base.LensModel: "Sample 50mm f/1.8",
        }
    )
    return exif


def _encode(name: str, shot: Shot) -> bytes:
    image = Image.fromarray(shot.pixels)
    if PurePosixPath(name).suffix == ".png":
        return _png(shot.pixels)
    exif = shot.exif or Image.Exif()
    if exif.get(ExifTags.Base.Orientation) == ROTATE_FOR_DISPLAY:
        # Viewers turn such a file clockwise, so its pixels are stored turned the other way.
        image = image.transpose(Image.Transpose.ROTATE_90)
    content = io.BytesIO()
    image.convert(shot.mode or "RGB").save(content, "JPEG", quality=JPEG_QUALITY, exif=exif)
    return content.getvalue()


def _png(pixels: Pixels) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main(dest: tyro.conf.Positional[Path]) -> None:
    """Make a small photo archive of sharp, blurred and broken photos.

    Args:
        dest: a local folder; gets photos/, masks/ and truth.json.
    """
    made = make_sample_archive(dest)
    print(f"{len(made)} photos in {dest / 'photos'}")


if __name__ == "__main__":
    tyro.cli(main)
