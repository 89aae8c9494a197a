import json
import os

import pyarrow.parquet as pq
import pytest

from jobs.evaluate import main
from tests.pipeline.test_dataset import HALF, encoded
from tests.pipeline.test_evaluation import (  # noqa: F401 - folder is a fixture
    COLUMNS,
    PUBLISHED,
    folder,
    write_model,
    write_patches,
)

DATA = os.environ.get("BDNET_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="needs BlurRaw: set BDNET_DATA to the folder that holds blurraw/ and peer_maps/"
)


def run(capsys, *arguments):
    """Exit code and the last line of stdout as JSON."""
    code = main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, json.loads(lines[-1]) if lines else None


def failed(capsys, *arguments):
    """The one line on stderr of a run that failed."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_wrong_data_exits_1_with_one_line_and_writes_nothing(folder, capsys):  # noqa: F811
    (folder / "data/masks/b.png").write_bytes(encoded(HALF[:2]))
    line = failed(capsys, folder / "data", "--maps", folder / "maps", "--out", folder / "out")
    assert "masks/b.png" in line
    assert not (folder / "out").exists()


def test_a_model_whose_name_is_empty_is_no_other_model(folder, capsys):  # noqa: F811
    assert "empty" in failed(capsys, folder / "data", "--model", "", "--out", folder / "out")


@pytest.mark.e2e
def test_maps_are_scored_into_result_and_table(folder, capsys):  # noqa: F811
    out = folder / "out"
    code, result = run(capsys, folder / "data", "--maps", folder / "maps", "--out", out)
    assert code == 0
    assert (result["photos"], result["mean_iou"], result["mae"]) == (2, 1.0, 0.0)
    assert json.loads((out / "result.json").read_text()) == result
    assert pq.read_table(out / "photos.parquet").select(["name", "kind", "tp"]).to_pylist() == [
        {"name": "a", "kind": "defocus", "tp": 6},
        {"name": "b", "kind": "motion", "tp": 6},
    ]


@pytest.mark.e2e
@pytest.mark.long
def test_a_colour_map_exits_1_from_a_worker_with_one_line_and_writes_nothing(folder, capsys):  # noqa: F811
    (folder / "maps/a.png").write_bytes((folder / "data/images/a.png").read_bytes())
    line = failed(capsys, folder / "data", "--maps", folder / "maps", "--out", folder / "out")
    assert "maps/a.png: has mode RGB" in line
    assert not (folder / "out").exists()


@pytest.mark.e2e
@pytest.mark.long
def test_a_model_scores_every_patch_of_the_split_and_no_other(tmp_path, capsys):
    rows = [("a", "motion", "test")] * 20 + [("b", "defocus", "test"), ("c", "motion", "train")]
    source = write_patches(tmp_path / "patches", rows)
    model = write_model(tmp_path / "model")
    code, result = run(capsys, source, "--model", model, "--out", tmp_path / "out")
    assert code == 0
    assert (result["patches"], result["photos"], result["model"]) == (21, 2, model)
    table = pq.read_table(tmp_path / "out/photos.parquet")
    assert dict(zip(table["name"].to_pylist(), table["items"].to_pylist(), strict=True)) == {"a": 20, "b": 1}


@needs_data
@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.data
def test_published_maps_score_the_same_through_ray(tmp_path, capsys):
    arguments = [f"{DATA}/blurraw", "--maps", f"{DATA}/peer_maps/EFPN", "--split", "test", "--out", tmp_path]
    code, result = run(capsys, *arguments)
    assert code == 0
    assert tuple(round(result[name], 3) for name in COLUMNS) == PUBLISHED["EFPN", "0.5"]
