import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from infra.demo_summary import main
from pipeline.layout import AuditLayout
from pipeline.schema import AUDIT_TABLE, LISTING
from pipeline.view import Run

NOW = datetime(2026, 1, 2, tzinfo=UTC)
MEASURED = {
    "blurred_fraction": 0.4321,
    "verdict": "partly_blurred",
    "blur_kind": "motion",
    "focus": "shallow_depth",
}


def audit(out: Path, photos: dict[str, dict[str, Any]]) -> AuditLayout:
    """An audit of ``photos`` (name -> what differs in its row) as jobs.audit leaves it, report and all."""
    layout = AuditLayout(str(out))
    run = layout.run("r1")
    common: dict[str, Any] = {
        "etag": "e",
        "size_bytes": 1,
        "status": "ok",
        "model_digest": "m",
        "audit_digest": "a",
    }
    common |= {"run_id": "r1", "audited_at": NOW}
    rows = [{"uri": f"/photos/{name}"} | common | row for name, row in photos.items()]
    Path(run.listing).mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in LISTING.names} for row in rows], LISTING),
        f"{run.listing}/0.parquet",
    )
    settings = Run("r1", NOW.isoformat(), "/photos", "a", "m", "bdnet-resnet18", 640, True, {})
    Path(run.settings).write_text(json.dumps(asdict(settings)))
    Path(run.report).write_text("<p>the report</p>")
    write_deltalake(layout.table, pa.Table.from_pylist(rows, AUDIT_TABLE))
    return layout


def test_a_line_per_photo_and_the_place_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = audit(tmp_path, {"b/cat.jpg": MEASURED, "a.jpg": {"status": "truncated"}})
    assert main([str(tmp_path)]) == 0
    header, broken, cat, empty, report = capsys.readouterr().out.splitlines()
    assert header.split() == ["photo", "status", "verdict", "blurred", "kind", "focus"]
    assert broken.split() == ["a.jpg", "truncated", "–", "–", "–", "–"]
    assert cat.split() == ["b/cat.jpg", "ok", "partly_blurred", "43.2%", "motion", "shallow_depth"]
    assert empty == ""
    assert report == f"report: {layout.run('r1').report}"


def test_the_41st_photo_is_only_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit(tmp_path, {f"{number:04}.jpg": MEASURED for number in range(1041)})
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[40].startswith("0039.jpg")
    assert lines[41] == "… and 1,001 more"


def test_a_name_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit(tmp_path, {"\x1b[2Jgone.jpg": MEASURED})
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "gone.jpg" in out


def test_the_report_of_storage_that_goes_away_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(tmp_path / "out", {"a.jpg": MEASURED})
    kept = tmp_path / "kept" / "report.html"
    assert main([str(tmp_path / "out"), "--save-report", str(kept)]) == 0
    assert kept.read_text() == "<p>the report</p>"
    assert capsys.readouterr().out.endswith(f"report: {kept}\n")


def test_no_audit_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no audit at" in capsys.readouterr().err
