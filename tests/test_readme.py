"""The README's Python is run as it stands; the commands of all pages have the options that they are given."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from PIL import Image

from benchmarks.paper import interval
from benchmarks.tables import read_csv
from pipeline.layout import AuditLayout
from pipeline.ledger import Committer, stage
from pipeline.schema import AUDIT_TABLE
from pipeline.view import Run

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "infra").glob("*.md")))
COMMANDS = [
    pytest.param(shlex.split(command, comments=True), id=f"{page.name}: {command}")
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    for command in re.findall(r"python -m (jobs\..*)", block.replace("\\\n", " "))
]


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
    """An audit under out/demo: rows ok, broken, of an older model, of a photo that is gone; three runs, the
    last one limited."""
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
        {**common, "uri": "/photos/missed.jpg", "status": "ok", "verdict": "sharp", "audit_digest": "old"},
        {**common, "uri": "/photos/gone.jpg", "status": "ok", "verdict": "sharp"},
    ]
    table = str(tmp_path / "out/demo/table")
    committer = Committer(table, AUDIT_TABLE, "r")
    committer.add(stage(pa.Table.from_pylist(rows, schema=AUDIT_TABLE), table, "r"))
    committer.flush()
    listed = ("/photos/missed.jpg", "/photos/empty.jpg")
    for night, digest, complete, uris in (
        ("1", "old", True, (*listed, "/photos/gone.jpg")),
        ("2", "a", True, listed),
        ("3", "a", False, listed[:1]),
    ):
        layout = AuditLayout(str(tmp_path / "out/demo")).run(night)
        settings = Run(
            run_id=night,
            started_at=f"2026-05-1{night}T02:00:00+00:00",
            source="/photos",
            audit_digest=digest,
            model_digest="m",
            model="bdnet-topdown",
            working_size=640,
            listing_complete=complete,
            skipped_by_suffix={f".{night}": 1},
        )
        Path(layout.listing).mkdir(parents=True)
        Path(layout.settings).write_text(json.dumps(asdict(settings)))
        pq.write_table(pa.table({"uri": uris, "etag": ["1"] * len(uris)}), f"{layout.listing}/0.parquet")
    return tmp_path


def test_duckdb_writes_what_is_blurred_as_a_spreadsheet(demo: Path) -> None:
    run(block_with("worst"), demo)
    said = (demo / "blurred.csv").read_text()
    assert "/photos/missed.jpg" in said
    assert "suspected_miss" in said
    assert "empty.jpg" not in said


def test_duckdb_finds_what_the_archive_holds_today(demo: Path) -> None:
    said = run(block_with("today") + "print(today.order('uri').project('uri, status'))", demo)
    assert re.findall(r"/photos/(\w+).jpg +│ (\w+)", said) == [("empty", "empty"), ("missed", "ok")]


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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [
        link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert missing == []


def test_the_documentation_has_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_has_the_options_that_it_is_given(command: list[str]) -> None:
    job, *arguments = command
    tyro.cli(importlib.import_module(job).Settings, args=arguments)  # leaves where it can't parse them


def test_the_readmes_scores_are_those_of_the_table() -> None:
    rows = {row["method"]: row for row in read_csv("scores")}
    text = (ROOT / "README.md").read_text()
    said = re.findall(r"^\| \**([\w-]+)\**(?: \(the [^|]*)? \| (0\.\d{3} \(.*)$", text, re.MULTILINE)
    expected = {
        name: f"{interval(row)} | "
        + " | ".join(f"{float(row[column]):.3f}" for column in ("iou_blurred", "f_beta", "mae"))
        + " |"
        for name, row in rows.items()
    }
    assert dict(said) == expected
