"""What is counted of held-out photos, and what the tables make of the counts."""

import numpy as np
import pytest
from scipy.special import expit

from benchmarks import out_of_fold, tables
from benchmarks.out_of_fold import Marked


def marked(photo, kind, fold=0, confusion=((90, 0), (0, 10)), truly=0.1, said=0.1, twin=1.0, kind_said=None):
    return Marked(photo, kind, fold, np.array(confusion), truly, said, twin, kind_said or kind)


def test_photos_that_were_kept_are_read_as_they_were(results):
    photos = [marked("m", "motion", fold=1, said=0.25), marked("d", "defocus", fold=1, kind_said="motion")]
    tables.write_csv("fold_photos", out_of_fold.photo_rows("net", photos))
    read = out_of_fold.read_photos("net")
    assert [vars(one) | {"confusion": one.confusion.tolist()} for one in read] == [
        vars(one) | {"confusion": one.confusion.tolist()} for one in photos
    ]
    assert out_of_fold.read_photos("another") == []


def test_marking_a_fold_again_replaces_it_and_leaves_the_others(results):
    for fold, said in ((0, 0.1), (1, 0.2), (0, 0.3)):
        rows = out_of_fold.photo_rows("net", [marked("p", "motion", fold=fold, said=said)])
        out_of_fold.replace_rows("fold_photos", rows, "model", "fold")
    assert sorted((one.fold, one.blurred_fraction) for one in out_of_fold.read_photos("net")) == [
        (0, 0.3),
        (1, 0.2),
    ]


def test_the_temperature_of_a_network_twice_too_sure_is_two(results):
    rng = np.random.default_rng(0)
    shares = {}
    for kind, photos in (("motion", 2), ("defocus", 6)):
        shares[kind] = np.zeros(())
        for _ in range(photos):
            honest = rng.normal(0, 2, 20_000)
            truth = rng.random(honest.size) < expit(honest)
            shares[kind] = shares[kind] + out_of_fold.margin_shares(expit(2 * honest), truth)
    rows = [row for fold in (0, 1) for row in out_of_fold.margin_rows("net", fold, shares)]
    tables.write_csv("fold_margins", rows)
    margin, weight, fold = out_of_fold.read_margins("net")
    assert weight.sum() == pytest.approx(1)
    temperature = out_of_fold.best_temperature(margin, weight)
    assert temperature == pytest.approx(2, abs=0.05)
    [sure, *_] = out_of_fold.calibration_rows("net", 1.0, expit(margin), weight)
    mended = out_of_fold.softened(margin, weight, fold)
    [mended, *_] = out_of_fold.calibration_rows("net", temperature, mended, weight)
    assert float(sure["calibration_error"]) > 0.05
    assert float(mended["calibration_error"]) < 0.01
    # What honest probabilities score: the entropy of a normal margin's truth, and its variance.
    chance = expit(np.random.default_rng(1).normal(0, 2, 100_000))
    entropy = -(chance * np.log(chance) + (1 - chance) * np.log(1 - chance)).mean()
    assert float(mended["log_loss"]) == pytest.approx(entropy, rel=0.03)
    assert float(mended["brier"]) == pytest.approx((chance * (1 - chance)).mean(), rel=0.03)
    assert float(sure["log_loss"]) > float(mended["log_loss"])


def test_a_fold_is_softened_by_the_temperature_of_the_others_not_by_its_own(results):
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, 20_000)
    truth = rng.random(honest.size) < expit(honest)
    rows = []
    for fold, too_sure in ((0, 1), (1, 2)):
        shares = dict.fromkeys(
            ("motion", "defocus"), out_of_fold.margin_shares(expit(too_sure * honest), truth)
        )
        rows += out_of_fold.margin_rows("net", fold, shares)
    tables.write_csv("fold_margins", rows)
    margin, weight, fold = out_of_fold.read_margins("net")
    probability = out_of_fold.softened(margin, weight, fold)
    for here, temperature in ((fold == 0, 2), (fold == 1, 1)):
        assert probability[here] == pytest.approx(expit(margin[here] / temperature), abs=0.01)


def test_kinds_share_the_pixels_equally_however_many_photos_they_have(results):
    one_pixel = out_of_fold.margin_shares(np.array([0.9]), np.array([True]))
    shares = {"motion": one_pixel, "defocus": 7 * one_pixel}
    tables.write_csv("fold_margins", out_of_fold.margin_rows("net", 0, shares))
    _, weight, _ = out_of_fold.read_margins("net")
    assert weight[1].tolist() == [0.5, 0.5]


def test_folds_are_scored_apart_and_together_by_one_confusion_matrix():
    photos = [
        marked("a", "motion", fold=0, confusion=((50, 0), (0, 50))),
        marked("b", "defocus", fold=0, confusion=((50, 0), (0, 50))),
        marked("c", "motion", fold=1, confusion=((0, 50), (50, 0))),
        marked("d", "defocus", fold=1, confusion=((50, 0), (0, 50)), kind_said="motion"),
    ]
    rows = {row["fold"]: row for row in out_of_fold.fold_rows("net", photos)}
    assert list(rows) == [0, 1, "all"]
    assert (rows[0]["mean_iou"], rows[0]["kind_balanced_accuracy"]) == ("1.0000", "1.0000")
    assert (rows[1]["mean_iou_motion"], rows[1]["mean_iou_defocus"]) == ("0.0000", "1.0000")
    # 300 of 400 pixels right, both classes alike: 150 / (200 + 50) each.
    assert (rows["all"]["photos"], rows["all"]["mean_iou"]) == (4, "0.6000")
    assert rows[1]["kind_balanced_accuracy"] == "0.5000"


def test_the_verdict_weighs_kinds_alike_and_leaves_out_photos_that_are_blurred_anyway():
    photos = [
        marked("a", "motion", truly=0.2, said=0.7, twin=0.9),  # wrongly blurred below 0.7
        marked("b", "motion", truly=0.95, said=0.95, twin=0.9),  # blurred anyway, but above 0.95
        *(marked(f"d{i}", "defocus", truly=0.2, said=0.2, twin=0.97) for i in range(6)),
    ]
    rows = {row["blurred_above"]: row for row in out_of_fold.verdict_rows("net", photos)}
    assert (rows["0.60"]["recall"], rows["0.60"]["wrongly_blurred"]) == ("1.0000", "0.5000")
    assert rows["0.60"]["precision"] == f"{1 / 1.5:.4f}"
    assert (rows["0.60"]["photos"], rows["0.60"]["photos_wrongly_blurred"]) == (7, 1)
    assert (rows["0.80"]["recall"], rows["0.80"]["wrongly_blurred"]) == ("1.0000", "0.0000")
    assert (rows["0.95"]["recall"], rows["0.95"]["precision"]) == ("0.5000", "1.0000")
