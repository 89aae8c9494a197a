"""What each part of BDNet gives: ``python -m benchmarks.ablation --out DIR [--weights FILE]``.

BDNet on ResNet-18 learns from 9,600 crops of 192², as in the comparison, with one thing changed at a time,
and is scored on the 100 test photos with a paired interval of the difference. About an hour and a half on two
cores, and as much again for FCN-32s on VGG16; to be interrupted at will.
"""

import sys
from dataclasses import replace

import tyro

from bdnet.recipes import equal_budget
from benchmarks.command import write_csv
from benchmarks.experiments import RATES, Experiment, Lab, recipe_columns, score_columns

# The rate is put in by the probe: one for all variants of BDNet, one for both FCNs.
_BASE = equal_budget(0.0)
_NET = "bdnet-resnet18"

VARIANTS: tuple[tuple[str, Experiment], ...] = (
    ("none", Experiment("base", _NET, _BASE)),
    *(("skips", Experiment(f"{s}s", f"{_NET}-{s}s", _BASE)) for s in (32, 16, 8, 4)),
    ("skip norm", Experiment("fixed scale", f"{_NET}-scale", _BASE)),
    ("skip norm", Experiment("no norm", f"{_NET}-plain", _BASE)),
    ("dropout", Experiment("no dropout", f"{_NET}-nodropout", _BASE)),
    ("dropout", Experiment("no norm, no dropout", f"{_NET}-plain-nodropout", _BASE)),
    ("kind branch", Experiment("without", _NET, replace(_BASE, kind_weight=0.0))),
    ("kind branch", Experiment("one mask per kind", "bdnet-typed-resnet18", _BASE)),
    ("encoder", Experiment("frozen", _NET, replace(_BASE, frozen_epochs=_BASE.epochs))),
    ("encoder", Experiment("staged", _NET, replace(_BASE, frozen_epochs=2))),
    ("start", Experiment("from scratch", _NET, _BASE, pretrained=False)),
    ("cut", Experiment("BlurDB1", _NET, _BASE, cut="blurdb1")),
    ("cut", Experiment("BlurDB2", _NET, _BASE, cut="blurdb2")),
    ("photos", Experiment("25 %", _NET, _BASE, share=0.25)),
    ("photos", Experiment("50 %", _NET, _BASE, share=0.5)),
    ("FCN on VGG16", Experiment("FCN-2s", "fcn2s-vgg16", _BASE, pretrained=False)),
    ("FCN on VGG16", Experiment("FCN-32s", "fcn32s-vgg16", _BASE, pretrained=False)),
)
# Whose rate is probed, and whether it starts from ImageNet.
PROBED = {_NET: True, "fcn2s-vgg16": False}


def main() -> int:
    """Train, score and write results/ablation.csv after each variant."""
    lab = tyro.cli(Lab, description=__doc__)
    rows = []
    baseline = None
    for changed, variant in VARIANTS:
        probed = "fcn2s-vgg16" if variant.arch.startswith("fcn") else _NET
        rate = lab.probe(Experiment(probed, probed, _BASE, PROBED[probed]), RATES)  # once, then remembered
        experiment = replace(variant, recipe=replace(variant.recipe, learning_rate=rate))
        lab.train(experiment)
        scored = lab.score(experiment)
        baseline = baseline or scored
        row = {"changed": changed, "to": experiment.name, "arch": experiment.arch}
        rows.append({**row, **recipe_columns(experiment.recipe), **score_columns(scored, baseline)})
        write_csv("ablation", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
