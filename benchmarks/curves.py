"""Precision and recall, and where the maps fail: ``python -m benchmarks.curves [--models NAME …]``.

Writes pr_curves.csv (the models and the peers' published maps on BlurRaw's test photos, all pixels pooled)
and docs/images/failures.png: the first model's worst test photos, as maps of what is right and wrong. The
photos themselves are others' work and stay out; their names are above the maps.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

import bdnet
from bdnet import metrics
from bdnet.card import DEFAULT_MODEL
from bdnet.refine import crf
from benchmarks.command import data_folder, write_csv
from pipeline.dataset import LabelledPhoto, read_dataset, read_pair

PEERS = ("EFPN", "EHS", "JNB")
LEVELS = 256
PRINTED = range(0, LEVELS, 8)
WORST = 4
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "failures.png"
CELL = (300, 225)
CAPTION = 24
# Of a pixel by (truth, said): right sharp, wrongly blurred, wrongly sharp, right blurred.
COLOURS = np.array([[(235, 235, 235), (230, 120, 40)], [(40, 110, 220), (90, 90, 90)]], np.uint8)


@dataclass(frozen=True)
class Settings:
    """Draw the curves and the failures."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """Names, folders or URIs; the failures are the first one's."""


def given_map(folder: Path, photo: LabelledPhoto, shape: tuple[int, ...]) -> np.ndarray:
    """A published map as float32 H×W at the mask's size."""
    image = Image.open(folder / f"{photo.name}.png").convert("L")
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR), np.float32) / 255


def curve_rows(name: str, counts: np.ndarray) -> Iterator[dict[str, Any]]:
    """Precision and recall of blurred = map ≥ level; counts int64 [2, LEVELS]: sharp and blurred pixels."""
    above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    for level in PRINTED:
        wrong, right = above[:, level]
        yield {
            "method": name,
            "threshold": f"{level / (LEVELS - 1):.3f}",
            "precision": f"{right / max(1, right + wrong):.4f}",
            "recall": f"{right / counts[1].sum():.4f}",
        }


def error_map(soft: np.ndarray, truth: np.ndarray) -> Image.Image:
    """Right and wrong pixels in four colours."""
    return Image.fromarray(COLOURS[truth.astype(int), (soft >= 0.5).astype(int)])


def draw_failures(failures: list[tuple[str, float, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """One column a photo: its soft map, what is wrong with it, what is wrong after the CRF."""
    width = len(failures) * (CELL[0] + 8) - 8
    sheet = Image.new("RGB", (width, 3 * (CELL[1] + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (name, score, pixels, soft, truth) in enumerate(failures):
        refined = crf(pixels, soft)
        after = metrics.scores(metrics.confusion(refined >= 0.5, truth))["mean_iou"]
        cells = (
            (Image.fromarray((soft * 255).astype(np.uint8)).convert("RGB"), f"{name}: soft map"),
            (error_map(soft, truth), f"mean IoU {score:.2f}"),
            (error_map(refined, truth), f"after the CRF {after:.2f}"),
        )
        for line, (image, caption) in enumerate(cells):
            left, top = column * (CELL[0] + 8), line * (CELL[1] + CAPTION)
            image.thumbnail(CELL)
            sheet.paste(image, (left, top))
            draw.text((left, top + CELL[1] + 3), caption, "black", font)
    sheet.save(PICTURE, optimize=True)


def main() -> int:
    """Score every map of the test photos, write the curves and the picture."""
    settings = tyro.cli(Settings, description=__doc__)
    data = data_folder()
    models = {Path(name).name: bdnet.load(name) for name in settings.models}
    counts = {name: np.zeros((2, LEVELS), np.int64) for name in (*models, *PEERS)}
    first = next(iter(models))
    failures = []
    for photo in read_dataset(str(data / "blurraw"), "test"):
        pixels, mask = read_pair(photo)
        truth = mask > 0
        for name in counts:
            if name in models:
                soft = models[name].probability(pixels)
            else:
                soft = given_map(data / "peer_maps" / name, photo, truth.shape)
            levels = np.rint(soft * (LEVELS - 1)).astype(np.int64)
            both = np.bincount(levels.ravel() + LEVELS * truth.ravel(), minlength=2 * LEVELS)
            counts[name] += both.reshape(2, LEVELS)
            if name == first:
                score = metrics.scores(metrics.confusion(soft >= 0.5, truth))["mean_iou"]
                assert score is not None  # a photo has pixels
                failures.append((photo.name, score, pixels, soft, truth))
    write_csv("pr_curves", [row for name, its in counts.items() for row in curve_rows(name, its)])
    draw_failures(sorted(failures, key=lambda failure: failure[1])[:WORST])
    return 0


if __name__ == "__main__":
    sys.exit(main())
