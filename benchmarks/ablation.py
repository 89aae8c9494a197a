"""What each part of BDNet gives: ``python -m benchmarks.ablation --out DIR [--weights FILE]``.

BDNet on ResNet-18 learns from 9,600 crops of 192², as in the comparison, with one thing changed at a time,
and is scored on the 100 test photos with a paired interval of the difference. Other seeds show how much of a
difference is chance. About an hour and a half on two cores, and as much again for the FCNs on VGG16; to be
interrupted at will: rows that are there are kept.

What normalisation and dropout give is measured as the paper does besides: trained and scored on BlurDB2, with
three seeds, each pair by itself and all of them, in results/ablation_blurdb2.csv. ablation_blurdb2_photos.csv
keeps what was counted.
"""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import tyro

from bdnet import metrics
from bdnet.recipes import equal_budget
from benchmarks.experiments import (
    BASELINE,
    START,
    Experiment,
    Lab,
    complete,
    ensure_baseline,
    photo_cells,
    read_baseline,
    read_photo_cells,
    recipe_columns,
    score_columns,
    with_rate,
)
from benchmarks.tables import measured_on, read_csv, replace_rows

_NET = BASELINE.arch

VARIANTS: tuple[tuple[str, Experiment], ...] = (
    ("none", replace(BASELINE, name="base")),
    # How far trainings that differ in nothing else lie apart.
    *(("seed", replace(BASELINE, name=f"{seed}", seed=seed)) for seed in (1, 2)),
    ("rate", replace(with_rate(BASELINE, 3e-4), name="3e-4")),
    *(("skips", Experiment(f"{s}s", f"{_NET}-{s}s", START)) for s in (32, 16, 8, 4)),
    ("skip norm", Experiment("fixed scale", f"{_NET}-scale", START)),
    ("skip norm", Experiment("no norm", f"{_NET}-plain", START)),
    ("dropout", Experiment("no dropout", f"{_NET}-nodropout", START)),
    ("dropout", Experiment("no norm, no dropout", f"{_NET}-plain-nodropout", START)),
    ("kind branch", Experiment("without", _NET, replace(START, kind_weight=0.0))),
    ("kind branch", Experiment("one mask per kind", "bdnet-typed-resnet18", START)),
    ("encoder", Experiment("frozen", _NET, replace(START, frozen_epochs=START.epochs))),
    ("encoder", Experiment("staged", _NET, replace(START, frozen_epochs=2))),
    ("start", Experiment("from scratch", _NET, START, pretrained=False)),
    ("cut", Experiment("BlurDB1", _NET, START, cut="blurdb1")),
    ("cut", Experiment("BlurDB2", _NET, START, cut="blurdb2")),
    ("cut", Experiment("BlurDB2, plain", f"{_NET}-plain-nodropout", START, cut="blurdb2")),
    ("photos", Experiment("25 %", _NET, START, share=0.25)),
    ("photos", Experiment("50 %", _NET, START, share=0.5)),
    ("FCN on VGG16", Experiment("FCN-2s", "fcn2s-vgg16", START, pretrained=False)),
    ("FCN on VGG16", Experiment("FCN-32s", "fcn32s-vgg16", START, pretrained=False)),
)

# At the rate of the rows above.
SEEDS = (0, 1, 2)
PAIR = {"BDNet": _NET, "no norm, no dropout": f"{_NET}-plain-nodropout"}
ON_BLURDB2: tuple[Experiment, ...] = tuple(
    Experiment(f"{name}, seed {seed}", arch, equal_budget(), cut="blurdb2", seed=seed)
    for seed in SEEDS
    for name, arch in PAIR.items()
)
ALL_SEEDS = {f"{name}, mean of {len(SEEDS)}": name for name in PAIR}


def make_row(lab: Lab, changed: str, variant: Experiment) -> dict[str, str]:
    """Train and score a variant at its rate, else its family's: one for BDNet, one for both FCNs."""
    family = [other for _, other in VARIANTS if other.arch.startswith(variant.arch[:3])]
    rates = {row["to"]: float(row["rate"]) for row in read_csv("ablation")}
    rate = variant.recipe.learning_rate or rates.get(family[0].name) or lab.probe(family[0])
    experiment = with_rate(variant, rate)
    lab.train(experiment)
    row = {"changed": changed, "arch": experiment.arch, **recipe_columns(experiment.recipe)}
    return {**row, **score_columns(lab.score(experiment), read_baseline()), **lab.archive_auc(experiment)}


def make_pair_row(lab: Lab, experiment: Experiment) -> dict[str, str]:
    """Train and score on BlurDB2, beside the same seed with normalisation and dropout."""
    complete_one = replace(experiment, arch=_NET)
    for each in (complete_one, experiment):
        lab.train(each)
    baseline, scored = (lab.score_windows(each) for each in (complete_one, experiment))
    counted = [{"network": experiment.name, **row} for row in photo_cells(scored)]
    replace_rows("ablation_blurdb2_photos", counted, "network")
    row = {"arch": experiment.arch, "seed": str(experiment.seed), **recipe_columns(experiment.recipe)}
    by_photo = dict(zip(baseline.photos, baseline.confusions, strict=True))
    return {**row, **score_columns(scored, by_photo)}


def make_mean_row(name: str) -> dict[str, str]:
    """The mean over seeds of mean IoU and of its difference from BDNet, with intervals over photos."""
    rows = read_csv("ablation_blurdb2_photos")
    by_run = {
        (which, seed): read_photo_cells([row for row in rows if row["network"] == f"{which}, seed {seed}"])
        for which in ("BDNet", name)
        for seed in SEEDS
    }
    photos = sorted(by_run["BDNet", SEEDS[0]])
    # int64 [photos, 2 networks, seeds, 2, 2]
    stack = np.array(
        [[[by_run[which, seed][photo] for seed in SEEDS] for which in ("BDNet", name)] for photo in photos]
    )

    def mean_iou(pooled: np.ndarray) -> np.ndarray:
        return metrics.score_stack(pooled)["mean_iou"].mean(-1)

    def difference(pooled: np.ndarray) -> np.ndarray:
        return mean_iou(pooled)[..., 1] - mean_iou(pooled)[..., 0]

    low, high = metrics.bootstrap_interval(stack[:, 1], mean_iou)
    minus_low, minus_high = metrics.bootstrap_interval(stack, difference)
    values = {"mean_iou": float(mean_iou(stack.sum(0))[1]), "mean_iou_low": low, "mean_iou_high": high}
    values["minus_baseline"] = float(difference(stack.sum(0)))
    values |= {"minus_low": minus_low, "minus_high": minus_high}
    row = {"arch": PAIR[name], **{column: f"{value:.5f}" for column, value in values.items()}}
    return row | measured_on(*rows)


def main() -> int:
    """Train, score and write results/ablation.csv after each variant, then results/ablation_blurdb2.csv."""
    lab = tyro.cli(Lab, description=__doc__)
    ensure_baseline(lab)
    rows = {variant.name: partial(make_row, lab, changed, variant) for changed, variant in VARIANTS}
    complete("ablation", "to", rows)
    pairs = {experiment.name: partial(make_pair_row, lab, experiment) for experiment in ON_BLURDB2}
    means = {row: partial(make_mean_row, name) for row, name in ALL_SEEDS.items()}
    complete("ablation_blurdb2", "network", pairs | means)
    return 0


if __name__ == "__main__":
    sys.exit(main())
