"""All systems at an equal budget: ``python -m benchmarks.comparison --out DIR [--weights FILE]``.

Each network learns from the same 9,600 crops of 192² of all 800 training photos, at a rate of its own that a
short probe chose; then it is scored on the 100 test photos, beside BDNet with a paired interval. About seven
hours on two cores (an estimate), to be interrupted at will: rows that are there are kept. ImageNet weights
serve ResNet-18 alone, VGG16 starts from scratch: so BDNet is there from scratch and at the compute of U-Net,
and others on ResNet-18. BDNet is there with the paper's recipe too.
"""

import sys
from dataclasses import replace
from functools import partial

import tyro

from bdnet.recipes import paper
from bdnet.refine import Refinement
from benchmarks.command import run
from benchmarks.data import PUBLISHED, data_folder
from benchmarks.experiments import (
    BASELINE,
    START,
    Experiment,
    Lab,
    complete,
    cost_columns,
    ensure_baseline,
    read_baseline,
    read_scored,
    recipe_columns,
    score_columns,
    with_rate,
)

REFINEMENTS: tuple[Refinement, ...] = ("crf", "superpixels")
# U-Net needs twenty times BDNet's multiplications for a crop.
EQUAL_COMPUTE = 20

SYSTEMS = (
    BASELINE,
    Experiment("bdnet-resnet18, from scratch", "bdnet-resnet18", START, pretrained=False),
    Experiment("bdnet-typed-resnet18", "bdnet-typed-resnet18", START),
    Experiment("bdnet-topdown", "bdnet-topdown", START),
    Experiment("fcn2s-resnet18", "fcn2s-resnet18", START),
    Experiment("unet-resnet18", "unet-resnet18", START),
    Experiment("dss-resnet18", "dss-resnet18", START),
    Experiment("segnet", "segnet", START, pretrained=False),
    Experiment("fcn2s-vgg16", "fcn2s-vgg16", START, pretrained=False),
    Experiment("dss", "dss", START, pretrained=False),
    Experiment("unet", "unet", START, pretrained=False),
    Experiment(
        f"bdnet-resnet18, {EQUAL_COMPUTE}× the crops",
        "bdnet-resnet18",
        replace(START, epochs=EQUAL_COMPUTE * START.epochs),
    ),
    # The paper's patches and optimizer; 80 epochs of 800 crops for its 100 of 5,392, an eighth in all.
    Experiment(
        "bdnet-resnet18, the paper's recipe",
        "bdnet-resnet18",
        replace(paper(), epochs=80, crops_per_epoch=800),
        cut="blurdb1",
    ),
)


def system_row(lab: Lab, system: Experiment, refine: Refinement = "none") -> dict[str, str]:
    """Train a system at its recipe's rate, else at one of its own, score it and say what it costs."""
    rate = system.recipe.learning_rate or lab.probe(replace(system, recipe=START))
    experiment = with_rate(system, rate)
    trained = lab.train(experiment)
    scores = score_columns(lab.score(experiment, refine), read_baseline())
    row = {"start": "ImageNet" if system.pretrained else "scratch"}
    # Last, when no worker is left that computes.
    row |= {**recipe_columns(experiment.recipe), **cost_columns(system.arch, refine)}
    row |= {"crops_per_second": str(trained["samples_per_second"]), **scores}
    # A refinement changes maps that are evaluated, not what an audit says.
    return row if refine != "none" else row | lab.archive_auc(experiment)


def peer_row(lab: Lab, peer: str) -> dict[str, str]:
    """Score another method's published maps of the test photos."""
    out = lab.out / "peers" / peer
    if not (out / "result.json").exists():
        data = data_folder()
        maps = str(data / "peer_maps" / peer)
        run("jobs.evaluate", str(data / "blurraw"), "--maps", maps, "--out", str(out))
    return score_columns(read_scored(out), read_baseline())


def main() -> int:
    """Train, score and write results/comparison.csv after each system."""
    lab = tyro.cli(Lab, description=__doc__)
    ensure_baseline(lab)
    first, *others = SYSTEMS
    complete(
        "comparison",
        "system",
        {
            first.name: partial(system_row, lab, first),
            **{f"{first.name} + {name}": partial(system_row, lab, first, name) for name in REFINEMENTS},
            **{f"{peer}, published maps": partial(peer_row, lab, peer) for peer in PUBLISHED},
            **{system.name: partial(system_row, lab, system) for system in others},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
