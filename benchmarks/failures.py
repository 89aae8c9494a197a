"""Where the default model's maps are wrong, and what the CRF does to it: ``python -m benchmarks.failures``.

The paper names two failures, large flat regions and soft boundaries. Every pixel of BlurRaw's test photos
lies near the mask's border, in a flat region, or elsewhere; failures.csv has how much of each is wrong.
docs/images/failures.png shows the photos with the largest share of either wrong. The photos themselves are
others' work and stay out; their names are above the maps.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import bdnet
from bdnet.detect import BLURRED_PROBABILITY
from bdnet.refine import crf
from benchmarks.data import INVERTED_MASKS, data_folder
from benchmarks.marking import predict
from benchmarks.tables import write_csv
from pipeline.dataset import read_dataset, read_pair

REGIONS = ("border", "flat", "rest")
# Of photos of 640 pixels.
NEAR = 10  # pixels from the mask's border
WINDOW = 15  # pixels
FLAT = 3.0  # standard deviation of grey within the window, of 255
SHOWN = 2  # photos of each failure
SHOWN_FROM = 0.05  # of the photo: a smaller region may be all wrong and matter little
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "failures.png"
CELL = (300, 225)
CAPTION = 24
# Of a pixel by (truth, said): right sharp, wrongly blurred, wrongly sharp, right blurred.
COLOURS = np.array([[(235, 235, 235), (230, 120, 40)], [(40, 110, 220), (90, 90, 90)]], np.uint8)


@dataclass(frozen=True)
class Failure:
    """A photo's mask, its map and its map after the CRF; how many pixels of each region are wrong."""

    name: str
    truth: np.ndarray  # bool [H, W]
    soft: np.ndarray  # float32 [H, W]
    refined: np.ndarray  # float32 [H, W]
    pixels: np.ndarray  # int64 [regions]
    wrong: np.ndarray  # int64 [regions]
    wrong_refined: np.ndarray  # int64 [regions]


def regions_of(pixels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The region of each pixel as its index in REGIONS, int64 [H, W]; near a border goes before flat.

    Args:
        pixels: uint8 [H, W, 3].
        truth: bool [H, W].
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    mean = ndimage.uniform_filter(grey, WINDOW)
    variance = ndimage.uniform_filter(grey**2, WINDOW) - mean**2
    near = np.zeros_like(truth)
    for side in (truth, ~truth):
        # Without a border the distance is to nothing.
        if not side.all():
            near |= side & (ndimage.distance_transform_edt(side) <= NEAR)
    regions = np.where(variance < FLAT**2, REGIONS.index("flat"), REGIONS.index("rest"))
    return np.where(near, REGIONS.index("border"), regions)


def examine(name: str, pixels: np.ndarray, truth: np.ndarray, soft: np.ndarray) -> Failure:
    """Count what is wrong with a photo's map before and after the CRF."""
    refined = crf(pixels, soft)
    regions = regions_of(pixels, truth)

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(regions[chosen], minlength=len(REGIONS))

    wrong = count((soft >= BLURRED_PROBABILITY) != truth)
    wrong_refined = count((refined >= BLURRED_PROBABILITY) != truth)
    return Failure(name, truth, soft, refined, count(np.ones_like(truth)), wrong, wrong_refined)


def region_rows(failures: list[Failure]) -> list[dict[str, str]]:
    """By region its share of all pixels and of all wrong ones, and how much of it is wrong."""
    pixels, wrong, refined = (
        np.sum([getattr(failure, name) for failure in failures], axis=0)
        for name in ("pixels", "wrong", "wrong_refined")
    )
    return [
        {
            "region": region,
            "share_of_pixels": f"{pixels[i] / pixels.sum():.4f}",
            "share_of_wrong": f"{wrong[i] / wrong.sum():.4f}",
            "wrong": f"{wrong[i] / pixels[i]:.4f}",
            "wrong_after_crf": f"{refined[i] / pixels[i]:.4f}",
        }
        for i, region in enumerate(REGIONS)
    ]


def worst(failures: list[Failure], region: str) -> list[Failure]:
    """The photos with the largest share of a region wrong, where it is no small part of them."""
    index = REGIONS.index(region)
    large = [one for one in failures if one.pixels[index] >= SHOWN_FROM * one.truth.size]
    return sorted(large, key=lambda one: one.wrong[index] / one.pixels[index], reverse=True)[:SHOWN]


def error_map(soft: np.ndarray, truth: np.ndarray) -> Image.Image:
    """Right and wrong pixels in four colours."""
    return Image.fromarray(COLOURS[truth.astype(int), (soft >= BLURRED_PROBABILITY).astype(int)])


def draw(columns: list[tuple[str, Failure]]) -> None:
    """One column a photo: its soft map, what is wrong with it, what is wrong after the CRF."""
    width = len(columns) * (CELL[0] + 8) - 8
    sheet = Image.new("RGB", (width, 3 * (CELL[1] + CAPTION)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (region, one) in enumerate(columns):
        index = REGIONS.index(region)
        before, after = (
            f"{region} {100 * counts[index] / one.pixels[index]:.0f} % wrong"
            for counts in (one.wrong, one.wrong_refined)
        )
        cells = (
            (Image.fromarray((one.soft * 255).astype(np.uint8)).convert("RGB"), f"{one.name}: soft map"),
            (error_map(one.soft, one.truth), before),
            (error_map(one.refined, one.truth), f"after the CRF: {after}"),
        )
        for line, (image, caption) in enumerate(cells):
            left, top = column * (CELL[0] + 8), line * (CELL[1] + CAPTION)
            image.thumbnail(CELL)
            sheet.paste(image, (left, top))
            canvas.text((left, top + CELL[1] + 3), caption, "black", font)
    sheet.save(PICTURE, optimize=True)


def main() -> int:
    """Examine every test photo's map; write results/failures.csv and docs/images/failures.png."""
    model = bdnet.load()
    failures = []
    for photo in read_dataset(str(data_folder() / "blurraw"), "test"):
        pixels, mask = read_pair(photo)
        failures.append(examine(photo.name, pixels, mask > 0, predict(model, pixels)[0]))
    write_csv("failures", region_rows(failures))
    right = [one for one in failures if one.name not in INVERTED_MASKS["test"]]
    flat = worst(right, "flat")
    others = [one for one in right if one.name not in {shown.name for shown in flat}]
    draw([*(("flat", one) for one in flat), *(("border", one) for one in worst(others, "border"))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
