"""What the whole-job tests share: the commands as other programs call them, and Ray clusters to join."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from jobs.audit import main
from pipeline.delta import storage_options
from pipeline.layout import AuditLayout

ROOT = Path(__file__).parents[2]
# Beside this interpreter: the environment under test need not be activated.
RAY = Path(sysconfig.get_path("scripts"), "ray")
READY_WITHIN_S = 120.0
JOB_WITHIN_S = 240.0

# Pixels don't matter to most claims, time does.
SMALL = ("--working-size", "160")


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line on stdout."""
        assert self.code in (0, 3), self.err
        return json.loads(self.out.splitlines()[-1])


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster on this machine: a head, and the nodes that were added."""

    address: str
    dashboard: str  # URL; nothing answers there without a dashboard
    folder: Path
    environment: dict[str, str]  # what its nodes have beside this process's own
    nodes: dict[str, int] = field(default_factory=dict)  # names and process groups

    def add_node(self, name: str, *, cpus: int, gpus: int = 0) -> None:
        """``ray start`` a node with logical CPUs and GPUs, as on a machine of its own."""
        _start_node(self, name, f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}")

    def kill_node(self, name: str) -> None:
        """``kill -9`` the node's processes, as a machine that loses its power."""
        with contextlib.suppress(ProcessLookupError):  # where nothing had started
            os.killpg(self.nodes.pop(name), signal.SIGKILL)

    def api(self, path: str) -> Any:
        """What the dashboard's REST API answers, with the cluster's token."""
        token = self.environment.get("RAY_AUTH_TOKEN", "")
        request = urllib.request.Request(
            f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def node_names(self) -> dict[str, str]:
        """Names of all nodes, also of dead ones, by Ray's node id."""
        listed = self.api("/api/v0/nodes?detail=1&limit=1000")["data"]["result"]["result"]
        return {node["node_id"]: node["labels"]["name"] for node in listed}


def audit(*arguments: str | Path, environment: dict[str, str] | None = None) -> Ran:
    """Run ``python -m jobs.audit`` in a process of its own."""
    ended = subprocess.run(
        audit_command(*arguments),
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=JOB_WITHIN_S,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def audit_here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """The same in this process, which has imported everything already; for a test that joined a cluster."""
    code = main([str(argument) for argument in arguments])
    return Ran(code, *capsys.readouterr())


def audit_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "jobs.audit", *map(str, arguments)]


def submit(
    cluster: Cluster, code: Path, elsewhere: Path, job: str, *arguments: str | Path, wait: bool = True
) -> Ran:
    """``ray job submit … -- python -m jobs.audit …`` from a folder that has nothing to do with the code."""
    return ray_command(
        *(cluster, "job", "submit", "--address", cluster.dashboard, "--submission-id", job),
        *("--working-dir", str(code), *(() if wait else ("--no-wait",))),
        *("--", sys.executable, "-m", "jobs.audit", *map(str, arguments)),
        cwd=elsewhere,
    )


def ray_command(cluster: Cluster, *arguments: str, cwd: Path, token: bool = True) -> Ran:
    """Run ``ray …`` as a user of the cluster, or as one without its token."""
    ended = subprocess.run(
        [str(RAY), *arguments],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": ""}
        | (cluster.environment if token else {"RAY_AUTH_MODE": "disabled"}),
        capture_output=True,
        text=True,
        timeout=JOB_WITHIN_S,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def copy_code(folder: Path) -> Path:
    """A clean working directory: the rooms that a job needs, and nothing else of the repository."""
    for room in ("bdnet", "pipeline", "jobs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def rows(table: str) -> list[dict[str, Any]]:
    """All rows of a Delta table; none where there is no table."""
    options = storage_options(table)
    if not DeltaTable.is_deltatable(table, storage_options=options):
        return []
    found = (
        QueryBuilder().register("t", DeltaTable(table, storage_options=options)).execute("SELECT * FROM t")
    )
    return pa.table(found).to_pylist()


def table_rows(out: str | Path) -> list[dict[str, Any]]:
    """The audit table under ``out``."""
    return rows(AuditLayout(str(out)).table)


@contextlib.contextmanager
def ray_cluster(
    cpus: int, *, gpus: int = 0, dashboard: bool = False, token: str | None = None
) -> Iterator[Cluster]:
    """``ray start --head`` with logical CPUs and GPUs until the block ends; other clusters are left alone.

    With a ``token`` its ports want that token, else none.
    """
    # A short path, for Ray puts sockets there; its own, so that no other program finds this cluster.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    gcs, client, web = free_ports(3)
    # A node counts as dead when it has not answered for 5 s, not for 15.
    environment = {"RAY_health_check_period_ms": "1000", "RAY_AUTH_MODE": "token" if token else "disabled"}
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{web}", folder, environment)
    try:
        _start_node(
            *(cluster, "head", "--head", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--port={gcs}"),
            *(f"--ray-client-server-port={client}", f"--include-dashboard={dashboard}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={web}"),
        )
        deadline = time.monotonic() + READY_WITHIN_S
        while dashboard and not _answers(cluster.dashboard):
            assert time.monotonic() < deadline, f"no dashboard at {cluster.dashboard}"
            time.sleep(0.2)
        yield cluster
    finally:
        for name in list(cluster.nodes):
            cluster.kill_node(name)
        shutil.rmtree(folder, ignore_errors=True)


def _start_node(cluster: Cluster, name: str, *options: str) -> None:
    # Ports that nothing else has: by default Ray's nodes choose from ranges, and on one machine they collide.
    agent, agent_grpc = free_ports(2)
    command = [
        *(str(RAY), "start", *options, f"--labels=name={name}", f"--temp-dir={cluster.folder / name}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *("--object-store-memory=200000000", "--disable-usage-stats"),
    ]
    log = cluster.folder / f"start-{name}.log"
    with log.open("wb") as log_file:
        # All that it starts stays in its process group; workers end when the node does.
        starter = subprocess.Popen(
            *(command,),
            **{"env": os.environ | cluster.environment, "stdin": subprocess.DEVNULL},
            **{"stdout": log_file, "stderr": log_file, "start_new_session": True},
        )
    cluster.nodes[name] = starter.pid
    if starter.wait(READY_WITHIN_S):
        raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError:  # it wants a token
        return True
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
