"""Train BDNet on a patch dataset: ``python -m jobs.train PATCHES --out URI --arch bdnet-topdown``."""

import shlex
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from bdnet.recipes import RECIPES
from jobs.command import UsageError, run
from pipeline import cluster, models, storage
from pipeline.training import TrainingSettings, train, train_folds


@dataclass(frozen=True)
class Settings:
    """Options of jobs.train."""

    patches: Annotated[str, tyro.conf.Positional]
    """Folder or URI that jobs.prepare wrote."""
    out: str
    """Folder or URI of checkpoints and model; the same command given again goes on from its checkpoint."""
    arch: str
    """Network: bdnet-topdown, bdnet-resnet50, fcn8s-vgg16, unet, …; an unknown name lists them all."""
    recipe: Literal["paper", "default", "fast", "equal_budget"] = "default"
    """paper: the published numbers; default: bdnet-topdown's; fast: for bdnet-topdown-slim at 480 pixels,
    wants bdnet-topdown as init; equal_budget: minutes long, with which docs/paper.md compares networks."""
    init: str = "imagenet"
    """Start: the encoder from imagenet (torchvision downloads it) or from path or URI of a .safetensors file;
    all of it from a trained model whose weights fit (shipped name, folder or URI; {fold} in it is the fold's
    number); or none."""
    workers: int = 1
    """Data-parallel workers, each on a GPU where the cluster has them, with a batch of its own: the more
    workers, the fewer steps an epoch has."""
    epochs: int | None = None
    """Epochs; the recipe's own number when not given."""
    folds: int | None = None
    """Train K networks, each validated on another K-th of the photos; else one, validated on a tenth."""
    all_photos: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train on every photo and validate on none, once folds have shown what the recipe gives."""
    seed: int = 0
    """Seed of everything random."""
    terms: str = "not stated"
    """Terms under which the photos were given, for the model's card."""


VALIDATION_FOLDS = 10


def work(settings: Settings) -> dict[str, Any]:
    """Train one network, or one for each fold."""
    recipe = RECIPES[settings.recipe]()
    if settings.seed < 0:
        raise UsageError("--seed must be at least 0")
    if settings.workers < 1 or (settings.epochs is not None and settings.epochs < 1):
        raise UsageError("--workers and --epochs must be at least 1")
    if settings.epochs is not None:
        try:
            recipe = replace(recipe, epochs=settings.epochs)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if settings.folds is not None and settings.folds < 2:
        raise UsageError("--folds must be at least 2")
    if settings.all_photos and settings.folds is not None:
        raise UsageError("--folds holds photos out, --all-photos holds out none; give one of them")
    patches, out = storage.normalize(settings.patches), storage.normalize(settings.out)
    if out == patches:
        raise UsageError(
            "--out is the patch dataset itself, whose result.json would go; choose another --out"
        )
    one = TrainingSettings(
        patches=patches,
        out=out,
        arch=settings.arch,
        recipe=recipe,
        init=settings.init if settings.init in ("imagenet", "none") else models.resolved(settings.init),
        workers=settings.workers,
        seed=settings.seed,
        validation_folds=0 if settings.all_photos else settings.folds or VALIDATION_FOLDS,
        fold=0,
        terms=settings.terms,
        command=shlex.join(["python", "-m", "jobs.train", *_public_arguments(settings)]),
    )
    print(f"training {one.arch} for {recipe.epochs} epochs on {one.patches} into {out}", file=sys.stderr)
    with cluster.connect(settings.workers) as shares:
        if settings.folds is None:
            return train(one, shares)
        each = train_folds(one, shares)
    mean = sum(result["val_mean_iou"] for result in each) / len(each)
    return {**each[0], "val_mean_iou": mean, "folds": each}


def _public_arguments(settings: Settings) -> list[str]:
    """The command for the card, with the last part of each path: where files lay is nobody's business."""
    arguments = [settings.patches.rstrip("/").rsplit("/", 1)[-1], "--out", "OUT", "--arch", settings.arch]
    arguments += ["--recipe", settings.recipe, "--init", settings.init.rstrip("/").rsplit("/", 1)[-1]]
    arguments += ["--workers", str(settings.workers), "--seed", str(settings.seed), "--terms", settings.terms]
    if settings.epochs is not None:
        arguments += ["--epochs", str(settings.epochs)]
    if settings.all_photos:
        arguments.append("--all-photos")
    return arguments if settings.folds is None else [*arguments, "--folds", str(settings.folds)]


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run(Settings, work, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
