"""The processes of one running job, seen from outside (Linux): who they are, their memory, ending them.

A job that was started in a session of its own has all of its Ray in that session, whoever dies.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]

# What a process's command line or Ray's title of it holds, and what that makes it; the first that fits.
KINDS = (
    ("/gcs_server", "gcs"),
    ("/raylet/raylet ", "raylet"),
    ("ray::MapWorker", "detector"),
    ("ray::MapBatches(stage_rows", "stage worker"),
    ("ray::MapBatches(read_and_decode", "decode worker"),
    ("ray::tidy", "tidying worker"),
    ("ray::IDLE", "idle worker"),
    ("default_worker.py", "idle worker"),
    ("ray::", "Ray's helper"),
    ("/ray/", "Ray's helper"),
)


@dataclass(frozen=True)
class Process:
    """One process of a job; ``title`` is its command line, which Ray sets to what a worker does."""

    pid: int
    title: str
    kind: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``share`` counts each page once over all processes that map it (PSS), so that
    shares add up; ``own`` is heap and stacks alone: neither code nor the object store."""

    share: int
    own: int


def start(arguments: list[str], environment: Mapping[str, str], stderr: IO[str]) -> subprocess.Popen[str]:
    """Start ``python -m arguments...`` in a session of its own; its result comes on stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def of_session(leader: int) -> list[Process]:
    """All living processes of the session that ``leader`` began, also when that one is dead."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            state, _, _, session = _stat(int(name))
            if int(session) == leader and state not in "ZX":
                title = (
                    Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                found.append(Process(int(name), title.strip(), _kind(int(name), leader, title)))
    return found


def memory(pid: int) -> Memory | None:
    """What a process holds now; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return Memory(sizes["Pss"], sizes["Pss_Anon"])


def end_session(leader: int, within: float = 15.0) -> list[Process]:
    """Wait until all processes of a session have ended, kill those that remain and return them."""
    wait_until(lambda: not of_session(leader), within)
    left = of_session(leader)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return left


def wait_until(true: Callable[[], object], within: float) -> bool:
    """Whether ``true()`` came true within so many seconds."""
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _stat(pid: int) -> list[str]:
    """State, parent, process group and session."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]


def _kind(pid: int, leader: int, title: str) -> str:
    if pid == leader:
        return "driver"
    return next((kind for part, kind in KINDS if part in title), "other")
