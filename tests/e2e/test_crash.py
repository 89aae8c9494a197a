"""Whatever is killed at whatever instant: the same command ends with one row and one mask per photo."""

import io
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from benchmarks.deltalog import DeltaLog
from benchmarks.processes import Process, end_session, of_session
from pipeline.execution import LARGEST_BLOCK
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

PHOTOS = 12 * LARGEST_BLOCK


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[Cluster]:
    """A cluster with a single logical CPU, on which stages that ask for whole CPUs would wait for ever."""
    with ray_cluster(1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    noise = np.random.default_rng(0)
    for number in range(PHOTOS):
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / f"{number:04d}.jpg")
    return folder


class Run:
    """An audit in a session of its own, so that all that it starts can be found, and its table's log."""

    def __init__(self, out: Path, *arguments: str | Path) -> None:
        self.table = out / "table"
        self.log = DeltaLog(fsspec.filesystem("file"), str(self.table))
        self.log.read_new()
        self.files_before = self.files()
        self.driver = subprocess.Popen(
            audit_command(*arguments),
            **{"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
            start_new_session=True,
        )

    def files(self) -> set[str]:
        return {path.name for path in self.table.glob("part-*.parquet")}

    def uncommitted(self) -> set[str]:
        """Files of this run that no commit names."""
        found = self.files() - self.files_before
        self.log.read_new()
        return found - self.log.files.keys()

    def working(self, title: str) -> Process | None:
        return next((found for found in of_session(self.driver.pid) if found.title.startswith(title)), None)

    def wait_for(self, true: Callable[[], object]) -> None:
        """Look often: what is waited for may last a few milliseconds."""
        deadline = time.monotonic() + JOB_WITHIN_S
        while not true():
            time.sleep(0.002)
            assert self.driver.poll() is None, self.driver.stderr.read()
            assert time.monotonic() < deadline

    def kill(self) -> None:
        """``kill -9`` of the driver, which must be alive."""
        self.driver.send_signal(signal.SIGKILL)
        _, said = self.driver.communicate()
        assert self.driver.returncode == -signal.SIGKILL, said

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        _, said = self.driver.communicate(timeout=JOB_WITHIN_S)
        return self.driver.returncode, said

    def close(self) -> None:
        self.driver.kill()
        end_session(self.driver.pid)
        self.driver.wait()
        self.driver.stderr.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def starter(out: Path, *arguments: str | Path) -> Run:
        runs.append(Run(out, *arguments))
        return runs[-1]

    yield starter
    for run in runs:
        run.close()


def assert_one_row_and_mask_each(out: Path, archive: Path) -> None:
    rows = table_rows(out)
    expected = [(str(path), local_etag(path.stat())) for path in sorted(archive.iterdir())]
    assert sorted((row["uri"], row["etag"]) for row in rows) == expected
    for row in rows:
        assert row["status"] == "ok"
        with Image.open(io.BytesIO(row["mask"])) as mask:
            assert mask.size == (row["mask_width"], row["mask_height"]) == (64, 48)


@pytest.mark.long
def test_a_driver_killed_after_before_and_inside_a_commit_loses_and_doubles_no_row(
    one_cpu: Cluster, archive: Path, model: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    # Each has a Ray of its own: a cluster that outlives a killed driver keeps CPUs for it for minutes.
    out = tmp_path / "out"
    options = ("--out", out, "--model", model, *SMALL)
    run = start(out, archive, *options)
    run.wait_for(lambda: run.log.read_new() and run.log.rows)
    run.kill()
    committed = len(table_rows(out))
    assert 0 < committed < PHOTOS

    # A file that comes soon after a commit waits for the next one, which is some seconds away.
    run = start(out, archive, *options)
    before = run.log.rows
    run.wait_for(lambda: run.log.read_new() and run.log.rows > before)
    run.wait_for(run.uncommitted)
    run.kill()
    orphans = run.uncommitted()
    assert orphans
    assert committed < len(table_rows(out)) < PHOTOS

    # Delta writes what it commits beside its log before it gives it its name.
    run = start(out, archive, *options)
    log = run.table / "_delta_log"
    seen = set(os.listdir(log))
    run.wait_for(run.uncommitted)
    run.wait_for(lambda: set(os.listdir(log)) - seen)
    run.kill()

    missing = PHOTOS - len(table_rows(out))
    again = audit(archive, *options, environment={"RAY_ADDRESS": one_cpu.address})
    assert again.result["photos"] == missing
    assert_one_row_and_mask_each(out, archive)
    # Nobody took up the files that the dead had left.
    assert all((run.table / name).exists() for name in orphans)
    run.log.read_new()
    assert not orphans & run.log.files.keys()


@pytest.mark.long
def test_a_killed_task_and_a_killed_detector_are_replaced_within_the_run(
    archive: Path, model: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    run = start(out, archive, "--out", out, "--model", model, *SMALL)
    for title in ("ray::MapBatches(read_and_decode", "ray::MapWorker(MapBatches(Detector)).submit"):
        run.wait_for(lambda title=title: run.working(title))
        victim = run.working(title)
        if victim:
            os.kill(victim.pid, signal.SIGKILL)
    code, said = run.end()
    assert code == 0, said
    assert_one_row_and_mask_each(out, archive)


@pytest.mark.long
def test_a_run_whose_raylet_dies_ends_and_the_next_goes_on(
    archive: Path, model: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    command = (archive, "--out", out, "--model", model, *SMALL)
    run = start(out, *command)
    run.wait_for(run.uncommitted)
    (raylet,) = [process for process in of_session(run.driver.pid) if process.kind == "raylet"]
    os.kill(raylet.pid, signal.SIGKILL)
    # Ray itself ends a driver whose raylet is gone, without asking Python.
    code, said = run.end()
    assert code == 1, said

    committed = len(table_rows(out))
    assert audit(*command).result["photos"] == PHOTOS - committed
    assert_one_row_and_mask_each(out, archive)
