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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder

from pipeline import storage
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
    """A Ray cluster of one node on loopback."""

    address: str
    dashboard: str  # URL; nothing answers there without a dashboard


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


def audit_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "jobs.audit", *map(str, arguments)]


def rows(table: str) -> list[dict[str, Any]]:
    """All rows of a Delta table; none where there is no table."""
    options = storage.delta_options(table)
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
def ray_cluster(cpus: int, *, dashboard: bool = False) -> Iterator[Cluster]:
    """``ray start --head`` with ``cpus`` logical CPUs until the block ends; other clusters are left alone."""
    # A short path, for Ray puts sockets there; its own, so that no other program finds this cluster.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    gcs, client, web, agent = free_ports(4)
    command = [
        *(str(RAY), "start", "--head", f"--num-cpus={cpus}", f"--temp-dir={folder}", f"--port={gcs}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--include-dashboard={dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-port={web}"),
        *("--object-store-memory=200000000", "--disable-usage-stats"),
    ]
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{web}")
    log = folder / "start.log"
    with log.open("wb") as log_file:
        # All that it starts stays in its process group; workers end when the node does.
        starter = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
        )
    try:
        if starter.wait(READY_WITHIN_S):
            raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-4000:]}")
        deadline = time.monotonic() + READY_WITHIN_S
        while dashboard and not _answers(cluster.dashboard):
            assert time.monotonic() < deadline, f"no dashboard at {cluster.dashboard}"
            time.sleep(0.2)
        yield cluster
    finally:
        with contextlib.suppress(ProcessLookupError):  # where nothing had started
            os.killpg(starter.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=5):
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
