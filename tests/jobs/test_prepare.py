"""The command that cuts a dataset, as its users call it."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from jobs.prepare import main
from pipeline import cluster, patches
from pipeline.patches import read_shard, shard_uris


@pytest.fixture
def dataset(tmp_path):
    """Three training photos of noise, one of them of the other kind, and one test photo."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True)
    rows = ["a,motion,train", "b,defocus,train", "c,defocus,train", "d,motion,test"]
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (260, 300, 3), np.uint8)).save(folder / f"images/{name}.png")
        Image.fromarray(np.uint8(255) * (rng.random((260, 300)) > 0.5)).save(folder / f"masks/{name}.png")
    (folder / "index.csv").write_text("\n".join(["name,kind,split", *rows]))
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failed(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def one_ray():
    """One local Ray for all jobs of this file, started as a job starts it."""
    with cluster.connect() as shares:
        yield shares


@pytest.fixture
def on_ray(one_ray, monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda: nullcontext(one_ray))


@pytest.mark.e2e
def test_the_same_seed_gives_the_same_bytes(dataset, tmp_path, capsys, on_ray):
    outs = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for out, seed in zip(outs, ("7", "7", "8"), strict=True):
        assert main([str(dataset), "--cut", "blurdb1", "--out", str(out), "--seed", seed]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results == [{"patches": 22, "shards": 1, "by_kind": {"motion": 12, "defocus": 10}}] * 3
    one, two, three = map(files, outs)
    assert one == two
    assert set(one) == {"shard-00000.parquet", "dataset.json", "result.json"}
    assert one["shard-00000.parquet"] != three["shard-00000.parquet"]
    [shard] = shard_uris(str(outs[0]))
    table = read_shard(shard)
    assert table.schema == patches.PATCHES
    assert sorted(set(table["photo"].to_pylist())) == ["a", "b", "c"]


@pytest.mark.e2e
def test_a_task_that_fails_on_the_cluster_gives_its_own_words_in_one_line(dataset, tmp_path, capfd, on_ray):
    (tmp_path / "file").touch()
    assert main([str(dataset), "--cut", "photos", "--out", f"{tmp_path}/file/out"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "UDF failed" not in err
    assert err.splitlines()[-1].startswith("error: [Errno 20] Not a directory")


def wrong_mask(folder):
    (folder / "masks/b.png").unlink()


def grey_mask(folder):
    Image.new("L", (300, 260), 99).save(folder / "masks/c.png")


def small_photo(folder):
    Image.new("RGB", (255, 260)).save(folder / "images/b.png")
    Image.new("1", (255, 260)).save(folder / "masks/b.png")


@pytest.fixture
def without_ray(monkeypatch):
    """A dataset is checked first: no cluster is needed to refuse it."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(wrong_mask, "masks/b.png"), (grey_mask, "masks/c.png"), (small_photo, "images/b.png")],
)
def test_a_wrong_dataset_is_refused_by_name_and_nothing_is_written(
    dataset, tmp_path, capsys, without_ray, spoil, named
):
    spoil(dataset)
    line = failed(capsys, dataset, "--cut", "blurdb2", "--out", tmp_path / "out")
    assert named in line
    assert not (tmp_path / "out").exists()


def test_a_split_that_no_photo_has_is_refused(dataset, tmp_path, capsys, without_ray):
    line = failed(capsys, dataset, "--cut", "photos", "--out", tmp_path / "out", "--split", "validation")
    assert "validation" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["data", "data/patches"])
def test_a_patch_dataset_inside_the_data_is_refused_else_it_would_be_taken_for_it(
    dataset, tmp_path, capsys, without_ray, out
):
    before = sorted(dataset.rglob("*"))
    assert "choose a folder outside" in failed(capsys, dataset, "--cut", "photos", "--out", tmp_path / out)
    assert sorted(dataset.rglob("*")) == before


def test_a_folder_that_holds_a_patch_dataset_already_is_refused_and_kept(
    dataset, tmp_path, capsys, without_ray
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset.json").write_text("{}")
    assert "already holds a patch dataset" in failed(capsys, dataset, "--cut", "photos", "--out", out)
    assert files(out) == {"dataset.json": b"{}"}
