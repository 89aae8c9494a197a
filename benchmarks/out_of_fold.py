"""What a recipe gives on photos that it didn't see: ``python -m benchmarks.out_of_fold FOLDS NAME``.

FOLDS is what ``jobs.train … --folds K`` wrote. Each fold's model marks the photos that it held out, so every
training photo is marked once by a network that never saw it. From these maps alone come the fold scores
(kfold.csv), how far a probability can be believed and the temperature that mends it (calibration.csv), and
what the verdict does to whole-frame blur (verdict_thresholds.csv). Kinds weigh alike in the last two.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from scipy import optimize
from scipy.special import expit, logit

from bdnet import load, metrics
from bdnet.augment import whole_frame_blur
from bdnet.model import Model
from bdnet.output import BLUR_KINDS
from bdnet.photo import size_at
from benchmarks.command import data_folder, read_csv, write_csv
from pipeline.dataset import LabelledPhoto, read_dataset, read_pair

BINS = 20
# Every eighth pixel of every eighth row: neighbours tell little that is new.
STEP = 8
BLURRED_ABOVE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Settings:
    """Measure the folds of one training."""

    folds: Annotated[Path, tyro.conf.Positional]
    """Folder that jobs.train --folds K wrote."""
    name: Annotated[str, tyro.conf.Positional]
    """Its name in the tables."""


@dataclass(frozen=True)
class Marked:
    """One held-out photo: its kind and fold, the confusion matrix, some pixels, and its blurred twin."""

    kind: str
    fold: int
    confusion: np.ndarray  # int64 [2, 2]
    probability: np.ndarray  # float32 [pixels], the sample
    truth: np.ndarray  # bool [pixels]
    truly_blurred: float
    blurred_fraction: float
    twin_blurred_fraction: float  # of the photo blurred as a whole
    kind_said: str | None


def mark(model: Model, photo: LabelledPhoto, fold: int, rng: np.random.Generator) -> Marked:
    """Mark a photo and its twin."""
    pixels, mask = read_pair(photo)
    truth = mask > 0
    # The temperature is what is looked for.
    assert model.card.temperature == 1
    probability, kinds = predict(model, pixels)
    twin, _ = whole_frame_blur(pixels, rng)
    sample = np.s_[::STEP, ::STEP]
    return Marked(
        kind=photo.kind,
        fold=fold,
        confusion=metrics.confusion(probability >= 0.5, truth),
        probability=probability[sample].ravel(),
        truth=truth[sample].ravel(),
        truly_blurred=float(truth.mean()),
        blurred_fraction=float((probability >= 0.5).mean()),
        twin_blurred_fraction=float((predict(model, twin)[0] >= 0.5).mean()),
        kind_said=None if kinds is None else BLUR_KINDS[int(kinds.argmax())],
    )


def predict(model: Model, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Mark a photo at the model's working size; the map, float32 H×W, has the photo's own size again."""
    height, width, _ = pixels.shape
    size = size_at(width, height, model.card.working_size)
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    probabilities, kinds = model.predict(pixels.copy()[None])
    probability = probabilities[0]
    if size != (width, height):
        whole = Image.fromarray(probability).resize((width, height), Image.Resampling.BILINEAR)
        probability = np.asarray(whole)
    return probability, None if kinds is None else kinds[0]


def mark_all(folds: Path) -> Iterator[Marked]:
    """Mark every photo with the model of the fold that held it out."""
    photos = {photo.name: photo for photo in read_dataset(str(data_folder() / "blurraw"), "train")}
    for fold, folder in enumerate(sorted(folds.glob("fold-*"))):
        model = load(str(folder / "model"))
        held_out = model.card.data["validation_photos"]
        for number, name in enumerate(held_out):
            yield mark(model, photos[name], fold, np.random.default_rng([fold, number]))
        print(f"{folder.name}: {len(held_out)} photos", file=sys.stderr)


def weights(marked: list[Marked]) -> np.ndarray:
    """Weight of each sampled pixel: photos of a kind share one half, whatever their number and size."""
    count = {kind: sum(m.kind == kind for m in marked) for kind in BLUR_KINDS}
    return np.concatenate(
        [np.full(m.truth.size, 0.5 / count[m.kind] / m.truth.size, np.float64) for m in marked]
    )


def fold_rows(name: str, marked: list[Marked]) -> list[dict[str, Any]]:
    """Scores of each fold and of all, by one confusion matrix, with kinds apart and alike."""
    rows = []
    for fold in (*sorted({m.fold for m in marked}), "all"):
        its = [m for m in marked if fold in ("all", m.fold)]
        matrices = np.stack([m.confusion for m in its])
        row: dict[str, Any] = {"model": name, "fold": fold, "photos": len(its)}
        row |= {key: f"{value:.4f}" for key, value in metrics.scores(matrices.sum(0)).items()}
        low, high = metrics.bootstrap_interval(matrices, lambda c: metrics.score_stack(c)["mean_iou"])
        row |= {"mean_iou_low": f"{low:.4f}", "mean_iou_high": f"{high:.4f}"}
        kinds = []
        for kind in BLUR_KINDS:
            of_kind = np.sum([m.confusion for m in its if m.kind == kind], axis=0)
            kinds.append(of_kind / of_kind.sum())
            row[f"mean_iou_{kind}"] = f"{metrics.scores(of_kind)['mean_iou']:.4f}"
        alike = metrics.score_stack(np.sum(kinds, axis=0) * 1e9)["mean_iou"]
        row["mean_iou_kinds_alike"] = f"{alike:.4f}"
        said = [np.mean([m.kind_said == m.kind for m in its if m.kind == kind]) for kind in BLUR_KINDS]
        row["kind_balanced_accuracy"] = f"{np.mean(said):.4f}"
        rows.append(row)
    return rows


def best_temperature(margin: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """The divisor of the logits with the least cross-entropy.

    Args:
        margin: float64 [pixels], logit of blurred.
        truth: bool [pixels].
        weight: float64 [pixels].
    """

    def cross_entropy(temperature: float) -> float:
        signed = np.where(truth, -margin, margin) / temperature
        return float((weight * np.logaddexp(0, signed)).sum() / weight.sum())

    return float(optimize.minimize_scalar(cross_entropy, bounds=(0.2, 5.0), method="bounded").x)


def calibration_rows(
    name: str, temperature: float, probability: np.ndarray, truth: np.ndarray, weight: np.ndarray
) -> list[dict[str, Any]]:
    """How often pixels of a probability are blurred; the weighted gap is the calibration error."""
    index = np.minimum((probability * BINS).astype(int), BINS - 1)
    share = np.bincount(index, weight, BINS)
    said = np.bincount(index, weight * probability, BINS) / np.maximum(share, 1e-12)
    found = np.bincount(index, weight * truth, BINS) / np.maximum(share, 1e-12)
    error = float((share * np.abs(said - found)).sum() / share.sum())
    return [
        {
            "model": name,
            "temperature": f"{temperature:.3f}",
            "calibration_error": f"{error:.4f}",
            "from": f"{low / BINS:.2f}",
            "share": f"{share[low] / share.sum():.4f}",
            "probability": f"{said[low]:.4f}",
            "blurred": f"{found[low]:.4f}",
        }
        for low in range(BINS)
    ]


def verdict_rows(name: str, marked: list[Marked]) -> list[dict[str, Any]]:
    """Precision and recall of the verdict "blurred" by threshold: twins are blurred, photos aren't.

    A photo whose mask covers more than the threshold is left out: there the verdict is right both ways.
    """
    rows = []
    for threshold in BLURRED_ABOVE:
        found = wrongly = all_twins = 0.0
        for kind in BLUR_KINDS:
            its = [m for m in marked if m.kind == kind]
            sound = [m for m in its if m.truly_blurred <= threshold]
            found += float(np.mean([m.twin_blurred_fraction > threshold for m in its]))
            wrongly += float(np.mean([m.blurred_fraction > threshold for m in sound]))
            all_twins += 1
        rows.append(
            {
                "model": name,
                "blurred_above": f"{threshold:.2f}",
                "recall": f"{found / all_twins:.4f}",
                "precision": f"{found / max(found + wrongly, 1e-12):.4f}",
                "wrongly_blurred": f"{wrongly / all_twins:.4f}",
            }
        )
    return rows


def history_rows(name: str, folds: Path) -> list[dict[str, Any]]:
    """Loss and validation score of each epoch of each fold."""
    rows = []
    for folder in sorted(folds.glob("fold-*")):
        for epoch in json.loads((folder / "history.json").read_text()):
            score = epoch.get("val_mean_iou")
            rows.append(
                {
                    "model": name,
                    "run": f"{name} {folder.name}",
                    "epoch": epoch["epoch"],
                    "loss": f"{epoch['loss']:.4f}",
                    "val_mean_iou": "" if score is None else f"{score:.4f}",
                }
            )
    return rows


def replace_rows(table: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of this model into a table beside those of the others."""
    kept = [row for row in read_csv(table) if row["model"] != name]
    write_csv(table, [*kept, *rows])


def main() -> int:
    """Mark, measure and write the tables."""
    settings = tyro.cli(Settings, description=__doc__)
    marked = list(mark_all(settings.folds))
    name = settings.name
    replace_rows("training_curves", name, history_rows(name, settings.folds))
    replace_rows("kfold", name, fold_rows(name, marked))
    weight = weights(marked)
    truth = np.concatenate([m.truth for m in marked])
    probability = np.concatenate([m.probability for m in marked]).astype(np.float64)
    margin = logit(probability.clip(1e-7, 1 - 1e-7))
    temperature = best_temperature(margin, truth, weight)
    rows = calibration_rows(name, 1.0, probability, truth, weight)
    rows += calibration_rows(name, temperature, expit(margin / temperature), truth, weight)
    replace_rows("calibration", name, rows)
    replace_rows("verdict_thresholds", name, verdict_rows(name, marked))
    print(json.dumps({"temperature": temperature}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
