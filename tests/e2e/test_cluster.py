"""A job on a cluster of several nodes, some with a (logical) GPU: nodes are lost and added in mid-run."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext

from pipeline import cluster
from pipeline.execution import LARGEST_BLOCK
from pipeline.schema import LISTING
from pipeline.storage import local_etag
from tests.e2e.harness import (
    JOB_WITHIN_S,
    ROOT,
    SMALL,
    Cluster,
    copy_code,
    ray_cluster,
    ray_command,
    submit,
    table_rows,
)

pytestmark = pytest.mark.e2e

# Files for a first commit lie before the photo that the job waits for, and blocks to detect after it.
BEFORE, AFTER = LARGEST_BLOCK, LARGEST_BLOCK


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A head without CPUs whose ports want a token."""
    with ray_cluster(0, dashboard=True, token=secrets.token_hex(16)) as started:
        yield started


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_code(tmp_path_factory.mktemp("code"))


@pytest.mark.long
def test_who_has_no_token_can_submit_nothing(guarded: Cluster, tmp_path: Path) -> None:
    refused = ray_command(
        *(guarded, "job", "submit", "--address", guarded.dashboard, "--", "true"), cwd=tmp_path, token=False
    )
    assert refused.code != 0
    assert "no authentication token" in refused.err
    assert guarded.api("/api/jobs/") == []


@pytest.mark.long
def test_a_cluster_where_no_node_gets_a_cpu_ends_the_job_and_says_so(guarded: Cluster) -> None:
    impatient = (
        "from pipeline import cluster; cluster.NODES_WITHIN_SECONDS = 1; cluster.connect().__enter__()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", impatient],
        **{"cwd": ROOT, "env": os.environ | guarded.environment | {"RAY_ADDRESS": guarded.address}},
        **{"capture_output": True, "text": True, "timeout": JOB_WITHIN_S},
    )
    assert "got a CPU within 1 s; add one with `ray start" in ran.stderr.splitlines()[-1]


LOCAL = """
import json, os, pathlib, ray, signal, subprocess, sys
from pipeline import cluster
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
with cluster.connect():
    token = os.environ["RAY_AUTH_TOKEN"]
    address = ray.get_runtime_context().gcs_address
    commands = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True).stdout
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    joined = subprocess.run(
        [sys.executable, "-c", f"import ray; ray.init('{address}')"],
        env=stranger | {"RAY_AUTH_MODE": "disabled"}, capture_output=True,
    )
    works = ray.get(ray.remote(lambda: "yes").remote())
    session = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in session.rglob("*") if path.is_file()]
    print(json.dumps({
        "works": works,
        "signals": before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "stranger joined": joined.returncode == 0,
        "token in a command line": token in commands,
        "files of Ray": len(files) > 10,
        "token in one": any(token.encode() in path.read_bytes() for path in files),
    }))
"""


@pytest.mark.long
def test_a_local_ray_wants_a_token_that_only_its_own_processes_have(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ran = subprocess.run(
        [sys.executable, "-c", LOCAL],
        **{"cwd": ROOT, "env": environment | {"HOME": str(tmp_path)}},
        **{"capture_output": True, "text": True, "timeout": JOB_WITHIN_S},
    )
    assert ran.returncode == 0, ran.stderr
    said = {"works": "yes", "signals": True, "stranger joined": False, "token in a command line": False}
    said |= {"files of Ray": True, "token in one": False}
    assert json.loads(ran.stdout.splitlines()[-1]) == said
    assert not (tmp_path / ".ray").exists()
    assert "authentication" not in ran.stderr


@pytest.mark.long
def test_decoding_does_not_run_away_from_a_slow_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, mebibyte = 60, 1 << 20

    def decode(block: pa.Table) -> pa.Table:
        (tmp_path / f"{block['number'][0]}").touch()
        return pa.table({"pixels": pa.array([bytes(mebibyte)], pa.large_binary())})

    class Detect:
        def __init__(self) -> None:
            self.taken = 0

        def __call__(self, block: pa.Table) -> pa.Table:
            time.sleep(0.1)
            self.taken += 1
            return pa.table({"ahead": [len(list(tmp_path.iterdir())) - self.taken]})

    # Put back afterwards: the datasets of other tests are not to be bounded.
    options = DataContext.get_current().execution_options
    monkeypatch.setattr(options, "resource_limits", options.resource_limits)
    with cluster.connect(workers=1) as shares:
        cluster.bound_decoded(shares, mebibyte)
        numbers = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(blocks)])
        decoded = numbers.map_batches(
            decode, batch_size=None, batch_format="pyarrow", num_cpus=shares.decode_cpus
        )
        detected = decoded.map_batches(
            *(Detect,),
            **{"batch_size": 1, "batch_format": "pyarrow", "num_cpus": shares.detector_cpus},
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        ahead = [row["ahead"] for row in detected.iter_rows()]
    assert len(ahead) == blocks
    assert max(ahead) <= 2 * cluster.BLOCKS_AHEAD_OF_CPU


# Four nodes start one after the other, and two more: on a busy machine that alone takes minutes.
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_outlives_its_nodes_and_runs_each_step_where_it_belongs(
    guarded: Cluster,
    code: Path,
    sample_archive: Path,
    model: Path,
    held_photo: tuple[dict[str, Any], threading.Event],
    tmp_path: Path,
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    photos = _many(sample_archive / "photos/2024/launch", archive, BEFORE + AFTER)
    # The job can't end before its nodes are gone, however fast they are.
    stuck, let_go = held_photo
    listed = [*map(_listed, photos[:BEFORE]), stuck, *map(_listed, photos[BEFORE:])]
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(listed, schema=LISTING), manifest)
    guarded.add_node("gpu-1", cpus=1, gpus=1)
    guarded.add_node("cpu-1", cpus=2)
    guarded.add_node("cpu-2", cpus=2)

    arguments = (manifest, "--out", out, "--model", model, *SMALL)
    submitted = submit(guarded, code, tmp_path, "nightly", *arguments, wait=False)
    assert submitted.code == 0, submitted.err
    _wait_while_running(guarded, "nightly", lambda: not table_rows(out))

    guarded.kill_node("cpu-1")
    guarded.add_node("cpu-3", cpus=2)
    guarded.kill_node("gpu-1")
    guarded.add_node("gpu-2", cpus=1, gpus=1)
    let_go.set()
    _wait_while_running(guarded, "nightly", lambda: True)

    job = guarded.api("/api/jobs/nightly")
    logs = ray_command(
        guarded, "job", "logs", "--address", guarded.dashboard, "--log-style=record", "nightly", cwd=tmp_path
    ).out
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0), logs
    assert f"of {len(photos) + 1}, " in logs
    result = next(json.loads(line) for line in reversed(logs.splitlines()) if line.startswith("{"))
    assert json.loads((out / "runs" / result["run_id"] / "result.json").read_text()) == result
    found = [row["uri"] for row in table_rows(out)]
    assert sorted(found) == sorted(row["uri"] for row in listed)

    names = guarded.node_names()
    where = {step: {names[node] for node in nodes} for step, nodes in _nodes_by_step(guarded).items()}
    assert where["MapBatches(read_and_decode)"] <= {"cpu-1", "cpu-2", "cpu-3", "gpu-2"}
    assert "cpu-2" in where["MapBatches(read_and_decode)"]
    assert where["MapWorker(MapBatches(Detector)).submit"] == {"gpu-1", "gpu-2"}


def _many(folder: Path, archive: Path, count: int) -> list[Path]:
    archive.mkdir()
    originals = sorted(folder.glob("*.jpg"))
    copies = [archive / f"{number:04d}.jpg" for number in range(count)]
    for number, copy in enumerate(copies):
        copy.hardlink_to(originals[number % len(originals)])
    return copies


@pytest.fixture
def held_photo(sample_archive: Path) -> Iterator[tuple[dict[str, Any], threading.Event]]:
    """A photo on a web server that sends it once the event is set, as a listing has it."""
    let_go = threading.Event()
    data = (sample_archive / "photos/2024/launch/rocket.jpg").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            let_go.wait()
            self.do_HEAD()
            self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("ETag", "e")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/stuck.jpg"
        yield {"uri": uri, "etag": "e", "size_bytes": len(data), "modified_at": None}, let_go
        let_go.set()
        server.shutdown()


def _listed(photo: Path) -> dict[str, Any]:
    status = photo.stat()
    etag = local_etag(status)
    return {"uri": str(photo), "etag": etag, "size_bytes": status.st_size, "modified_at": None}


def _wait_while_running(running: Cluster, job: str, waits: Callable[[], bool]) -> None:
    deadline = time.monotonic() + JOB_WITHIN_S
    while waits() and running.api(f"/api/jobs/{job}")["status"] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, running.api(f"/api/jobs/{job}/logs")["logs"]
        time.sleep(0.3)


def _nodes_by_step(running: Cluster) -> dict[str, set[str]]:
    tasks = running.api("/api/v0/tasks?detail=1&limit=10000")["data"]["result"]["result"]
    nodes: dict[str, set[str]] = {}
    for task in tasks:
        if task["node_id"]:
            nodes.setdefault(task["name"], set()).add(task["node_id"])
    return nodes
