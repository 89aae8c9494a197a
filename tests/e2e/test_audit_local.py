"""jobs.audit on plain folders; the sample archive with the shipped model, as `make demo` runs it."""

import html
import io
import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bdnet.card import WORKING_SIZE
from infra.demo_summary import Settings, summarize
from jobs.audit import main
from pipeline.layout import AuditLayout
from pipeline.schema import LISTING, MEASUREMENTS
from pipeline.storage import local_etag
from pipeline.view import current_view
from tests.e2e.harness import SMALL, Cluster, Ran, audit, audit_here, rows, table_rows

pytestmark = pytest.mark.e2e

NOTHING_LISTENS = "127.0.0.1:1"
# A photo and what was made of it by blurring all of it.
SHARP_AND_BLURRED = (
    ("garage/motorcycle.jpg", "garage/motorcycle-defocused.jpg"),
    ("garage/motorcycle.jpg", "garage/motorcycle-shaken.jpg"),
    ("studio/astronaut.jpg", "studio/astronaut-defocused.jpg"),
    ("studio/astronaut.jpg", "studio/astronaut-shaken.jpg"),
    ("café/espresso.jpg", "café/espresso-shaken.jpg"),
    ("launch/rocket.jpg", "launch/rocket-shaken.jpg"),
    ("lake/pagoda-burst-2.jpg", "lake/pagoda-burst-3.jpg"),
    ("lake/pagoda-burst-2.jpg", "lake/pagoda-burst-1.jpg"),
)


@dataclass(frozen=True)
class Audited:
    photos: Path
    out: Path
    ran: Ran
    rows: dict[str, dict[str, Any]]  # by path below photos
    truth: dict[str, dict[str, Any]]
    ray_folder: Path


@pytest.fixture(scope="module")
def audited(sample_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """The sample archive after one audit on a local Ray, which puts its sessions into ``ray_folder``."""
    out = tmp_path_factory.mktemp("out")
    # A short path: Ray puts sockets there.
    ray_folder = Path(tempfile.mkdtemp(prefix="ray"))
    photos = sample_archive / "photos"
    # What `ray start` leaves for others to find: a run that was not told of a cluster starts its own.
    (ray_folder / "ray").mkdir()
    (ray_folder / "ray/ray_current_cluster").write_text(NOTHING_LISTENS)
    ran = audit(photos, "--out", out, environment={"RAY_TMPDIR": str(ray_folder)})
    found = table_rows(out)
    by_name = {str(Path(row["uri"]).relative_to(photos)): row for row in found}
    assert len(by_name) == len(found), ran.err
    truth = json.loads((sample_archive / "truth.json").read_text())
    yield Audited(photos, out, ran, by_name, truth, ray_folder)
    shutil.rmtree(ray_folder)


def test_every_photo_has_one_row_with_the_status_that_it_deserves(audited: Audited) -> None:
    expected = {name: said["expected_status"] for name, said in audited.truth.items()}
    assert {name: row["status"] for name, row in audited.rows.items()} == expected


def test_the_result_is_the_last_line_and_a_file_and_adds_up(audited: Audited) -> None:
    result = audited.ran.result
    run = AuditLayout(str(audited.out)).run(result["run_id"])
    assert json.loads(Path(run.result).read_text()) == result
    assert result["table"] == str(audited.out / "table")
    assert result["photos"] == len(audited.truth) == sum(result["by_status"].values())
    assert result["by_status"] == Counter(row["status"] for row in audited.rows.values())
    assert result["by_verdict"] == Counter(row["verdict"] for row in audited.rows.values() if row["verdict"])
    assert result["photos_per_second"] == pytest.approx(result["photos"] / result["seconds"], abs=0.01)
    steps = result["step_seconds"]
    assert steps.keys() == {"fetch", "decode", "detect", "encode", "idle", "stage", "commit"}
    assert all(steps.values())
    assert result["bound_by"] in ("fetch", "decode", "detect", "encode")


def test_a_broken_photo_says_why_and_has_no_measurements(audited: Audited) -> None:
    for row in audited.rows.values():
        if row["status"] == "ok":
            assert row["error"] is None
            assert 0 <= row["blurred_fraction"] <= 1
        else:
            assert row["error"]
            assert {name: row[name] for name in MEASUREMENTS.names} == dict.fromkeys(MEASUREMENTS.names)


def test_a_mask_is_the_photo_at_working_size_and_measures_what_the_row_says(audited: Audited) -> None:
    for row in audited.rows.values():
        if row["status"] != "ok":
            continue
        image = Image.open(io.BytesIO(row["mask"]))
        assert (image.format, image.mode) == ("PNG", "1")
        assert image.size == (row["mask_width"], row["mask_height"])
        assert max(image.size) == min(WORKING_SIZE, max(row["width"], row["height"]))
        assert image.width / image.height == pytest.approx(row["width"] / row["height"], rel=0.02)
        assert np.asarray(image).mean() == pytest.approx(row["blurred_fraction"])


def test_an_exif_rotated_photo_is_upright_and_keeps_what_the_camera_wrote(audited: Audited) -> None:
    row = audited.rows["2024/studio/portrait-exif-rotated.jpg"]
    assert (row["width"], row["height"]) == (384, 512)
    assert (row["mask_width"], row["mask_height"]) == (384, 512)
    assert row["captured_at"] == datetime(2024, 3, 9, 16, 20, 31, 500_000)
    assert (row["camera"], row["camera_serial"], row["lens"]) == (
        "Sample Camera 1",
        "S-0001",
        "Sample 50mm f/1.8",
    )
    assert (row["iso"], row["f_number"], row["focal_mm"]) == (400, pytest.approx(2.8), 50)
    assert row["exposure_s"] == pytest.approx(1 / 200)
    assert audited.rows["2024/studio/astronaut.jpg"]["captured_at"] is None


def test_the_report_names_the_broken_photos_and_what_is_no_photo(audited: Audited) -> None:
    report = Path(audited.ran.result["report"]).read_text()
    for name, said in audited.truth.items():
        if said["expected_status"] != "ok":
            assert html.escape(name) in report
    assert "<b>bold" not in report
    assert ".xml" in report
    assert not any(name.endswith(".xml") for name in audited.rows)


def test_the_local_ray_ends_with_the_run(audited: Audited) -> None:
    assert list(audited.ray_folder.glob("ray/session_*")), "the run's Ray was not here"
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if str(audited.ray_folder).encode() in command]


def test_the_shipped_model_tells_a_blurred_photo_from_its_sharp_original(audited: Audited) -> None:
    blurred = {name: row["blurred_fraction"] for name, row in audited.rows.items()}
    for sharp, made in SHARP_AND_BLURRED:
        difference = blurred[f"2024/{made}"] - blurred[f"2024/{sharp}"]
        assert difference > 0.25, (made, sharp)


def test_the_demos_summary_has_a_line_for_each_photo_and_the_place_of_the_report(audited: Audited) -> None:
    lines = summarize(Settings(str(audited.out)))
    assert len([line for line in lines if line.startswith("2024/")]) == len(audited.truth)
    assert Path(lines[-1].removeprefix("report: ")).is_file()


def test_a_second_run_audits_nothing_and_needs_no_ray(
    audited: Audited, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(audited.out, "runs", "20200101T000000-old", "listing", "part-00000.parquet")
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setenv("RAY_ADDRESS", NOTHING_LISTENS)
    assert main([str(audited.photos), "--out", str(audited.out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not old.exists()  # listings don't pile up, however quiet the nights
    assert (result["photos"], result["by_status"]) == (0, {})
    assert len(table_rows(audited.out)) == len(audited.truth)
    # The report of a quiet night still shows the whole archive.
    assert "truncated.jpg" in Path(result["report"]).read_text()


def test_each_night_audits_what_is_new_and_another_model_audits_all(
    sample_archive: Path,
    model: Path,
    other_model: Path,
    joined: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    names = (
        "2024/café/espresso.jpg",
        "2024/garden/cat.jpg",
        "2024/launch/rocket.jpg",
        "2024/formats/pagoda.png",
    )
    for name in names:
        shutil.copy(sample_archive / "photos" / name, archive)

    first = audit_here(capsys, archive, "--out", out, "--model", model, "--limit", "3", *SMALL)
    assert first.result["photos"] == 3
    done = {Path(row["uri"]).name for row in table_rows(out)}
    assert len(done) == 3

    changed = sorted(done)[0]
    shutil.copy(sample_archive / "photos/2024/garden/flower.jpg", archive / changed)
    shutil.copy(sample_archive / "photos/2024/broken/text.jpg", archive / "it's new, 100% & <i>so.jpg")
    second = audit_here(capsys, archive, "--out", out, "--model", model, "--masks", "table", *SMALL)
    assert second.result["photos"] == 3
    tonight = [row for row in table_rows(out) if row["run_id"] == second.result["run_id"]]
    left = {path.name for path in archive.iterdir()} - done
    assert {Path(row["uri"]).name for row in tonight} == left | {changed}
    # The older version of the changed photo keeps its row, and the report shows the newer one alone.
    versions = [row for row in table_rows(out) if Path(row["uri"]).name == changed]
    assert len(versions) == 2
    shown = pa.concat_tables(current_view(AuditLayout(str(out))).tables()).to_pylist()
    assert len(shown) == 5
    assert {row["etag"] for row in shown if Path(row["uri"]).name == changed} == {
        local_etag((archive / changed).stat())
    }

    third = audit_here(capsys, archive, "--out", out, "--model", other_model, "--masks", "shards", *SMALL)
    assert third.result["photos"] == 5
    found = table_rows(out)
    digests = Counter(row["audit_digest"] for row in found)
    assert sorted(digests.values()) == [5, 6]
    assert len({(row["uri"], row["etag"], row["audit_digest"]) for row in found}) == len(found) == 11
    latest = [row for row in found if row["run_id"] == third.result["run_id"]]
    assert len({row["model_digest"] for row in latest}) == 1
    view = current_view(AuditLayout(str(out)))
    assert view.run.run_id == third.result["run_id"]
    shown = pa.concat_tables(view.tables()).to_pylist()
    assert sorted(r["blurred_fraction"] for r in shown if r["status"] == "ok") == sorted(
        r["blurred_fraction"] for r in latest if r["status"] == "ok"
    )

    assert all(row["mask_shard"] is None for row in found if row not in latest)
    for row in latest:
        if row["status"] != "ok":
            assert row["mask_shard"] is None
            continue
        shard, _, member = row["mask_shard"].partition("/")
        with tarfile.open(out / "masks" / shard) as tar:
            assert tar.extractfile(member).read() == row["mask"]


@pytest.mark.long
def test_a_photo_that_is_away_for_the_moment_is_told_of_and_tried_again(
    sample_archive: Path, model: Path, joined: Cluster, tmp_path: Path
) -> None:
    here, away, out = tmp_path / "here.jpg", tmp_path / "away.jpg", tmp_path / "out"
    shutil.copy(sample_archive / "photos/2024/garden/cat.jpg", here)
    shutil.copy(sample_archive / "photos/2024/launch/rocket.jpg", away)
    manifest = tmp_path / "manifest.parquet"
    listed = [
        {
            "uri": str(path),
            "etag": local_etag(path.stat()),
            "size_bytes": path.stat().st_size,
            "modified_at": None,
        }
        for path in (here, away)
    ]
    pq.write_table(pa.Table.from_pylist(listed, schema=LISTING), manifest)
    arguments = (manifest, "--out", out, "--model", model, "--fail-on-errors", *SMALL)

    away.rename(tmp_path / "elsewhere")
    first = audit(*arguments)
    assert first.code == 3
    assert first.result["by_status"] == {"ok": 1, "missing": 1}
    assert [Path(row["uri"]).name for row in table_rows(out)] == ["here.jpg"]
    (failure,) = rows(AuditLayout(str(out)).failures)
    assert (failure["uri"], failure["status"]) == (str(away), "missing")
    assert failure["error"]
    assert "away.jpg" in Path(first.result["report"]).read_text()

    (tmp_path / "elsewhere").rename(away)
    second = audit(*arguments)
    assert second.code == 0
    assert second.result["by_status"] == {"ok": 1}
    assert sorted(Path(row["uri"]).name for row in table_rows(out)) == ["away.jpg", "here.jpg"]


def test_a_dry_run_counts_and_writes_nothing(
    sample_archive: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(sample_archive / "photos"), "--out", str(out), "--model", str(model), "--dry-run"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["photos"], result["skipped_by_suffix"]) == (
        len(json.loads((sample_archive / "truth.json").read_text())),
        {".xml": 1},
    )
    assert not out.exists()


def test_a_table_that_lost_a_file_is_one_clear_line(
    audited: Audited, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(audited.out / "table", tmp_path / "out/table")
    for part in (tmp_path / "out/table").glob("part-*.parquet"):
        part.unlink()
    assert main([str(audited.photos), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: cannot read the table")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("source", "out", "said"),
    [
        pytest.param("photos", "photos/audit", "lie in each other", id="out inside source"),
        pytest.param("photos/2024", "photos", "lie in each other", id="source inside out"),
        pytest.param("photos", "photos", "lie in each other", id="out is source"),
        pytest.param("photos", "photos#audit", "holds '#'", id="a table that would lie in the source"),
        *(pytest.param("photos", name, "would lie elsewhere") for name in ("a?b", "a%20b", "a\\b", "a\nb")),
        *(
            pytest.param("photos", f"memory://{name}", "would lie elsewhere")
            for name in ("a/../b", "a/./b", "a//b", "a/..")
        ),
        pytest.param("nowhere", "out", "nowhere", id="missing source"),
        pytest.param("void", "out", "nothing is at", id="empty source"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    source: str, out: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    (tmp_path / "photos" / "2024" / "a.jpg").write_bytes(b"")
    (tmp_path / "void").mkdir()
    out = out if "://" in out else str(tmp_path / out)
    assert main([str(tmp_path / source), "--out", out, "--model", str(model)]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out" / "table").exists()
