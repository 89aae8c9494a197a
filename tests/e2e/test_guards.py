"""What makes a run stop by itself, and what it leaves."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.audit import main
from pipeline.execution import LARGEST_BLOCK
from pipeline.layout import AuditLayout
from pipeline.view import current_view
from tests.e2e.harness import JOB_WITHIN_S, ROOT, SMALL, Cluster, audit_command, audit_here, table_rows

pytestmark = pytest.mark.e2e


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / f"{number:04d}.jpg")
    return folder


def shown(out: Path) -> set[str]:
    """Names in the current view."""
    tables = current_view(AuditLayout(str(out))).tables()
    return {Path(uri).name for table in tables for uri in table["uri"].to_pylist()}


def test_a_listing_that_lost_many_photos_is_a_question_not_a_deletion(
    archive: Path,
    model: Path,
    tmp_path: Path,
    joined: Cluster,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    command = [str(archive), "--out", str(out), "--model", str(model), *SMALL]
    assert audit_here(capsys, *command).result["photos"] == 10
    for number in range(3):
        (archive / f"{number:04d}.jpg").unlink()

    # No photo is left to be read: from here on no run needs Ray.
    assert main(command) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("error: 3 of the 10 photos that were at")
    assert "--max-lost 0.3" in refusal
    assert len(shown(out)) == 10

    # A narrower look is no loss.
    assert main([*command, "--limit", "1"]) == 0
    assert len(shown(out)) == 10

    assert main([*command, "--max-lost", "0.3"]) == 0
    assert "3 photos are gone" in caplog.text
    assert shown(out) == {f"{number:04d}.jpg" for number in range(3, 10)}
    # History stays.
    assert len(table_rows(out)) == 10


def test_sigterm_commits_what_is_staged_and_ends_the_run_in_one_line(
    archive: Path, model: Path, tmp_path: Path, joined: Cluster
) -> None:
    photo = (archive / "0000.jpg").read_bytes()
    photos = 10 * LARGEST_BLOCK
    for number in range(10, photos):
        # Equal bytes are other photos: a version is a URI and an etag.
        (archive / f"{number:04d}.jpg").write_bytes(photo)
    out = tmp_path / "out"
    command = (archive, "--out", out, "--model", model, *SMALL)
    driver = subprocess.Popen(
        audit_command(*command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + JOB_WITHIN_S
    while not table_rows(out) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    said, errors = driver.communicate(timeout=JOB_WITHIN_S)
    assert driver.returncode == 1, errors
    assert errors.splitlines()[-1].startswith("error: told to end (SIGTERM)")
    assert (said, "Traceback" in errors) == ("", False)

    # test_crash.py and the nights of test_audit_local.py go on from there.
    committed = table_rows(out)
    assert 0 < len({row["uri"] for row in committed}) == len(committed) < photos


def test_sigterm_while_nothing_is_staged_ends_the_run_in_one_line(
    archive: Path, model: Path, tmp_path: Path
) -> None:
    os.mkfifo(archive / "not-a-photo.parquet")  # a manifest that nobody writes: listing waits for ever
    driver = subprocess.Popen(
        audit_command(archive / "not-a-photo.parquet", "--out", tmp_path / "out", "--model", model),
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    assert driver.stderr.readline().startswith("listing ")
    time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    said, errors = driver.communicate(timeout=JOB_WITHIN_S)
    assert (driver.returncode, said) == (1, "")
    assert errors.splitlines()[-1] == "error: stopped; run the same command again to go on"


def test_a_second_audit_on_the_same_out_is_refused_at_once(
    archive: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    os.mkfifo(archive / "endless.parquet")
    first = subprocess.Popen(
        audit_command(archive / "endless.parquet", "--out", out, "--model", model),
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    try:
        assert first.stderr.readline().startswith("listing ")
        assert main([str(archive), "--out", str(out), "--model", str(model)]) == 1
        refusal = capsys.readouterr().err.splitlines()[-1]
        assert refusal.startswith("error: another audit (run ")
        assert f"process {first.pid}" in refusal
    finally:
        first.kill()  # test_lock.py says what the next one finds
        first.communicate()
