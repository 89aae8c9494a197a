"""One audit at a time per ``--out``: a lock that a dead process can't hold for long.

On a file system it is the kernel's lock (flock), which ends with its process. On S3 it is the object
``lock.json``, written under a condition on its etag and again every few seconds: a process of this machine
that is gone, or any other that did not renew its lock for LEASE_SECONDS, is dead, and its lock is taken over.
A writer that sleeps through its lease and wakes up is refused by the table itself (``ledger.Committer``),
which is all that guards tables on other storage.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import storage

LEASE_SECONDS = 60.0
BEAT_SECONDS = 10.0


@contextlib.contextmanager
def hold(uri: str, run_id: str) -> Iterator[Callable[[], None]]:
    """Hold the lock at ``uri`` for the length of a run.

    Yields:
        a check, to be called now and then, which raises OSError when the lock was taken over.

    Raises:
        OSError: another run holds it, or it can't be written.
    """
    if storage.is_local(uri):
        with _hold_file(uri, run_id):
            yield lambda: None
    elif uri.startswith("s3://"):
        lock = _S3Lock(uri, run_id)
        lock.acquire()
        beating = threading.Thread(target=lock.beat_until_released, daemon=True)
        beating.start()
        try:
            yield lock.check
        finally:
            lock.released.set()
            beating.join()
    else:
        yield lambda: None


@contextlib.contextmanager
def _hold_file(path: str, run_id: str) -> Iterator[None]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OSError(_refusal(path, file.read(), "wait until it has ended, or stop it")) from None
        file.truncate(0)
        file.write(json.dumps(_owner(run_id)))
        file.flush()
        yield


class _S3Lock:
    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._owner = uri, _owner(run_id)
        self._etag: str | None = None
        self._beat = 0
        self._lost = False
        self.released = threading.Event()

    def acquire(self) -> None:
        """Write the lock where there is none or where its owner is dead."""
        found: str | None = None
        with contextlib.suppress(FileNotFoundError):
            text, found, age = storage.read_with_age(self._uri)
            if not _is_free(text, age):
                left = max(1.0, LEASE_SECONDS - age)
                remedy = f"wait until it has ended; if it died, its lock ends in {left:.0f} s"
                raise OSError(_refusal(self._uri, text.decode(errors="replace"), remedy))
        if not self._write(found):
            raise OSError(
                f"another audit has just begun to write beside {self._uri}; wait until it has ended"
            )

    def beat_until_released(self) -> None:
        """Renew the lock until the run ends, then leave it free for the next one."""
        while not self.released.wait(BEAT_SECONDS):
            # Storage that fails for a while is no reason to end a run: the table refuses a second writer.
            with contextlib.suppress(Exception):
                if not self._write(self._etag):
                    self._lost = True
                    return
        with contextlib.suppress(Exception):
            storage.write_if_unchanged(self._uri, b"{}", self._etag)

    def check(self) -> None:
        """Raise OSError when another run has taken the lock."""
        if self._lost:
            raise OSError(f"another audit took over {self._uri}; this one stops, its committed rows stay")

    def _write(self, etag: str | None) -> bool:
        self._beat += 1
        content = json.dumps({**self._owner, "beat": self._beat}).encode()
        written = storage.write_if_unchanged(self._uri, content, etag)
        if written is None:
            # The answer to this beat or to the one before may be lost: then the lock is ours all the same.
            try:
                text, found, _ = storage.read_with_age(self._uri)
            except FileNotFoundError:
                # Removed by a rule or by hand; audits leave it.
                written = storage.write_if_unchanged(self._uri, content, None)
            else:
                if text == content:
                    written = found
                elif self._is_ours(text):
                    written = storage.write_if_unchanged(self._uri, content, found)
        self._etag = written or self._etag
        return written is not None

    def _is_ours(self, text: bytes) -> bool:
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            return isinstance(found, dict) and {**found, "beat": 0} == {**self._owner, "beat": 0}
        return False


def _owner(run_id: str) -> dict[str, Any]:
    pid = os.getpid()
    where = {"host": socket.gethostname(), "machine": _machine()}
    return {"run_id": run_id, **where, "pid": pid, "process_started": _started(pid)}


def _machine() -> str:
    """What tells whether a process id is one of ours: boot and process namespace; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {Path('/proc/1/stat').read_text().split()[21]}"
    except OSError:
        return ""


def _is_free(text: bytes, age: float) -> bool:
    try:
        owner = json.loads(text)
        if not owner or age > LEASE_SECONDS:
            return True
        here = bool(owner["machine"]) and owner["machine"] == _machine()
        return here and _started(owner["pid"]) != owner["process_started"]
    except (ValueError, KeyError, TypeError):
        return age > LEASE_SECONDS


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A process that was killed stays in the list until its parent has seen it.
    return None if fields[0] == "Z" else fields[19]


def _refusal(uri: str, text: str, remedy: str) -> str:
    try:
        owner = json.loads(text)
        who = f"run {owner['run_id']} on {owner['host']}, process {owner['pid']}"
    except (ValueError, KeyError, TypeError):
        who = "unknown run"
    return f"another audit ({who}) is writing beside {uri}: {remedy}"
