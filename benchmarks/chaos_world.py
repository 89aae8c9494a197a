"""What ``benchmarks.chaos`` breaks: an S3 server, the archive on it, and runs of the audit over that."""

import hashlib
import io
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

from benchmarks.deltalog import DeltaLog
from benchmarks.processes import end_session, of_session, start, wait_until

ARCHIVE, OUT = "photos/archive", "out/audit"
# Photos that each run finds to do, and how many of them replace one that was there.
TO_DO, REPLACED = 240, 20
ENDS_WITHIN_S = 300.0


class Server:
    """A SeaweedFS that was started by ``infra.s3_server`` and can be killed and started again as it was."""

    def __init__(self, folder: Path) -> None:
        (self.pid,) = [
            int(name)
            for name in os.listdir("/proc")
            if name.isdigit() and f"-dir={folder.resolve()}\0" in _text(f"/proc/{name}/cmdline")
        ]
        self._command = _text(f"/proc/{self.pid}/cmdline").split("\0")[:-1]
        self._environment = dict(
            pair.split("=", 1) for pair in _text(f"/proc/{self.pid}/environ").split("\0") if pair
        )
        self._again: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        if self._again:
            self._again.wait()

    def start_again(self, fs: S3FileSystem) -> None:
        """Start it as it was, and wait until it answers."""
        self._again = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._again.pid

        def answers() -> bool:
            try:
                fs.call_s3("list_buckets")
                return True
            except (OSError, BotoCoreError, ClientError):
                return False

        if not wait_until(answers, 60):
            raise RuntimeError("the S3 server did not come back")

    def stop(self) -> None:
        """End what ``start_again`` started; the first one is ``infra.s3_server``'s."""
        if self._again:
            self.kill()


@dataclass
class Archive:
    """The photos on the server and the audit table over them, as this script alone knows them."""

    fs: S3FileSystem
    # What lets other processes find the server.
    environment: Mapping[str, str]
    rng: random.Random
    photos: Iterator[bytes]
    log: DeltaLog
    # uri -> etag of what lies there now, and all that ever lay there.
    now: dict[str, str] = field(default_factory=dict)
    ever: set[tuple[str, str]] = field(default_factory=set)
    # (uri, etag) of each committed row, when it was audited, and how many files of the log are counted in.
    committed: Counter[tuple[str, str]] = field(default_factory=Counter)
    audited: set[tuple[str, str, datetime]] = field(default_factory=set)
    counted: int = 0
    # The same of each file that was seen beside the table and that no commit named.
    uncommitted_rows: dict[str, set[tuple[str, str, datetime]]] = field(default_factory=dict)

    def refill(self) -> None:
        """Put photos until TO_DO versions wait for a row: some replace others, the rest have new keys."""
        objects = {}
        for uri in self.rng.sample(sorted(self.now), min(REPLACED, len(self.now))):
            objects[uri] = next(self.photos)
        waiting = len(self.missing() | objects.keys())
        for number in range(len(self.now), len(self.now) + TO_DO - waiting):
            objects[f"s3://{ARCHIVE}/{number % 10}/{number:06d}.jpg"] = next(self.photos)
        self.fs.pipe(objects)
        self.now |= {uri: hashlib.md5(data).hexdigest() for uri, data in objects.items()}
        self.ever |= self.now.items()

    def missing(self) -> set[str]:
        """Photos whose present version has no row."""
        return {uri for uri, etag in self.now.items() if (uri, etag) not in self.committed}

    def take_stock(self) -> None:
        """Count the rows that were committed since, and the files that lie there and were not."""
        self.log.read_new()
        for name in self.log.added[self.counted :]:
            rows = self._rows(name)
            self.committed.update((uri, etag) for uri, etag, _ in rows)
            self.audited |= rows
        self.counted = len(self.log.added)
        for name in self.uncommitted() - self.uncommitted_rows.keys():
            self.uncommitted_rows[name] = self._rows(name)

    def orphaned(self) -> int:
        """Rows that were written and that no commit ever named; not those of copies."""
        never = self.uncommitted_rows.keys() - self.log.files.keys()
        return sum(len(self.uncommitted_rows[name] - self.audited) for name in never)

    def uncommitted(self) -> set[str]:
        """Names of the Parquet files beside the table that no commit names."""
        names = {path.removeprefix(f"{self.log.path}/") for path in self.fs.find(self.log.path)}
        return {
            name for name in names if name.endswith(".parquet") and "/" not in name
        } - self.log.files.keys()

    def _rows(self, name: str) -> set[tuple[str, str, datetime]]:
        file = io.BytesIO(self.fs.cat_file(f"{self.log.path}/{name}"))
        rows = pq.read_table(file, columns=["uri", "etag", "audited_at"]).to_pylist()
        return {(row["uri"], row["etag"], row["audited_at"]) for row in rows}


class Run:
    """One run of the audit, and what can be seen of it from outside."""

    def __init__(self, archive: Archive, stderr: Path) -> None:
        self.archive, self.stderr = archive, stderr
        self.began = time.time()
        self.files_before = archive.log.files.keys() | archive.uncommitted()
        self.rows_before = archive.log.rows
        self.to_do = len(archive.missing())
        self.committed_seen_at = 0.0
        self.arguments = ["jobs.audit", f"s3://{ARCHIVE}", "--out", f"s3://{OUT}"]
        self.arguments += ["--working-size", "160", "--masks", "shards"]
        with stderr.open("w") as file:
            self.process = start(self.arguments, archive.environment, file)

    def said(self, pattern: str) -> bool:
        return re.search(pattern, self.stderr.read_text(errors="replace"), re.MULTILINE) is not None

    def look(self) -> None:
        """Read what the table's log has got."""
        if self.archive.log.read_new():
            self.committed_seen_at = time.time()

    def staged(self) -> bool:
        return bool(self.archive.uncommitted() - self.files_before)

    def is_at(self, moment: str) -> bool:
        """Whether the run has come to one of MOMENTS."""
        log = self.archive.log
        match moment:
            case "start":
                return True
            case "Ray starts":
                return self.said("photos to audit")
            case "detecting":
                return log.rows > self.rows_before or self.staged()
            case "staged":
                return self.staged()
            case "committed":
                # One that was just made: a commit of this run and not an old one.
                return log.rows > self.rows_before and time.time() - self.committed_seen_at < 0.1
        assert moment == "end"
        return log.rows - self.rows_before >= self.to_do > 0 or self.said("^report")

    def phase(self) -> str:
        """What the run is at, for the table of results."""
        if self.is_at("end"):
            return "report or cleaning"
        if self.staged():
            return "staged, not committed"
        if self.archive.log.rows > self.rows_before:
            return "detecting"
        if self.said("detector"):
            return "first photos"
        if self.said("photos to audit"):
            return "Ray starts"
        return "subtracting" if self.said("photos listed") else "start, listing"

    def has_begun(self) -> bool:
        """Wait until the run has got its lock or has been refused, and say whether it goes on."""
        wait_until(lambda: self.process.poll() is not None or self.said("photos to audit"), ENDS_WITHIN_S)
        return self.process.poll() is None

    def wait_for_commit(self) -> None:
        """Wait until the run has committed or has ended."""
        wait_until(lambda: self.process.poll() is not None or self.archive.log.read_new(), ENDS_WITHIN_S)

    def find(self, victim: str) -> int | None:
        """Process id of ``victim`` in this run's Ray."""
        working = {"task worker": ("stage worker", "decode worker")}.get(victim, (victim,))
        found = [process.pid for process in of_session(self.process.pid) if process.kind in working]
        return self.archive.rng.choice(found) if found else None

    def end(self) -> int | None:
        """Wait for the end and return the exit code; None when it did not come in time."""
        try:
            self.stdout, _ = self.process.communicate(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            return None
        return self.process.returncode

    def close(self) -> None:
        """Kill what is left of the run a while after its driver is gone: ``left`` says of what kinds."""
        if self.process.poll() is None:
            self.process.kill()
        self.left = sorted(process.kind for process in end_session(self.process.pid))
        self.process.wait()

    def error(self) -> str:
        """Its last words, when it failed."""
        said = re.findall("^error: .*$", self.stderr.read_text(errors="replace"), re.MULTILINE)
        return said[-1] if said else ""

    def seconds_since_commit(self, until: float) -> float:
        """Time before ``until`` that gave no row: since the log's last commit, or since this run's start."""
        return max(0.0, until - max([self.began, *(at for at, _ in self.archive.log.grown[-1:])]))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
