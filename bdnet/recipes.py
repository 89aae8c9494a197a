"""Named training recipes: every number that training depends on."""

from dataclasses import dataclass, field, replace
from typing import Literal

from bdnet.augment import Augmentation
from bdnet.card import WORKING_SIZE


@dataclass(frozen=True)
class Recipe:
    """How to train. Learning rates are peaks; crops per second depend on ``augmentation.crop`` squared."""

    name: str
    optimizer: Literal["sgd", "adamw"]
    schedule: Literal["constant", "one_cycle"]
    learning_rate: float
    # Factor on the rate of parameters that were trained before.
    pretrained_factor: float
    weight_decay: float
    batch_size: int
    epochs: int
    # Epochs during which what the encoder was loaded with stays as it is.
    frozen_epochs: int
    kind_weight: float
    region_weight: float
    # Show photos of the rarer kind more often, so that both kinds weigh the same.
    balance_kinds: bool
    # Decay per step of the averaged weights that are validated and exported; 0 = none.
    ema: float
    augmentation: Augmentation = field(default_factory=Augmentation)
    # Long side of the photos that the network is made for: validated and audited at it.
    working_size: int = WORKING_SIZE
    # Crops of an epoch where every training must see as many; None: each patch once, kinds balanced.
    crops_per_epoch: int | None = None
    # Trainings from the same start, one after the other; the mean of their last weights, normalisation
    # statistics included, is validated and exported (Wortsman et al.: "Model soups", ICML 2022).
    runs: int = 1

    def __post_init__(self) -> None:
        if self.epochs % self.runs:
            raise ValueError(
                f"recipe {self.name} has {self.runs} runs of equal length; choose a multiple of that many "
                f"epochs, not {self.epochs}"
            )
        assert self.runs == 1 or not self.ema


def paper() -> Recipe:
    """BDNet 2020: SGD with Nesterov momentum, 100 epochs, new layers alone for the first 20."""
    return Recipe(
        name="paper",
        optimizer="sgd",
        schedule="constant",
        learning_rate=1e-3,
        pretrained_factor=1.0,
        weight_decay=1e-5,
        batch_size=16,
        epochs=100,
        frozen_epochs=20,
        kind_weight=0.2,
        region_weight=0.0,
        balance_kinds=False,
        ema=0.0,
        augmentation=Augmentation(crop=224, flip_vertical=0.5),
    )


def default() -> Recipe:
    """What the default model was made with: AdamW, one cycle, averaged weights, larger and harder crops."""
    return Recipe(
        name="default",
        optimizer="adamw",
        schedule="one_cycle",
        learning_rate=2e-3,
        pretrained_factor=0.25,
        weight_decay=1e-2,
        batch_size=12,
        epochs=60,
        frozen_epochs=0,
        kind_weight=0.2,
        region_weight=1.0,
        balance_kinds=True,
        ema=0.998,
        augmentation=Augmentation(
            crop=384,
            scale=(0.75, 1.33),
            flip_vertical=0.2,
            colour=0.6,
            whole_frame_blur=0.08,
            noise=0.15,
            jpeg=0.15,
        ),
    )


def fast() -> Recipe:
    """For photos of 480 pixels, from a trained default model: two short runs, on windows a little wider."""
    recipe, working_size = default(), 480
    shrink = WORKING_SIZE / working_size
    low, high = recipe.augmentation.scale
    return replace(
        recipe,
        name="fast",
        epochs=18,
        runs=2,
        ema=0.0,
        working_size=working_size,
        augmentation=replace(recipe.augmentation, crop=336, scale=(low * shrink, high * shrink)),
    )


def equal_budget(learning_rate: float = 1e-3) -> Recipe:
    """The comparison's: the same 9,600 crops of 192² for every network, only the rate is its own; BDNet's, if
    not given."""
    return Recipe(
        name="equal_budget",
        optimizer="adamw",
        schedule="one_cycle",
        learning_rate=learning_rate,
        pretrained_factor=0.25,
        weight_decay=1e-2,
        batch_size=16,
        epochs=8,
        frozen_epochs=0,
        kind_weight=0.2,
        region_weight=0.0,
        balance_kinds=True,
        ema=0.0,
        augmentation=Augmentation(crop=192, scale=(0.8, 1.25), flip_vertical=0.2, colour=0.6),
        crops_per_epoch=1200,
    )


RECIPES = {"paper": paper, "default": default, "fast": fast, "equal_budget": equal_budget}
