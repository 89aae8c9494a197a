"""Rows of the paper's tables: kept where they are there, compared photo by photo."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import ablation, experiments, tables
from benchmarks.experiments import BASELINE, Lab, Scored, complete, score_columns, with_rate


def test_a_row_that_is_there_is_kept_and_rows_stand_in_the_tables_order(results):
    made = []

    def make(name):
        made.append(name)
        return {"value": f"{name} made"}

    there = [{"name": name, "value": f"{name} of another day"} for name in ("another network", "b")]
    tables.write_csv("table", there)
    complete("table", "name", {name: lambda name=name: make(name) for name in "abc"})
    assert made == ["a", "c"]
    assert [(row["name"], row["value"]) for row in tables.read_csv("table")] == [
        ("a", "a made"),
        ("b", "b of another day"),
        ("c", "c made"),
        ("another network", "another network of another day"),
    ]


def scored(confusions):
    photos = [f"photo{i}" for i in range(len(confusions))]
    kind = {"mean_iou": 0.5, "iou_blurred": 0.5}
    result = dict.fromkeys(experiments.SCORES, 0.5) | {
        "mean_iou_interval": [0.4, 0.6],
        "mean_iou": 0.6,
        "per_photo": {"mean_iou": 0.5, "mean_iou_interval": [0.4, 0.6]},
        "by_kind": {"motion": kind, "defocus": kind},
    }
    return Scored(result, photos, np.array(confusions))


def test_the_difference_from_the_baseline_is_paired_by_photo_not_by_place():
    perfect, half, inverted = [[50, 0], [0, 50]], [[40, 10], [10, 40]], [[0, 50], [50, 0]]
    baseline = {
        name: np.array(its)
        for name, its in zip(("photo2", "photo1", "photo0"), (half, inverted, perfect), strict=True)
    }
    same = score_columns(scored([perfect, inverted, half]), baseline)
    # Each photo differs from itself by nothing, whichever photos are drawn.
    assert float(same["minus_low"]) == float(same["minus_high"]) == 0
    better = score_columns(scored([perfect, half, half]), baseline)
    assert float(better["minus_low"]) >= 0
    assert float(better["minus_high"]) > 0


def test_a_column_that_old_rows_lack_is_empty_there_and_stands_before_what_was_measured_on(results):
    tables.write_csv("table", [{"name": "a"}])
    tables.write_csv("table", [*tables.read_csv("table"), {"name": "b", "score": "0.5"}])
    first, second = tables.read_csv("table")
    assert (first["score"], second["score"]) == ("", "0.5")
    assert list(first) == ["name", "score", "hardware", "versions"]


def test_on_blurdb2_each_network_is_compared_with_bdnet_of_its_own_seed(results, tmp_path, monkeypatch):
    trained = []
    perfect, half = [[50, 0], [0, 50]], [[40, 10], [10, 40]]
    monkeypatch.setattr(Lab, "train", lambda lab, experiment: trained.append(experiment))
    monkeypatch.setattr(
        Lab,
        "score_windows",
        # Seed 1 is the better one, for both networks.
        lambda lab, experiment: scored([perfect if experiment.seed == 1 else half] * 3),
    )
    for experiment in ablation.ON_BLURDB2:
        row = ablation.make_pair_row(Lab(tmp_path), experiment)
        assert (row["arch"], row["seed"]) == (experiment.arch, str(experiment.seed))
        assert float(row["minus_baseline"]) == 0
    assert {(e.cut, e.recipe.learning_rate) for e in trained} == {("blurdb2", 1e-3)}
    assert {e.seed for e in trained} == {0, 1, 2}


def test_the_mean_of_seeds_is_that_of_their_scores_and_of_their_differences(results, tmp_path, monkeypatch):
    perfect, half = [[50, 0], [0, 50]], [[40, 10], [10, 40]]
    # BDNet is perfect with one seed of three, the other network with two, on whatever photo.
    luck = {"BDNet": (1,), "no norm, no dropout": (0, 1)}
    monkeypatch.setattr(Lab, "train", lambda lab, experiment: None)
    monkeypatch.setattr(
        Lab,
        "score_windows",
        lambda lab, experiment: scored(
            [perfect if experiment.seed in luck[experiment.name.rsplit(", seed", 1)[0]] else half] * 4
        ),
    )
    for experiment in ablation.ON_BLURDB2:
        ablation.make_pair_row(Lab(tmp_path), experiment)
    mean, better = (ablation.make_mean_row(name) for name in luck)
    low = float(40 / 60)
    assert float(mean["mean_iou"]) == pytest.approx((2 * low + 1) / 3, abs=1e-5)
    assert float(mean["minus_baseline"]) == 0
    # The photos are alike: drawn again they give the same.
    for column in ("minus_baseline", "minus_low", "minus_high"):
        assert float(better[column]) == pytest.approx((1 - low) / 3, abs=1e-5)


def test_a_larger_share_of_the_photos_holds_a_smaller_one_and_both_kinds(tmp_path, monkeypatch):
    blurraw = tmp_path / "data" / "blurraw"
    for folder in ("images", "masks"):
        (blurraw / folder).mkdir(parents=True)
    names = [("motion", f"m{i}") for i in range(40)] + [("defocus", f"d{i}") for i in range(80)]
    with (blurraw / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "kind", "split"])
        writer.writerows([name, kind, "train"] for kind, name in names)
        writer.writerow(["hidden", "motion", "test"])
    monkeypatch.setenv("BDNET_DATA", str(tmp_path / "data"))
    lab = Lab(tmp_path / "out")

    def drawn(share):
        with (lab._share_of_blurraw(share) / "index.csv").open(newline="") as file:
            return [(row["kind"], row["name"]) for row in csv.DictReader(file)]

    quarter, half = drawn(0.25), drawn(0.5)
    assert [kind for kind, _ in quarter].count("motion") == 10
    assert (len(quarter), len(half)) == (30, 60)
    assert set(quarter) < set(half) < set(names)
    # Neighbours in the index are alike: the first ones would be a biased share.
    assert set(half) != set(names[:20] + names[40:80])


def test_experiments_share_a_folder_where_they_differ_in_name_alone(tmp_path):
    lab = Lab(tmp_path)
    base = with_rate(BASELINE, 1e-3)
    renamed = replace(base, name="the same by another name")
    assert lab.folder(renamed) == lab.folder(base)
    others = [with_rate(BASELINE, 3e-4), replace(base, seed=1), replace(base, share=0.5)]
    assert len({lab.folder(one) for one in (base, *others)}) == 4
