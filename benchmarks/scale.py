"""Do cost per photo and memory stay flat as the archive grows? ``python -m benchmarks.scale``.

Archives of 10,000, 100,000 and 1,000,000 known photos and 1,000 new ones, made without any photo: listing
shards and table files through ``pipeline.schema`` and ``pipeline.ledger``. Each step runs in a process of its
own, the best of three times. It runs first on an archive of 100 photos, once to warm up and three times to
measure what any archive costs (``fixed_seconds``: starting queries, the report's gallery and chart); the cost
per photo is what is above that.

The steps: ``list`` (a stub of S3 that makes up pages of 1,000 keys, so without the server's time),
``list from server`` (SeaweedFS with real, tiny objects), ``subtract`` (Ray tasks, as in an audit), ``lost``
(the comparison with the last listing), ``report`` (``jobs.report``).

The tables: ``compacted`` (files of 16,384 rows, as housekeeping leaves those with masks), ``as staged``
(files of 64 rows, as a first audit that died leaves most of them), and ``shuffled``: compacted, and a
manifest in random order. A step's process imports what that step needs, no more. CPU seconds are the
driver's and its workers'; they say more than seconds on a busy machine.
"""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from PIL import Image

from benchmarks.tables import RESULTS, write_csv
from infra.s3_server import s3_server
from pipeline import listing, storage
from pipeline.layout import AuditLayout
from pipeline.ledger import Committer, stage, subtract
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, LISTING
from pipeline.view import Run, lost, previous_listing

SIZES = (10_000, 100_000, 1_000_000)
SERVER_SIZES = (1_000, 10_000)
NEW = 1_000
# No such folder: the report says of each photo of its gallery that it is no longer there.
SOURCE = "/no/such/archive"
DIGEST = "a" * 32
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS_PER_STAGED_FILE = 64
ROWS_PER_COMPACTED_FILE = 16_384
ROWS_PER_MASK = 16
TABLES = ("compacted", "as staged", "shuffled")


def uri(number: int) -> str:
    """Keys as they are: a few thousand photos to a folder, in key order."""
    return f"{SOURCE}/{number // 2000:05}/IMG_{number:08}.jpg"


def make_audit(out: Path, known: int, new: int, table: str) -> None:
    """An audit whose latest listing has ``known`` photos with rows and ``new`` ones, evenly among them."""
    layout = AuditLayout(str(out))
    total = known + new
    is_new = np.zeros(total, bool)
    is_new[np.linspace(0, total - 1, new).astype(int)] = True
    at_once = ROWS_PER_STAGED_FILE if table == "as staged" else 4096
    committer = Committer(layout.table, AUDIT_TABLE, "r1")
    numbers = np.flatnonzero(~is_new)
    for start in range(0, known, at_once):
        committer.add(stage(_rows(numbers[start : start + at_once]), layout.table, "r1"))
        committer.flush(if_due=True)
    committer.flush()
    if table != "as staged":
        delta = DeltaTable(layout.table)
        files = pa.table(delta.get_add_actions())["size_bytes"].to_numpy().sum()
        delta.optimize.compact(target_size=int(files / known * ROWS_PER_COMPACTED_FILE))
    failures = Committer(layout.failures, FAILURES_TABLE, "r1")
    failures.add(stage(_failures(np.flatnonzero(is_new)[::2]), layout.failures, "r1"))
    failures.flush()

    order = np.random.default_rng(0).permutation(total) if table == "shuffled" else np.arange(total)
    for run_id, chosen in (("r1", order[~is_new[order]]), ("r2", order)):
        run = layout.run(run_id)
        Path(run.listing).mkdir(parents=True)
        for start in range(0, len(chosen), listing.ROWS_PER_SHARD):
            shard = Path(run.listing, f"part-{start // listing.ROWS_PER_SHARD:05d}.parquet")
            rows = _listed(chosen[start : start + listing.ROWS_PER_SHARD])
            pq.write_table(pa.table(rows, LISTING), shard, compression="zstd")
        day = NOW.replace(day=int(run_id[1:])).isoformat()
        settings = Run(run_id, day, SOURCE, DIGEST, "m" * 32, "bdnet-resnet18", 640, True, {})
        Path(run.settings).write_text(json.dumps(asdict(settings)))


def _listed(numbers: np.ndarray) -> dict[str, Any]:
    return {
        "uri": [uri(number) for number in numbers],
        "etag": [f"{number:032x}" for number in numbers],
        "size_bytes": numbers % 9_000_000,
        "modified_at": pa.array([NOW] * len(numbers), LISTING.field("modified_at").type),
    }


def _rows(numbers: np.ndarray) -> pa.Table:
    random = np.random.default_rng(int(numbers[0]))
    count = len(numbers)
    fractions = random.random(count)
    words = {
        "status": "ok",
        "camera": "Canon EOS R5",
        "blur_kind": "motion",
        "focus": "suspected_miss",
        "model_digest": "m" * 32,
        "audit_digest": DIGEST,
        "run_id": "r1",
        "audited_at": NOW,
    }
    columns = {
        **_listed(numbers),
        **{name: [word] * count for name, word in words.items()},
        **dict.fromkeys(("blurred_fraction", "subject_blurred_fraction", "uncertainty"), fractions),
        "verdict": np.where(fractions < 0.1, "sharp", np.where(fractions > 0.9, "blurred", "partly_blurred")),
        "mask": [_mask() if number % ROWS_PER_MASK == 0 else None for number in numbers],
    }
    return _table(columns, AUDIT_TABLE, count)


def _failures(numbers: np.ndarray) -> pa.Table:
    count = len(numbers)
    words = {"status": "timeout", "error": "no answer within 60 s", "run_id": "r1", "failed_at": NOW}
    columns = {**_listed(numbers), **{name: [word] * count for name, word in words.items()}}
    return _table(columns, FAILURES_TABLE, count)


def _table(columns: dict[str, Any], schema: pa.Schema, count: int) -> pa.Table:
    """A table with nulls where ``columns`` has nothing."""
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@functools.cache
def _mask() -> bytes:
    """A 1-bit PNG of 640 × 427 with an edge like a real one's: some kB."""
    edge = 300 + np.cumsum(np.random.default_rng(0).integers(-3, 4, 427))
    buffer = io.BytesIO()
    Image.fromarray(np.arange(640)[None, :] < edge[:, None]).save(buffer, "PNG")
    return buffer.getvalue()


class StubS3:
    """What the listing asks of s3fs: pages of 1,000 keys, every fiftieth no photo."""

    def __init__(self, photos: int) -> None:
        self.keys = photos * 50 // 49

    def call_s3(self, method: str, Prefix: str, ContinuationToken: str = "0", **_: Any) -> dict[str, Any]:
        """One page of list_objects_v2."""
        assert method == "list_objects_v2"
        start = int(ContinuationToken)
        stop = min(start + 1000, self.keys)
        contents = [
            {
                "Key": f"{Prefix}{n // 2000:05}/IMG_{n:08}.{'xmp' if n % 50 == 0 else 'jpg'}",
                "ETag": f'"{n:032x}"',
                "Size": n,
                "LastModified": NOW,
            }
            for n in range(start, stop)
        ]
        return {"Contents": contents, "IsTruncated": stop < self.keys, "NextContinuationToken": str(stop)}


def list_stub(photos: int) -> None:
    """List an S3 prefix that a stub makes up."""
    real = storage.filesystem
    storage.filesystem = lambda uri: (
        (StubS3(photos), "bucket/archive") if uri.startswith("s3:") else real(uri)
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            listing.write_listing("s3://bucket/archive", folder)
    finally:
        storage.filesystem = real


def list_server(photos: int) -> None:
    """List a prefix of the real server that the environment names."""
    with tempfile.TemporaryDirectory() as folder:
        assert listing.write_listing(f"s3://photos/{photos}", folder).photos == photos


def subtract_all(out: Path, task: Any, times: int = 1) -> None:
    """Subtract the table from the latest listing, a task for each shard, ``times`` times at once."""
    import ray

    layout = AuditLayout(str(out))
    shards = previous_listing(layout, SOURCE) * times
    version = DeltaTable(layout.table).version()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            task.remote(shard, f"{folder}/{n}.parquet", layout.table, version, DIGEST)
            for n, shard in enumerate(shards)
        ]
        assert sum(ray.get(tasks)) in (NEW, SMALL_NEW * times)


def lost_since(out: Path) -> None:
    """Compare the latest listing with the one before, which lacks the new photos."""
    layout = AuditLayout(str(out))
    before, now = (storage.list_files(layout.run(run).listing, ".parquet") for run in ("r2", "r1"))
    assert lost(before, now) in (NEW, SMALL_NEW)


def report_of(out: Path) -> None:
    """``python -m jobs.report``."""
    from jobs import report

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        assert report.main([str(out), "--out", folder]) == 0


SMALL, SMALL_NEW = 90, 10


def run_step(step: str, known: int, folder: Path) -> dict[str, Any]:
    """Measure one step in this process; ``folder`` holds the audits ``small`` and ``large``."""
    with contextlib.ExitStack() as stack:
        work: Callable[[Any], None]
        small: Any  # photos to list, or an audit's folder
        large: Any
        if step.startswith("list"):
            work, small, large = (list_stub if step == "list" else list_server), 100, known
        else:
            small = folder / "small"
            large = folder / "large"
            if step == "subtract":
                import ray

                from pipeline import cluster

                shares = stack.enter_context(cluster.connect())
                task = ray.remote(subtract).options(num_cpus=shares.decode_cpus)
                work = functools.partial(subtract_all, task=task)
                # Many at once, for each worker process to have its imports behind it.
                subtract_all(small, task, 40)
            else:
                work = {"lost": lost_since, "report": report_of}[step]
        work(small)
        fixed, fixed_cpu, _ = _best_of_three(lambda: work(small))
        seconds, cpu, worker_mb = _best_of_three(lambda: work(large))
    per_100k = 100_000 / (known if step.startswith("list") else known + NEW)
    return {
        "seconds": f"{seconds:.2f}",
        "fixed_seconds": f"{fixed:.2f}",
        "seconds_per_100k": f"{(seconds - fixed) * per_100k:.2f}",
        "cpu_seconds": f"{cpu:.2f}",
        "fixed_cpu_seconds": f"{fixed_cpu:.2f}",
        "cpu_seconds_per_100k": f"{(cpu - fixed_cpu) * per_100k:.2f}",
        "driver_peak_mb": round(_peak_mb(os.getpid())),
        "worker_peak_mb": round(worker_mb) or "",
    }


def _best_of_three(work: Callable[[], None]) -> tuple[float, float, float]:
    """The least seconds and CPU seconds, and the largest peak of MB, of three times."""
    seconds, cpu, mb = zip(*(_measured(work) for _ in range(3)), strict=True)
    return min(seconds), min(cpu), max(mb)


def _measured(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds, CPU seconds of this process and its Ray workers, the largest worker's peak of MB so far."""
    with _workers_watched() as workers:
        began, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return (
        seconds,
        cpu + sum(spent for _, spent in workers.values()),
        max((peak for peak, _ in workers.values()), default=0.0),
    )


@contextlib.contextmanager
def _workers_watched() -> Iterator[dict[int, tuple[float, float]]]:
    """Peak MB, and CPU seconds since now, of each Ray worker below this process, until the block ends."""
    seen: dict[int, tuple[float, float]] = {}
    at_first: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        for worker in _ray_workers():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
                cpu = _cpu_seconds(worker)
                seen[worker] = _peak_mb(worker), cpu - at_first.setdefault(worker, cpu)

    def watch() -> None:
        while not done.wait(0.2):
            look()

    look()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        look()


def _ray_workers() -> list[int]:
    parents, workers = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
                parents[int(entry.name)] = int(rest.split()[1])
                if name.startswith("ray::"):
                    workers.append(int(entry.name))
    return [worker for worker in workers if os.getpid() in _ancestors(worker, parents)]


def _ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process := parents.get(process, 0):
        yield process


def _peak_mb(process: int) -> float:
    """The kernel's high-water mark of resident memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(step: str, table: str, known: int, folder: Path, **environment: str) -> dict[str, Any]:
    """Measure one step in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.scale", step, str(known), str(folder)]
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, check=True
    )
    row = {"step": step, "table": table, "photos": known, "new": NEW, **json.loads(finished.stdout)}
    print(row, file=sys.stderr, flush=True)
    return row


def measure_server(folder: Path) -> list[dict[str, Any]]:
    """List tiny objects from a real S3 server."""
    rows = []
    with s3_server(folder, buckets=["photos"]) as server:
        upload = (
            "import sys, s3fs; n = int(sys.argv[1]); s3fs.S3FileSystem().pipe("
            "{f'photos/{n}/{i // 2000:05}/IMG_{i:08}.jpg': b'x' for i in range(n)}, batch_size=64)"
        )
        for photos in SERVER_SIZES:
            for count in {100, photos}:
                command = [sys.executable, "-c", upload, str(count)]
                subprocess.run(command, env=os.environ | server.environment(), check=True)
            rows.append(measure("list from server", "", photos, folder, **server.environment()))
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Cost and memory over the size of the archive, a column for each kind of table, as results/scale.svg."""
    import altair as alt

    # A listing needs no table, and a server of another make lists at another pace: the first stands alone.
    shown = [{**row, "table": row["table"] or "listing"} for row in rows if row["photos"] in SIZES]
    shown = [row for row in shown if row["step"] != "list from server"]
    base = alt.Chart(alt.Data(values=shown), width=150, height=200).mark_line(point=True)
    base = base.encode(
        x=alt.X(
            "photos:Q",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(values=list(SIZES), format="~s"),
            title="Known photos",
        ),
        color=alt.Color("step:N", title=None),
    )
    columns = alt.Column("table:N", title=None, sort=["listing", *TABLES])
    cost = base.encode(y=alt.Y("cpu_seconds_per_100k:Q", title="CPU s per 100,000 photos"), column=columns)
    memory = base.encode(y=alt.Y("driver_peak_mb:Q", title="Driver's peak memory (MB)"), column=columns)
    (cost & memory).save(RESULTS / "scale.svg")


def main() -> int:
    """Measure all and write results/scale.csv and scale.svg."""
    if len(sys.argv) == 4:
        print(json.dumps(run_step(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for known in SIZES:
            rows.append(measure("list", "", known, Path(scratch)))
        rows += measure_server(Path(scratch, "server"))
        for table in TABLES:
            for known in SIZES:
                folder = Path(scratch, f"{table}-{known}")
                make_audit(folder / "small", SMALL, SMALL_NEW, table)
                make_audit(folder / "large", known, NEW, table)
                rows += [measure(step, table, known, folder) for step in ("subtract", "lost", "report")]
    write_csv("scale", rows)
    plot(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
