"""docs/paper.md, from whatever tables are there."""

from bdnet.card import DEFAULT_MODEL
from benchmarks import paper
from benchmarks.tables import read_csv


def test_a_table_that_is_not_there_is_named_with_the_command_that_makes_it():
    text = paper.page({name: [] for name in paper.TABLES})
    for name in ("scores", "comparison", "ablation", "curves", "failures", "archive_auc", "out_of_fold"):
        assert f"Not measured yet: `python -m benchmarks.{name}" in text
    assert "the default: not measured yet" in text


def test_the_page_in_the_repository_is_the_one_that_its_tables_give():
    text = paper.page({name: read_csv(name) for name in paper.TABLES})
    assert (paper.DOCS / "paper.md").read_text() == text


def test_what_the_page_concludes_in_words_is_so_in_its_tables():
    points = {row["system"]: 100 * float(row["minus_baseline"]) for row in read_csv("comparison")}
    scratch = points["bdnet-resnet18, from scratch"]
    assert scratch < points["unet"] < 0
    assert scratch < points["segnet"] < 0
    assert max(points["dss"], points["fcn2s-vgg16"]) < 0
    assert points["unet-resnet18"] > 0

    parts = {row["to"]: 100 * float(row["minus_baseline"]) for row in read_csv("ablation")}
    chance = 0.95  # of two trainings that differ in nothing
    for name in ("no norm", "no dropout", "no norm, no dropout", "8s", "4s"):
        assert abs(parts[name]) < chance, name

    probed = {
        row["rate"]: float(row["loss"]) for row in read_csv("probes") if row["system"] == "bdnet-resnet18"
    }
    assert 0 < probed["0.001"] - probed["0.0003"] < 0.005
    assert parts["3e-4"] < -chance

    pairs = {row["network"]: row for row in read_csv("ablation_blurdb2")}
    mean = pairs["no norm, no dropout, mean of 3"]
    assert float(mean["minus_low"]) < 0 < float(mean["minus_high"])

    wrong = {row["region"]: float(row["wrong"]) for row in read_csv("failures")}
    assert wrong["flat"] < wrong["rest"] < wrong["border"]
    everywhere = paper.answers({name: read_csv(name) for name in paper.TABLES})["everywhere"]
    assert everywhere["wrong"] < everywhere["wrong_after_crf"]

    temperatures = [row for row in read_csv("calibration") if row["model"] == DEFAULT_MODEL]
    for score in ("calibration_error", "log_loss", "brier"):
        assert float(temperatures[0][score]) > float(temperatures[-1][score])


def test_the_folds_of_another_network_come_last():
    rows = read_csv("kfold")
    another = {**rows[0], "model": "a-network-of-yours"}
    text = paper.page({name: [] for name in paper.TABLES} | {"kfold": [another, *rows]})
    assert text.index(f"| {rows[-1]['model']} |") < text.index("| a-network-of-yours |")


def test_what_is_not_trained_yet_is_named():
    rows = read_csv("comparison")
    waiting = paper.waiting({name: [] for name in paper.TABLES} | {"comparison": rows[:1]})
    assert rows[0]["system"] not in waiting["comparison"]
    assert "unet" in waiting["comparison"]
    assert "bdnet-topdown, fold 2" in waiting["kfold"]
