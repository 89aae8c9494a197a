"""The cards of the shipped models say what the tables in benchmarks/results say."""

import pytest

from bdnet.card import Card, read_card, shipped_models
from benchmarks.tables import read_csv


@pytest.fixture(params=shipped_models())
def named(request: pytest.FixtureRequest) -> tuple[str, Card]:
    return request.param, read_card(request.param)


def test_scores_on_the_test_photos_are_those_of_the_table(named: tuple[str, Card]) -> None:
    name, card = named
    [row] = [row for row in read_csv("scores") if row["method"] == name]
    of_test = card.scores["test"]
    said = {column: float(value) for column, value in row.items() if column in of_test}
    assert said == pytest.approx({column: of_test[column] for column in said}, abs=1e-5)
    assert {"mean_iou", "iou_blurred", "mae"} <= said.keys()
    interval = [float(row["mean_iou_low"]), float(row["mean_iou_high"])]
    assert of_test["mean_iou_interval"] == pytest.approx(interval, abs=1e-5)


def test_scores_out_of_fold_are_those_of_the_table(named: tuple[str, Card]) -> None:
    name, card = named
    rows = [row for row in read_csv("kfold") if (row["model"], row["fold"]) == (name, "all")]
    assert len(rows) == ("out_of_fold" in card.scores)
    for row in rows:
        of_folds = card.scores["out_of_fold"]
        assert {column: float(row[column]) for column in of_folds} == of_folds


def test_a_temperature_is_that_of_the_folds_where_they_held_out_every_photo(named: tuple[str, Card]) -> None:
    name, card = named
    photos = card.scores.get("out_of_fold", {}).get("photos")
    fitted = {float(row["temperature"]) for row in read_csv("calibration") if row["model"] == name} - {1.0}
    assert {card.temperature} == (fitted if photos == card.data["training_photos"] else {1.0})
