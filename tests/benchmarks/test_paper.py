"""docs/paper.md, from whatever tables are there."""

from benchmarks import paper
from benchmarks.command import read_csv


def test_a_table_that_is_not_there_is_named_with_the_command_that_makes_it():
    text = paper.page({name: [] for name in paper.TABLES})
    for name in ("scores", "comparison", "ablation", "curves", "failures", "archive_auc", "out_of_fold"):
        assert f"Not measured yet: `python -m benchmarks.{name}" in text
    assert "the default: not measured yet" in text


def test_the_page_in_the_repository_is_the_one_that_its_tables_give():
    text = paper.page({name: read_csv(name) for name in paper.TABLES})
    assert (paper.DOCS / "paper.md").read_text() == text


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
