"""From labelled photos to a scored model on a real Ray: prepare, train, resume, evaluate."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bdnet import load
from jobs import audit, evaluate, prepare, train
from tests.e2e.harness import table_rows

# A test is up to five jobs, each of which starts a Ray; a slow machine takes its time.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
JOB_WITHIN_S = 600


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small photos of noise, the left half of each blurred, in the layout of a DATASET."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(6):
        sharp = Image.fromarray(rng.integers(0, 256, (264, 280, 3), dtype=np.uint8))
        blurred = sharp.filter(ImageFilter.GaussianBlur(3)).crop((0, 0, 140, 264))
        sharp.paste(blurred, (0, 0))
        mask = Image.new("L", sharp.size)
        mask.paste(255, (0, 0, 140, 264))
        kind = "motion" if index % 2 else "defocus"
        sharp.save(folder / "images" / f"{kind}{index}.jpg", quality=95)
        mask.save(folder / "masks" / f"{kind}{index}.png")
        rows.append({"name": f"{kind}{index}", "kind": kind, "split": "train"})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", "kind", "split"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "index.csv").write_text(text.getvalue())
    return folder


@pytest.fixture(scope="module")
def patches(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches") / "blurdb1"
    assert prepare.main([str(dataset), "--cut", "blurdb1", "--out", str(folder)]) == 0
    return folder


def arguments(
    patches: Path, out: Path, epochs: int, recipe: str = "paper", arch: str = "bdnet-resnet18"
) -> list[str]:
    options = ["--arch", arch, "--recipe", recipe, "--init", "none"]
    return [str(patches), "--out", str(out), *options, "--epochs", str(epochs)]


def last_line(text: str) -> dict[str, object]:
    return json.loads(text.strip().splitlines()[-1])


def test_two_workers_train_a_model_that_loads(
    patches: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trained"
    command = arguments(patches, out, 1, arch="bdnet-topdown-slim")  # the cheapest to train
    assert train.main([*command, "--workers", "2", "--terms", "free to use"]) == 0
    result = last_line(capfd.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["epochs"] == 1
    assert 0 < result["val_mean_iou"] < 1
    (epoch,) = json.loads((out / "history.json").read_text())
    assert (epoch["epoch"], epoch["val_mean_iou"]) == (1, result["val_mean_iou"])
    assert epoch["loss"] == result["loss"] > 0
    card = load(str(out / "model")).card
    assert card.digest == result["digest"]
    assert card.data["terms"] == "free to use"
    assert len(card.data["validation_photos"]) == 2
    assert str(patches) not in json.dumps(card.training)


@pytest.mark.long
def test_one_worker_gives_the_same_weights_again(
    patches: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for name, seed in (("first", "0"), ("again", "0"), ("another seed", "1")):
        command = [*arguments(patches, tmp_path / name, 2), "--seed", seed]
        assert train.main(command) == 0
        digests.append(last_line(capfd.readouterr().out)["digest"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "epochs_before"),
    [
        pytest.param("paper", 1, id="last weights"),
        pytest.param("default", 1, id="running mean"),
        pytest.param("fast", 2, id="in the second of two runs"),
    ],
)
def test_a_killed_training_goes_on_from_its_last_epoch(
    recipe: str, epochs_before: int, patches: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trained"
    arch = "bdnet-topdown-slim" if recipe == "fast" else "bdnet-resnet18"
    command = [sys.executable, "-m", "jobs.train", *arguments(patches, out, 4, recipe, arch)]
    progress = out / "progress.json"

    first = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + JOB_WITHIN_S
    while not (progress.exists() and json.loads(progress.read_text())["epoch"] >= epochs_before):
        assert first.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = json.loads(progress.read_text())["epoch"]
    assert done < 4, "killed too late to show anything"

    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=JOB_WITHIN_S)
    assert second.returncode == 0, second.stderr
    result = last_line(second.stdout)
    assert result["epochs"] == 4
    said = [int(epoch) for epoch in re.findall(r"epoch (\d) of 4", second.stderr)]
    assert min(said) > done
    assert [epoch["epoch"] for epoch in json.loads((out / "history.json").read_text())] == [1, 2, 3, 4]
    card = load(str(out / "model")).card
    assert card.digest == result["digest"]
    assert bool(card.ranges) == (recipe == "fast")

    # Finished: the same command only exports again.
    third = subprocess.run(command, capture_output=True, text=True, check=False, timeout=JOB_WITHIN_S)
    assert third.returncode == 0, third.stderr
    assert last_line(third.stdout)["digest"] == result["digest"]

    other = subprocess.run(
        [*command, "--seed", "5"], capture_output=True, text=True, check=False, timeout=JOB_WITHIN_S
    )
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "choose another --out" in other.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "arch",
    [
        *("bdnet-topdown", "bdnet-typed-resnet18", "unet", "segnet", "dss"),
        *(f"fcn{stride}s-vgg16" for stride in (32, 16, 8, 4, 2)),
        *("fcn2s-resnet18", "unet-resnet18", "dss-resnet18"),
    ],
)
def test_every_kind_of_network_trains_scores_and_audits_through_the_same_commands(
    arch: str, dataset: Path, patches: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trained"
    options = ["--arch", arch, "--recipe", "paper", "--init", "none", "--epochs", "1", "--all-photos"]
    assert train.main([str(patches), "--out", str(out), *options]) == 0
    assert last_line(capfd.readouterr().out)["val_mean_iou"] is None

    model = f"file://{out}/model"
    assert evaluate.main([str(patches), "--model", model, "--split", "train", "--out", str(tmp_path)]) == 0
    assert 0 <= last_line(capfd.readouterr().out)["mean_iou"] <= 1

    audited = tmp_path / "audit"
    assert audit.main([str(dataset / "images"), "--out", str(audited), "--model", model]) == 0
    assert last_line(capfd.readouterr().out)["by_status"] == {"ok": 6}
    rows = table_rows(audited)
    assert {row["model_digest"] for row in rows} == {load(f"{out}/model").card.digest}
    if arch.startswith("bdnet"):
        assert load(model).predict(np.zeros((1, 64, 64, 3), np.uint8))[1] is not None
    else:
        assert {row["blur_kind"] for row in rows} == {None}
