"""What a recipe gives on photos that it didn't see: ``python -m benchmarks.out_of_fold FOLDS NAME``.

FOLDS is what ``jobs.train … --folds K`` wrote. Each fold's model marks the photos that it held out, so every
training photo is marked once by a network that never saw it. What was counted is kept (fold_photos.csv,
fold_margins.csv), so that folds may be trained and marked one by one, on several machines. From these counts
alone come the fold scores (kfold.csv), how far a probability can be believed, the temperature that mends it
and how far it does where it wasn't chosen (calibration.csv), and what the verdict does to whole-frame blur
(verdict_thresholds.csv). Kinds weigh alike in the last two.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy import optimize
from scipy.special import expit, logit

from bdnet import load, metrics
from bdnet.augment import whole_frame_blur
from bdnet.detect import BLURRED_PROBABILITY
from bdnet.model import Model
from bdnet.output import BLUR_KINDS
from benchmarks.data import data_folder
from benchmarks.marking import predict
from benchmarks.tables import measured_on, read_csv, replace_rows
from pipeline.dataset import LabelledPhoto, read_dataset, read_pair

BINS = 20
# Every eighth pixel of every eighth row: neighbours tell little that is new.
STEP = 8
# Logits of blurred are counted in steps of a tenth, from -16 to 16.
STEPS_PER_LOGIT = 10
MARGIN_STEPS = 160
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
    """One held-out photo: its confusion matrix, shares of pixels called blurred, of its blurred twin too."""

    photo: str
    kind: str
    fold: int
    confusion: np.ndarray  # int64 [2, 2]
    truly_blurred: float
    blurred_fraction: float
    twin_blurred_fraction: float  # of the photo blurred as a whole
    kind_said: str


def mark(
    model: Model, photo: LabelledPhoto, fold: int, rng: np.random.Generator
) -> tuple[Marked, np.ndarray]:
    """Mark a photo and its twin; also the shares of pixels by truth and margin, float64 [2, steps]."""
    pixels, mask = read_pair(photo)
    truth = mask > 0
    # The temperature is what is looked for.
    assert model.card.temperature == 1
    probability, kinds = predict(model, pixels)
    twin, _ = whole_frame_blur(pixels, rng)
    marked = Marked(
        photo=photo.name,
        kind=photo.kind,
        fold=fold,
        confusion=metrics.confusion(probability >= BLURRED_PROBABILITY, truth),
        truly_blurred=float(truth.mean()),
        blurred_fraction=float((probability >= BLURRED_PROBABILITY).mean()),
        twin_blurred_fraction=float((predict(model, twin)[0] >= BLURRED_PROBABILITY).mean()),
        kind_said="" if kinds is None else BLUR_KINDS[int(kinds.argmax())],
    )
    sample = np.s_[::STEP, ::STEP]
    return marked, margin_shares(probability[sample].ravel(), truth[sample].ravel())


def margin_shares(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Shares of pixels that are sharp (0) and blurred (1) by step of the logit, float64 [2, steps]."""
    step = np.rint(logit(probability.astype(np.float64)) * STEPS_PER_LOGIT)
    step = step.clip(-MARGIN_STEPS, MARGIN_STEPS).astype(np.int64) + MARGIN_STEPS
    steps = 2 * MARGIN_STEPS + 1
    return np.bincount(truth * steps + step, minlength=2 * steps).reshape(2, steps) / truth.size


def mark_fold(folder: Path, fold: int) -> tuple[list[Marked], dict[str, np.ndarray]]:
    """Mark the photos that a fold held out; also their ``margin_shares``, summed by kind."""
    photos = {photo.name: photo for photo in read_dataset(str(data_folder() / "blurraw"), "train")}
    model = load(str(folder / "model"))
    marked, shares = [], dict.fromkeys(BLUR_KINDS, np.zeros(()))
    for number, name in enumerate(model.card.data["validation_photos"]):
        one, its_shares = mark(model, photos[name], fold, np.random.default_rng([fold, number]))
        marked.append(one)
        shares[one.kind] = shares[one.kind] + its_shares
    print(f"{folder.name}: {len(marked)} photos", file=sys.stderr)
    return marked, shares


def photo_rows(name: str, marked: list[Marked]) -> list[dict[str, Any]]:
    """What is kept of each photo."""
    rows = []
    for one in marked:
        row = {"model": name, "fold": one.fold, "photo": one.photo, "kind": one.kind}
        row |= dict(zip(metrics.CELLS, one.confusion.ravel().tolist(), strict=True))
        fields = ("truly_blurred", "blurred_fraction", "twin_blurred_fraction")
        row |= {field: f"{getattr(one, field):.5f}" for field in fields}
        rows.append({**row, "kind_said": one.kind_said})
    return rows


def read_photos(name: str) -> list[Marked]:
    """What was kept of a model's photos."""
    return [
        Marked(
            photo=row["photo"],
            kind=row["kind"],
            fold=int(row["fold"]),
            confusion=np.array([int(row[cell]) for cell in metrics.CELLS]).reshape(2, 2),
            truly_blurred=float(row["truly_blurred"]),
            blurred_fraction=float(row["blurred_fraction"]),
            twin_blurred_fraction=float(row["twin_blurred_fraction"]),
            kind_said=row["kind_said"],
        )
        for row in read_csv("fold_photos")
        if row["model"] == name
    ]


def margin_rows(name: str, fold: int, shares: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """What is kept of the pixels: steps that occur, in shares of photos."""
    rows = []
    for kind, its_shares in shares.items():
        for step in np.flatnonzero(its_shares.any(0)):
            row = {"model": name, "fold": fold, "kind": kind, "step": step - MARGIN_STEPS}
            sharp, blurred = its_shares[:, step]
            rows.append({**row, "sharp": f"{sharp:.6f}", "blurred": f"{blurred:.6f}"})
    return rows


def read_margins(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A model's logits of blurred, float64 [n], weights of sharp and blurred pixels, [2, n], and folds, [n].

    Photos of a kind share one half, whatever their number and size.
    """
    rows = [row for row in read_csv("fold_margins") if row["model"] == name]
    margin = np.array([int(row["step"]) / STEPS_PER_LOGIT for row in rows])
    weight = np.array([[float(row[truth]) for row in rows] for truth in ("sharp", "blurred")])
    kind = np.array([row["kind"] for row in rows])
    for its in BLUR_KINDS:
        weight[:, kind == its] *= 0.5 / weight[:, kind == its].sum()
    return margin, weight, np.array([int(row["fold"]) for row in rows])


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


def best_temperature(margin: np.ndarray, weight: np.ndarray) -> float:
    """The divisor of the logits with the least cross-entropy; see ``read_margins``."""

    def cross_entropy(temperature: float) -> float:
        signed = np.stack([margin, -margin]) / temperature
        return float((weight * np.logaddexp(0, signed)).sum())

    return float(optimize.minimize_scalar(cross_entropy, bounds=(0.2, 5.0), method="bounded").x)


def softened(margin: np.ndarray, weight: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Probabilities of blurred, each fold's by the temperature that the others gave."""
    probability = np.empty_like(margin)
    for held_out in np.unique(fold):
        here = fold == held_out
        probability[here] = expit(margin[here] / best_temperature(margin[~here], weight[:, ~here]))
    return probability


def calibration_rows(
    name: str, temperature: float, probability: np.ndarray, weight: np.ndarray
) -> list[dict[str, Any]]:
    """How often pixels of a probability are blurred; the weighted gap is the calibration error.

    Beside it two scores that no probability but the true one makes best: log loss, in nats, and Brier score.
    """
    index = np.minimum((probability * BINS).astype(int), BINS - 1)
    share = np.bincount(index, weight.sum(0), BINS)
    said = np.bincount(index, weight.sum(0) * probability, BINS) / np.maximum(share, 1e-12)
    found = np.bincount(index, weight[1], BINS) / np.maximum(share, 1e-12)
    error = float((share * np.abs(said - found)).sum())
    log_loss = -float((weight * np.log([1 - probability, probability])).sum())
    brier = float((weight * np.square([probability, 1 - probability])).sum())
    return [
        {
            "model": name,
            "temperature": f"{temperature:.3f}",
            "calibration_error": f"{error:.4f}",
            "log_loss": f"{log_loss:.4f}",
            "brier": f"{brier:.4f}",
            "from": f"{low / BINS:.2f}",
            "share": f"{share[low]:.4f}",
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
        found: list[float] = []
        wrongly: list[np.ndarray] = []
        for kind in BLUR_KINDS:
            its = [m for m in marked if m.kind == kind]
            found.append(float(np.mean([m.twin_blurred_fraction > threshold for m in its])))
            sound = [m.blurred_fraction > threshold for m in its if m.truly_blurred <= threshold]
            wrongly.append(np.array(sound))
        recall, false_rate = np.mean(found), np.mean([np.mean(sound) for sound in wrongly])
        rows.append(
            {
                "model": name,
                "blurred_above": f"{threshold:.2f}",
                "recall": f"{recall:.4f}",
                "precision": f"{recall / max(recall + false_rate, 1e-12):.4f}",
                "wrongly_blurred": f"{false_rate:.4f}",
                "photos": sum(len(sound) for sound in wrongly),
                "photos_wrongly_blurred": sum(int(sound.sum()) for sound in wrongly),
            }
        )
    return rows


def history_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """Loss and validation score of each epoch of a fold."""
    rows = []
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


def main() -> int:
    """Mark what folds are there, keep what was counted, and write the tables of all that was kept."""
    settings = tyro.cli(Settings, description=__doc__)
    name = settings.name
    for folder in sorted(settings.folds.glob("fold-*")):
        fold = int(folder.name.removeprefix("fold-"))
        marked, shares = mark_fold(folder, fold)
        replace_rows("fold_photos", photo_rows(name, marked), "model", "fold")
        replace_rows("fold_margins", margin_rows(name, fold, shares), "model", "fold")
        replace_rows("training_curves", history_rows(name, folder), "model", "run")
    photos = read_photos(name)
    scored = {row["fold"] for row in read_csv("kfold") if row["model"] == name} - {"all"}
    if lost := sorted(scored - {str(one.fold) for one in photos}):
        sys.exit(
            f"kfold.csv has fold {', '.join(lost)} of {name}, but fold_photos.csv doesn't: mark it again, or "
            "delete its rows from kfold.csv"
        )
    behind = measured_on(*(row for row in read_csv("fold_photos") if row["model"] == name))
    replace_rows("kfold", [row | behind for row in fold_rows(name, photos)], "model")
    margin, weight, fold_of = read_margins(name)
    temperature = best_temperature(margin, weight)
    rows = calibration_rows(name, 1.0, expit(margin), weight)
    if len(np.unique(fold_of)) > 1:
        rows += calibration_rows(name, temperature, softened(margin, weight, fold_of), weight)
    replace_rows("calibration", [row | behind for row in rows], "model")
    replace_rows("verdict_thresholds", [row | behind for row in verdict_rows(name, photos)], "model")
    print(json.dumps({"temperature": temperature}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
