import json
from contextlib import nullcontext

import pytest

from jobs import train
from pipeline.cluster import Node, shares


def test_folds_give_each_result_and_the_mean_of_their_scores(monkeypatch, tmp_path, capsys):
    def two_folds(one, its_shares):
        assert (one.validation_folds, one.fold) == (2, 0)
        return [{"model": f"m{fold}", "val_mean_iou": score} for fold, score in enumerate((0.2, 0.4))]

    monkeypatch.setattr(train.cluster, "connect", lambda workers: nullcontext(shares([Node(4)])))
    monkeypatch.setattr(train, "train_folds", two_folds)
    assert train.main(["patches", "--out", str(tmp_path), "--arch", "unet", "--folds", "2"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["val_mean_iou"] == pytest.approx(0.3)
    assert [one["model"] for one in said["folds"]] == ["m0", "m1"]
