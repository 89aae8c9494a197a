"""Train and score one network after the other, for the tables of docs/paper.md; nothing is done twice.

A row that is in results/ is done, wherever it was made. An experiment has a folder: the checkpoint of each
epoch while it trains, ``model/`` when it is trained, ``test/`` when it is scored. The same command goes on
where a killed one was. To make a row again, delete it and choose a new folder: its experiment's would answer.
The baseline that rows are paired with is in baseline_photos.csv: delete that too, with all rows.
"""

import csv
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

from bdnet import metrics
from bdnet.card import Card
from bdnet.detect import BLURRED_PROBABILITY
from bdnet.model import Model, load
from bdnet.networks import build
from bdnet.photo import decode
from bdnet.recipes import Recipe, equal_budget
from bdnet.refine import Refinement
from bdnet.refine import refine as refined
from benchmarks.archive_auc import label
from benchmarks.command import run
from benchmarks.data import data_folder
from benchmarks.tables import read_csv, replace_rows, write_csv
from pipeline import cluster
from pipeline.dataset import read_dataset, read_pair
from pipeline.training import TrainingSettings, train

TERMS = "BlurRaw (Shi, Xu, Jia, CVPR 2014): given for research"
# What a probe of the learning rate tries.
RATES = (3e-4, 1e-3, 3e-3)
# A landscape photo at working size.
HEIGHT, WIDTH = 448, 640
TIMED_EVERY = 16  # test photos, the first of them to warm up
SCORES = (*metrics.SCORES, "mae")


@dataclass(frozen=True)
class Experiment:
    """One network to train on all training photos, or on a ``share`` of them, and its recipe."""

    name: str
    arch: str
    recipe: Recipe
    pretrained: bool = True  # from ImageNet, as far as weights are at hand
    cut: str = "photos"
    share: float = 1.0
    seed: int = 0


# The probe puts the rate in.
START = equal_budget(0.0)
# What every row of both tables is compared with.
BASELINE = Experiment("bdnet-resnet18", "bdnet-resnet18", START)


def with_rate(experiment: Experiment, rate: float) -> Experiment:
    """The experiment at a learning rate."""
    return replace(experiment, recipe=replace(experiment.recipe, learning_rate=rate))


@dataclass(frozen=True)
class Lab:
    """Train and score, or go on doing so: a folder of experiments and what they start from."""

    out: Path
    """Folder for patches, checkpoints and models."""
    weights: str = "imagenet"
    """ImageNet weights of ResNet-18: imagenet (torchvision downloads them) or a .safetensors file."""

    def __post_init__(self) -> None:
        # Ray's workers stand in other folders.
        object.__setattr__(self, "out", self.out.absolute())

    def patches(self, cut: str, share: float = 1.0, split: str = "train") -> Path:
        """The patch dataset of a cut, made where it isn't yet."""
        folder = self.out / "patches" / f"{cut}-{split}-{round(100 * share)}"
        if not (folder / "dataset.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            dataset = self._share_of_blurraw(share) if share < 1 else data_folder() / "blurraw"
            run("jobs.prepare", str(dataset), "--cut", cut, "--split", split, "--out", str(folder))
        return folder

    def _share_of_blurraw(self, share: float) -> Path:
        """A DATASET with a share of each kind's photos, drawn at random; a larger one holds a smaller one."""
        whole, part = data_folder() / "blurraw", self.out / "patches" / f"blurraw-{round(100 * share)}"
        part.mkdir(parents=True, exist_ok=True)
        for name in ("images", "masks"):
            if not (part / name).exists():
                os.symlink(whole / name, part / name)
        with (whole / "index.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
        # Neighbours in the index are often alike: its first photos would be a biased share.
        rng = np.random.default_rng(0)
        kept = []
        for kind in sorted({row["kind"] for row in rows}):
            its = [row for row in rows if row["kind"] == kind]
            kept += [its[index] for index in rng.permutation(len(its))[: round(share * len(its))]]
        with (part / "index.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
        return part

    def folder(self, experiment: Experiment) -> Path:
        """The experiment's own folder for these weights, shared by those that differ in name alone."""
        start = Path(self.weights).name
        settings = json.dumps([asdict(replace(experiment, name="")), start], sort_keys=True)
        return self.out / f"{experiment.arch}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def train(self, experiment: Experiment) -> dict[str, Any]:
        """Train as ``jobs.train --all-photos`` does; returns its result."""
        folder = self.folder(experiment)
        result = folder / "result.json"
        if not result.exists():
            settings = TrainingSettings(
                patches=str(self.patches(experiment.cut, experiment.share)),
                out=str(folder),
                arch=experiment.arch,
                recipe=experiment.recipe,
                init=self.weights if experiment.pretrained else "none",
                workers=1,
                seed=experiment.seed,
                validation_folds=0,
                fold=0,
                terms=TERMS,
                command=f"python -m benchmarks: {experiment.name}",
            )
            with cluster.connect(1) as shares:
                trained = train(settings, shares)
            result.write_text(json.dumps(trained))
            # Optimizer states are several times the weights.
            (folder / "checkpoint.pt").unlink()
            shutil.rmtree(folder / "ray", ignore_errors=True)
        return json.loads(result.read_text())

    def probe(self, experiment: Experiment) -> float:
        """The learning rate of RATES with the lowest loss on crops that were not learned from yet.

        One pass over a quarter of the training photos with each rate: the loss of a step is taken before the
        step learns from it. results/probes.csv keeps the losses; what is there isn't probed again.
        """
        probed = {row["rate"]: row for row in read_csv("probes") if row["system"] == experiment.name}
        for rate in RATES:
            if f"{rate:g}" in probed:
                continue
            recipe = replace(experiment.recipe, learning_rate=rate, epochs=1, crops_per_epoch=None)
            name = f"{experiment.name}, rate {rate:g}"
            one_pass = replace(experiment, name=name, recipe=recipe, share=0.25)
            try:
                loss = self.train(one_pass)["loss"]
            except ValueError as error:  # weights that are not finite can't be saved
                print(f"{name}: {error}", file=sys.stderr)
                loss = float("inf")
            row = {"system": experiment.name, "rate": f"{rate:g}", "loss": f"{loss:.4f}"}
            replace_rows("probes", [row], "system", "rate")
            probed[row["rate"]] = row
        return min(RATES, key=lambda rate: float(probed[f"{rate:g}"]["loss"]))

    def score(self, experiment: Experiment, refine: Refinement = "none") -> "Scored":
        """Score a trained network on the test photos with ``jobs.evaluate``."""
        folder = self.folder(experiment)
        out = folder / ("test" if refine == "none" else f"test-{refine}")
        if not (out / "result.json").exists():
            model = ["--model", str(folder / "model"), "--refine", refine]
            run("jobs.evaluate", str(data_folder() / "blurraw"), *model, "--out", str(out))
        return read_scored(out)

    def score_windows(self, experiment: Experiment) -> "Scored":
        """Score a trained network on BlurDB2, the paper's windows of 256² of the test photos."""
        folder = self.folder(experiment)
        out = folder / "test-blurdb2"
        if not (out / "result.json").exists():
            windows = str(self.patches("blurdb2", split="test"))
            run("jobs.evaluate", windows, "--model", str(folder / "model"), "--out", str(out))
        return read_scored(out)

    def archive_auc(self, experiment: Experiment) -> dict[str, str]:
        """Does a trained network's share of blurred pixels tell the blurred photos of archive/?"""
        model = load(str(self.folder(experiment) / "model"))
        photos = sorted((data_folder() / "archive").glob("*.jpg"))
        fractions = []
        for photo in photos:
            pixels = decode(photo.read_bytes(), model.card.working_size).pixels
            assert pixels is not None
            fractions.append((model.probability(pixels) >= BLURRED_PROBABILITY).mean())
        blurred = [label(str(photo)) != "S" for photo in photos]
        return {"archive_auc": f"{roc_auc_score(blurred, fractions):.4f}"}


@dataclass(frozen=True)
class Scored:
    """What ``jobs.evaluate`` wrote: its result, and the confusion matrix of each photo, sorted by name."""

    result: dict[str, Any]
    photos: list[str]
    confusions: np.ndarray  # int64 [photos, 2, 2]


def read_scored(folder: Path) -> Scored:
    """Read an evaluation's folder."""
    table = pq.read_table(folder / "photos.parquet", columns=["name", *metrics.CELLS]).sort_by("name")
    cells = np.stack([table[name].to_numpy() for name in metrics.CELLS], axis=1)
    result = json.loads((folder / "result.json").read_text())
    return Scored(result, table["name"].to_pylist(), cells.reshape(-1, 2, 2))


def ensure_baseline(lab: Lab) -> None:
    """Train and score the baseline where no table has its photos yet."""
    if read_baseline():
        return
    experiment = with_rate(BASELINE, lab.probe(BASELINE))
    lab.train(experiment)
    write_csv("baseline_photos", photo_cells(lab.score(experiment)))


def read_baseline() -> dict[str, np.ndarray]:
    """By photo its confusion matrix, int64 [2, 2]; empty where the baseline is not scored yet."""
    return read_photo_cells(read_csv("baseline_photos"))


def photo_cells(scored: Scored) -> list[dict[str, Any]]:
    """A row for each photo: its name and its confusion matrix."""
    cells = scored.confusions.reshape(-1, len(metrics.CELLS)).tolist()
    pairs = zip(scored.photos, cells, strict=True)
    return [{"photo": name, **dict(zip(metrics.CELLS, row, strict=True))} for name, row in pairs]


def read_photo_cells(rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """By photo its confusion matrix, int64 [2, 2], from rows of ``photo_cells``."""
    return {row["photo"]: np.array([int(row[cell]) for cell in metrics.CELLS]).reshape(2, 2) for row in rows}


def complete(table: str, key: str, rows: Mapping[str, Callable[[], dict[str, str]]]) -> None:
    """Make the rows that results/TABLE.csv lacks, one after the other, and write it after each.

    Rows of other networks, that somebody added, stay at its end.

    Args:
        table: name of the table.
        key: the column that tells rows apart.
        rows: by the column's value what makes the row, in the table's order.
    """
    done = {row[key]: row for row in read_csv(table)}
    for name, make in rows.items():
        if name not in done:
            print(f"{table}: {name}", file=sys.stderr)
            done[name] = {key: name, **make()}
            others = [row for name, row in done.items() if name not in rows]
            write_csv(table, [done[name] for name in rows if name in done] + others)


def minus(scored: Scored, baseline: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Points of mean IoU beside a baseline's confusion matrices by photo, with the paired interval."""

    def difference(stack: np.ndarray) -> np.ndarray:
        mean_iou = metrics.score_stack(stack)["mean_iou"]
        return mean_iou[..., 0] - mean_iou[..., 1]

    pair = np.stack([scored.confusions, np.stack([baseline[photo] for photo in scored.photos])], axis=1)
    low, high = metrics.bootstrap_interval(pair, difference)
    return {"minus_baseline": float(difference(pair.sum(0))), "minus_low": low, "minus_high": high}


def score_columns(scored: Scored, baseline: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Scores for a table: pooled, by photo, by kind, and the paired difference from a baseline."""
    result = scored.result
    low, high = result["mean_iou_interval"]
    values = {name: result[name] for name in SCORES}
    values |= {"mean_iou_low": low, "mean_iou_high": high}
    values["mean_iou_by_photo"] = result["per_photo"]["mean_iou"]
    low, high = result["per_photo"]["mean_iou_interval"]
    values |= {"mean_iou_by_photo_low": low, "mean_iou_by_photo_high": high}
    values |= {f"mean_iou_{kind}": result["by_kind"][kind]["mean_iou"] for kind in ("motion", "defocus")}
    values["iou_blurred_defocus"] = result["by_kind"]["defocus"]["iou_blurred"]
    values |= minus(scored, baseline)
    return {name: f"{value:.5f}" for name, value in values.items()}


def cost_columns(arch: str, refine: Refinement = "none") -> dict[str, str]:
    """Parameters, multiplications and time of one photo of 640×448 at the machine's default precision.

    The time has the refinement in it, which depends on the photo's colours: the median of some test photos.
    """
    with torch.device("meta"):
        net = build(arch).eval()
        photo = torch.empty(1, 3, HEIGHT, WIDTH)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(photo)
    model = Model(build(arch), Card(arch=arch, digest=""), "cpu")
    seconds = []
    for labelled in read_dataset(str(data_folder() / "blurraw"), "test")[::TIMED_EVERY]:
        pixels = np.array(Image.fromarray(read_pair(labelled)[0]).resize((WIDTH, HEIGHT)))
        began = time.perf_counter()
        probability, _ = model.predict(pixels[None])
        refined(pixels, probability[0], refine)
        seconds.append(time.perf_counter() - began)
    return {
        "parameters_m": f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}",
        "gmacs": f"{counter.get_total_flops() / 2e9:.1f}",
        "ms": f"{1000 * statistics.median(seconds[1:]):.0f}",
    }


def recipe_columns(recipe: Recipe) -> dict[str, str]:
    """What was trained on how much."""
    fields = asdict(recipe)
    crops = (fields["crops_per_epoch"] or 0) * fields["epochs"]
    side = fields["augmentation"]["crop"]
    return {"crops": str(crops), "crop_side": str(side), "rate": f"{fields['learning_rate']:g}"}
