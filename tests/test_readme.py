"""The README's lines are run as they stand."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.ledger import Committer, stage
from pipeline.schema import AUDIT_TABLE

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def block_with(word: str) -> str:
    (found,) = [block for block in BLOCKS if word in block]
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder with out/demo/table in it: one ok row, one broken."""
    common = {"etag": "1", "size_bytes": 1, "model_digest": "m", "audit_digest": "a", "run_id": "r"}
    common["audited_at"] = datetime.now(UTC)
    rows = [
        {
            **common,
            "uri": "/photos/missed.jpg",
            "status": "ok",
            "camera": "Box Brownie",
            "focus": "suspected_miss",
        }
        | {"blurred_fraction": 0.875, "captured_at": datetime(2024, 5, 18, 10, 2)},
        {**common, "uri": "/photos/empty.jpg", "status": "empty"},
    ]
    table = str(tmp_path / "out/demo/table")
    committer = Committer(table, AUDIT_TABLE, "r")
    committer.add(stage(pa.Table.from_pylist(rows, schema=AUDIT_TABLE), table, "r"))
    committer.flush()
    return tmp_path


def test_duckdb_reads_the_table(demo: Path) -> None:
    said = run(block_with("duckdb"), demo)
    assert "/photos/missed.jpg" in said
    assert "suspected_miss" in said
    assert "empty.jpg" not in said


def test_polars_reads_the_table(demo: Path) -> None:
    said = run(block_with("polars"), demo)
    assert "Box Brownie" in said
    assert "0.875" in said


def test_three_lines_detect_the_blur_of_a_photo(tmp_path: Path, sample_archive: Path) -> None:
    photo = sample_archive / "photos/2024/studio/astronaut-defocused.jpg"
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    width, height = Image.open(photo).size
    said = run(block_with("import bdnet"), tmp_path)
    assert f"({height}, {width})" in said
    assert "defocus" in said


def test_every_file_that_the_readme_names_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []
