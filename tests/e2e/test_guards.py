"""What makes a run stop by itself, and what it leaves."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.execution import LARGEST_BLOCK
from pipeline.layout import AuditLayout
from pipeline.listing import write_listing
from pipeline.view import current_view
from tests.e2e.harness import JOB_WITHIN_S, ROOT, SMALL, Cluster, audit, audit_command, table_rows

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
    archive: Path, model: Path, tmp_path: Path, joined: Cluster
) -> None:
    out = tmp_path / "out"
    command = (archive, "--out", out, "--model", model, *SMALL)
    assert audit(*command).result["photos"] == 10
    for number in range(3):
        (archive / f"{number:04d}.jpg").unlink()

    refused = audit(*command)
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("error: 3 of the 10 photos that were at")
    assert "--max-lost 0.3" in refused.err
    assert len(shown(out)) == 10

    # A narrower look is no loss.
    assert audit(*command, "--limit", 1).code == 0
    assert len(shown(out)) == 10

    meant = audit(*command, "--max-lost", 0.3)
    assert meant.code == 0
    assert "3 photos are gone" in meant.err
    assert shown(out) == {f"{number:04d}.jpg" for number in range(3, 10)}
    # History stays.
    assert len(table_rows(out)) == 10


def test_sigterm_commits_what_is_staged_and_the_next_run_goes_on(
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

    committed = len(table_rows(out))
    assert 0 < committed < photos
    assert audit(*command).result["photos"] == photos - committed
    assert len({row["uri"] for row in table_rows(out)}) == len(table_rows(out)) == photos


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
    archive: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    os.mkfifo(archive / "endless.parquet")
    first = subprocess.Popen(
        audit_command(archive / "endless.parquet", "--out", out, "--model", model),
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    assert first.stderr.readline().startswith("listing ")
    second = audit(archive, "--out", out, "--model", model)
    assert second.code == 1
    assert second.err.splitlines()[-1].startswith("error: another audit (run ")
    assert f"process {first.pid}" in second.err

    first.kill()
    first.communicate()
    assert write_listing(str(archive), str(tmp_path / "listing")).photos == 10
    assert audit(archive, "--out", out, "--model", model, *SMALL).result["photos"] == 10
