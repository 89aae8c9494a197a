"""The shipped models score what their cards say, and the cards say how they were made."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score

from bdnet import Model, load
from bdnet.card import DEFAULT_MODEL, shipped_models
from bdnet.metrics import confusion, scores
from bdnet.photo import decode
from bdnet.recipes import RECIPES


@pytest.fixture(scope="module", params=shipped_models())
def shipped(request: pytest.FixtureRequest) -> Model:
    return load(request.param)


@pytest.fixture(scope="module")
def model() -> Model:
    return load()


def index(data_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((data_dir / "blurraw/index.csv").open()))


def test_the_card_tells_data_terms_command_recipe_and_scores(shipped: Model) -> None:
    card = shipped.card
    assert "given for research" in card.data["terms"]
    assert card.training["command"].startswith("python -m jobs.train ")
    assert card.training["recipe"]["name"] in RECIPES
    assert card.scores["test"]["mean_iou"] >= 0.79
    if card.data["validation_photos"]:
        assert card.scores["validation"]["val_mean_iou"] > 0.5


@pytest.mark.data
def test_it_was_validated_on_training_photos_or_none(shipped: Model, data_dir: Path) -> None:
    split = {row["name"]: row["split"] for row in index(data_dir)}
    assert {split[name] for name in shipped.card.data["validation_photos"]} <= {"train"}


@pytest.mark.data
@pytest.mark.parametrize(
    "shipped",
    [
        pytest.param(name, marks=pytest.mark.long if name == "bdnet-resnet18" else ())
        for name in shipped_models()
    ],
    indirect=True,
)
def test_its_score_on_the_test_photos_is_the_one_of_its_card(shipped: Model, data_dir: Path) -> None:
    matrix = np.zeros((2, 2), np.int64)
    for row in index(data_dir):
        if row["split"] == "test":
            photo = (data_dir / f"blurraw/images/{row['name']}.jpg").read_bytes()
            pixels = decode(photo, shipped.card.working_size).pixels
            assert pixels is not None
            mask = Image.open(data_dir / f"blurraw/masks/{row['name']}.png")
            soft = Image.fromarray(shipped.probability(pixels)).resize(mask.size, Image.Resampling.BILINEAR)
            matrix += confusion(np.asarray(soft) >= 0.5, np.asarray(mask) > 0)
    measured = scores(matrix)["mean_iou"]
    # The cards' scores are of bf16; a processor without it computes in fp32.
    assert measured == pytest.approx(shipped.card.scores["test"]["mean_iou"], abs=0.002)
    if shipped.card.arch == DEFAULT_MODEL:
        assert measured >= 0.825


@pytest.mark.data
def test_the_blurred_fraction_tells_blurred_photos_from_sharp_ones(model: Model, data_dir: Path) -> None:
    photos = sorted((data_dir / "archive").glob("*.jpg"))
    fractions = [model.detect(photo).blurred_fraction for photo in photos]
    assert roc_auc_score([not photo.stem.endswith("_S") for photo in photos], fractions) >= 0.98


@pytest.mark.data
def test_decoding_at_a_reduced_scale_does_not_change_what_is_blurred(model: Model, data_dir: Path) -> None:
    sharp = sorted((data_dir / "archive").glob("*_S.jpg"))  # blurred ones are blurred all over
    assert sharp
    for path in sharp:
        reduced = decode(path.read_bytes()).pixels
        assert reduced is not None
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        size = (reduced.shape[1], reduced.shape[0])
        whole = np.array(upright.resize(size, Image.Resampling.BICUBIC))
        fractions = [(model.probability(pixels) >= 0.5).mean() for pixels in (reduced, whole)]
        assert abs(fractions[0] - fractions[1]) < 0.01, path.name
