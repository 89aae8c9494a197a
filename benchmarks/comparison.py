"""All systems at an equal budget: ``python -m benchmarks.comparison --out DIR [--weights FILE]``.

Each network learns from the same 9,600 crops of 192² of all 800 training photos, at a rate of its own that a
short probe chose; then it is scored on the 100 test photos, beside BDNet with a paired interval. About five
hours on two cores (an estimate), to be interrupted at will. ImageNet weights serve ResNet-18 alone, VGG16
starts from scratch: so BDNet is there from scratch and at the compute of U-Net, and others on ResNet-18.
"""

import sys
from dataclasses import replace

import tyro

from bdnet.recipes import equal_budget
from benchmarks.command import data_folder, run, write_csv
from benchmarks.experiments import (
    RATES,
    Experiment,
    Lab,
    Scored,
    cost_columns,
    read_scored,
    recipe_columns,
    score_columns,
)

BASELINE = "bdnet-resnet18"
PEERS = ("EFPN", "EHS", "JNB")
# U-Net needs twenty times BDNet's multiplications for a crop.
EQUAL_COMPUTE = 20

_START = equal_budget(0.0)
SYSTEMS = (
    Experiment(BASELINE, "bdnet-resnet18", _START),
    Experiment("bdnet-resnet18, from scratch", "bdnet-resnet18", _START, pretrained=False),
    Experiment("bdnet-typed-resnet18", "bdnet-typed-resnet18", _START),
    Experiment("bdnet-topdown", "bdnet-topdown", _START),
    Experiment("fcn2s-resnet18", "fcn2s-resnet18", _START),
    Experiment("unet-resnet18", "unet-resnet18", _START),
    Experiment("dss-resnet18", "dss-resnet18", _START),
    Experiment("segnet", "segnet", _START, pretrained=False),
    Experiment("fcn2s-vgg16", "fcn2s-vgg16", _START, pretrained=False),
    Experiment("dss", "dss", _START, pretrained=False),
    Experiment("unet", "unet", _START, pretrained=False),
    Experiment(
        f"bdnet-resnet18, {EQUAL_COMPUTE}× the crops",
        "bdnet-resnet18",
        replace(_START, epochs=EQUAL_COMPUTE * _START.epochs),
    ),
)


def peer_columns(lab: Lab, peer: str, baseline: Scored) -> dict[str, str]:
    """Scores of another method's published maps of the test photos."""
    out = lab.out / "peers" / peer
    if not (out / "result.json").exists():
        data = data_folder()
        run(
            "jobs.evaluate",
            str(data / "blurraw"),
            "--maps",
            str(data / "peer_maps" / peer),
            "--out",
            str(out),
        )
    return score_columns(read_scored(out), baseline)


def main() -> int:
    """Train, score and write results/comparison.csv after each system."""
    lab = tyro.cli(Lab, description=__doc__)
    rows = []
    baseline = None
    for system in SYSTEMS:
        rate = lab.probe(replace(system, recipe=_START), RATES)
        experiment = replace(system, recipe=replace(system.recipe, learning_rate=rate))
        trained = lab.train(experiment)
        scored = lab.score(experiment)
        baseline = baseline or scored
        row = {"system": system.name, "start": "ImageNet" if system.pretrained else "scratch"}
        row |= {**recipe_columns(experiment.recipe), **cost_columns(system.arch)}
        row["crops_per_second"] = str(trained["samples_per_second"])
        rows.append({**row, **score_columns(scored, baseline)})
        if system.name == BASELINE:
            for refinement in ("crf", "superpixels"):
                refined = score_columns(lab.score(experiment, refinement), baseline)
                rows.append({**row, "system": f"{system.name} + {refinement}", **refined})
        empty = dict.fromkeys(rows[0], "")
        published = [
            {**empty, "system": f"{peer}, published maps", **peer_columns(lab, peer, baseline)}
            for peer in PEERS
        ]
        write_csv("comparison", rows + published)
    return 0


if __name__ == "__main__":
    sys.exit(main())
