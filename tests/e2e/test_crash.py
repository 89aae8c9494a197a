"""The driver is killed in the middle of a run; the same command goes on from there."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.audit import PHOTOS_PER_FILE
from pipeline.schema import LISTING
from pipeline.storage import local_etag
from tests.e2e.harness import (
    JOB_WITHIN_S,
    ROOT,
    SMALL,
    Cluster,
    audit,
    audit_command,
    ray_cluster,
    table_rows,
)

pytestmark = pytest.mark.e2e

# One file's worth is committed before the kill; the rest is not.
PHOTOS = PHOTOS_PER_FILE + 72


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[Cluster]:
    """A cluster with a single logical CPU, on which stages that ask for whole CPUs would wait for ever."""
    with ray_cluster(1) as cluster:
        yield cluster


def test_a_killed_run_is_taken_up_again_without_a_lost_or_a_double_row(
    one_cpu: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", one_cpu.address)
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    noise = np.random.default_rng(0)
    for number in range(PHOTOS):
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(archive / f"{number:04d}.jpg")
    # A read that never ends: the run can't finish before it is killed, however fast the machine is.
    stuck = tmp_path / "stuck.jpg"
    os.mkfifo(stuck)
    manifest = _manifest(tmp_path, [*sorted(archive.iterdir()), stuck])

    driver = subprocess.Popen(
        audit_command(manifest, "--out", out, "--model", model, *SMALL),
        **{"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE},
    )
    deadline = time.monotonic() + JOB_WITHIN_S
    while not table_rows(out) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    _, said = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, said.decode()
    committed = {(row["uri"], row["etag"]) for row in table_rows(out)}
    assert 0 < len(committed) < PHOTOS

    # What a task had staged when the driver died: nobody committed it, nobody reads it.
    whole = next((out / "table").glob("part-*.parquet"))
    (out / "table" / "part-killed-0.parquet").write_bytes(whole.read_bytes())

    again = audit(archive, "--out", out, "--model", model, *SMALL)
    assert again.result["photos"] == PHOTOS - len(committed)
    found = [(row["uri"], row["etag"]) for row in table_rows(out)]
    assert len(found) == len(set(found)) == PHOTOS
    assert set(found) == {(str(path), local_etag(path.stat())) for path in archive.iterdir()}
    assert committed < set(found)


def _manifest(folder: Path, photos: list[Path]) -> Path:
    listed = [
        {"uri": str(path), "etag": local_etag(path.stat()), "size_bytes": 0, "modified_at": None}
        for path in photos
    ]
    pq.write_table(pa.Table.from_pylist(listed, schema=LISTING), folder / "manifest.parquet")
    return folder / "manifest.parquet"
