from dataclasses import replace

import pytest

from bdnet.augment import Augmentation
from bdnet.recipes import RECIPES, default, paper


def test_the_papers_recipe_has_the_papers_numbers():
    recipe = paper()
    assert recipe.optimizer == "sgd"  # the training loop gives it Nesterov momentum 0.9
    assert recipe.schedule == "constant"
    assert recipe.learning_rate == 1e-3
    assert recipe.weight_decay == 1e-5
    assert recipe.batch_size == 16
    assert (recipe.epochs, recipe.frozen_epochs) == (100, 20)
    assert recipe.kind_weight == 0.2


def test_the_papers_recipe_has_nothing_that_the_paper_lacks():
    recipe = paper()
    assert recipe.pretrained_factor == 1.0
    assert recipe.region_weight == 0.0
    assert recipe.ema == 0.0
    assert not recipe.balance_kinds
    # A 224 crop and flips both ways (horizontal ones are always on).
    assert recipe.augmentation == Augmentation(crop=224, flip_vertical=0.5)


def test_a_recipe_is_found_under_its_own_name():
    assert [make().name for make in RECIPES.values()] == [*RECIPES]


def test_the_fast_recipe_shows_windows_of_a_photo_about_as_large_as_the_default_one_does():
    usual, fast = default().augmentation, RECIPES["fast"]().augmentation
    for ours, its in zip(usual.scale, fast.scale, strict=True):
        assert fast.crop * its == pytest.approx(usual.crop * ours, rel=0.2)


def test_runs_are_of_equal_length():
    with pytest.raises(ValueError, match="choose a multiple of that many epochs, not 19"):
        replace(RECIPES["fast"](), epochs=19)
