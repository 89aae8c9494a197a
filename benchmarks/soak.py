"""Does memory grow with the archive? ``python -m benchmarks.soak`` (a quick look: ``--photos 1200``). Linux.

Audits many photos (hard links to a few dozen small ones and three of 24 megapixels) with two workers and
looks each second at every process of the job. ``own`` is a process's heap and stacks (anonymous memory:
neither code nor the object store); a kind's figure is that of its largest process, its growth that of the
process that grew most. ``all processes`` is the sum of what they hold, with shared pages, so also the object
store, counted once (PSS). The object store's figures are those of the raylet's ``debug_state.txt``.

Exits with 1 where a process grew by more than 50 MB between the first 2,000 photos and the last, the object
store spilled, or all processes together held more than 6 GB.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import altair as alt
import fsspec
import tyro
from PIL import Image, ImageOps

from benchmarks.data import data_folder
from benchmarks.deltalog import DeltaLog
from benchmarks.photos import small_photos
from benchmarks.processes import Memory, end_session, memory, of_session, start
from benchmarks.tables import RESULTS, write_csv

PHOTOS = 20_000
EARLY = 2_000
SMALL, LARGE = 36, 3
LARGE_SIZE = (6000, 4000)
ONE_IN = 200  # is a large one
MOST_GROWTH_MB, MOST_TOTAL_MB = 50, 6000
POINTS = 150  # of the time series at least, after thinning

STORE = {
    "blocks": r"num local plasma objects: (\d+)",
    "pinned": r"pinned objects size: (\d+)",
    "spills": r"cumulative spill requests: (\d+)",
}


@dataclass(frozen=True)
class Settings:
    """Audit many photos and watch the memory of all processes."""

    photos: int = PHOTOS
    """Photos of the archive; results/soak*.csv are written for no fewer than the default."""
    workers: int = 2
    """Detectors."""


@dataclass(frozen=True)
class Sample:
    """One look at the job. ``store`` has the keys of STORE."""

    seconds: float
    photos: int
    processes: dict[int, Memory]
    store: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all processes, shared ones counted once."""
        return sum(held.share for held in self.processes.values())


class Watch:
    """Samples of a running job, and what each of its processes was seen to do."""

    def __init__(self, job: subprocess.Popen[str], table: Path) -> None:
        self._job, self._log = job, DeltaLog(fsspec.filesystem("file"), str(table))
        self._began = time.monotonic()
        self._debug_state: Path | None = None
        self._store = dict.fromkeys(STORE, 0)
        self._seen: dict[int, set[str]] = defaultdict(set)
        self.samples: list[Sample] = []

    def look(self) -> None:
        """Take a sample."""
        processes = {}
        for process in of_session(self._job.pid):
            held = memory(process.pid)
            if held is not None:
                processes[process.pid] = held
                self._seen[process.pid].add(process.kind)
            found = re.search(r"/\S*/session_[^/\s]+", process.title)
            if process.kind == "raylet" and found:
                self._debug_state = Path(found[0], "logs", "debug_state.txt")
        self._log.read_new()
        if self._debug_state and self._debug_state.exists():
            text = self._debug_state.read_text(errors="replace")
            # It may be read while it is written.
            found_in = {name: re.search(pattern, text) for name, pattern in STORE.items()}
            self._store |= {name: int(match[1]) for name, match in found_in.items() if match}
        seconds = time.monotonic() - self._began
        self.samples.append(Sample(seconds, self._log.rows, processes, dict(self._store)))

    def between(self, low: int, high: int) -> list[Sample]:
        """Samples from just before ``low`` photos were committed until ``high`` were."""
        before = [sum(sample.photos < photos for sample in self.samples) for photos in (low, high)]
        return self.samples[max(0, before[0] - 1) : before[1] + 1]

    def kind(self, pid: int) -> str:
        """What a process did; Ray gives a worker whatever task comes."""
        seen = self._seen[pid] - {"idle worker"}
        return " and ".join(sorted(seen)) or "idle worker"

    def own(self, samples: Sequence[Sample]) -> dict[int, float]:
        """MB of each process at its largest in ``samples``."""
        largest: dict[int, float] = defaultdict(float)
        for sample in samples:
            for pid, held in sample.processes.items():
                largest[pid] = max(largest[pid], held.own / 1e6)
        return largest


def make_archive(folder: Path, photos: int) -> None:
    """Fill ``folder`` with links to a few photos, a thousand to a folder."""
    rng = Random(0)
    kept = folder.with_name("kept")
    kept.mkdir()
    for number, data in zip(range(SMALL), small_photos(rng), strict=False):
        (kept / f"small-{number}.jpg").write_bytes(data)
    for number, source in enumerate(rng.sample(sorted((data_folder() / "archive").glob("*.jpg")), LARGE)):
        with Image.open(source) as image:
            ImageOps.fit(image.convert("RGB"), LARGE_SIZE).save(kept / f"large-{number}.jpg", quality=90)
    for number in range(photos):
        name = f"large-{number % LARGE}" if number % ONE_IN == 0 else f"small-{number % SMALL}"
        where = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.hardlink_to(kept / f"{name}.jpg")


def soak(settings: Settings) -> tuple[Watch, dict[str, Any]]:
    """Audit and watch; return the samples and the audit's result. Exits where the audit fails."""
    with tempfile.TemporaryDirectory() as name:
        archive, out, stderr = Path(name, "archive"), Path(name, "out"), Path(name, "stderr")
        make_archive(archive, settings.photos)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment["RAY_debug_dump_period_milliseconds"] = "1000"
        arguments = ["jobs.audit", str(archive), "--out", str(out), "--working-size", "160"]
        with stderr.open("w") as file:
            job = start([*arguments, "--workers", str(settings.workers)], environment, file)
        watch = Watch(job, out / "table")
        try:
            while job.poll() is None:
                watch.look()
                time.sleep(1)
        finally:
            job.kill()
            end_session(job.pid)
        stdout, _ = job.communicate()
        if job.returncode:
            sys.exit(f"the audit failed with {job.returncode}:\n{stderr.read_text()}")
    return watch, json.loads(stdout.splitlines()[-1])


def summary(watch: Watch, photos: int) -> list[dict[str, Any]]:
    """A row per kind of process, one for their sum and one for the object store; MB."""
    early = min(EARLY, photos // 4)
    # A while before each of the two instants, for memory swings with what a task holds.
    first, last = watch.between(early // 2, early), watch.between(photos - early, photos)
    at_first, at_last, peak = watch.own(first), watch.own(last), watch.own(watch.samples)
    rows = []
    for kind in sorted({watch.kind(pid) for pid in peak}):
        pids = [pid for pid in peak if watch.kind(pid) == kind]
        rows.append(
            {
                "what": f"{kind}, own",
                "processes": len(pids),
                f"mb_at_{early}": _largest(at_first[pid] for pid in pids if pid in at_first),
                "mb_at_end": _largest(at_last[pid] for pid in pids if pid in at_last),
                "growth_mb": _largest(
                    at_last[p] - at_first[p] for p in pids if p in at_last and p in at_first
                ),
                "peak_mb": _largest(peak[pid] for pid in pids),
            }
        )

    def row(what: str, first_mb: float, last_mb: float, peak_mb: float) -> dict[str, Any]:
        figures = (first_mb, last_mb, last_mb - first_mb, peak_mb)
        return dict.fromkeys(rows[0], "") | dict(
            zip(("what", *list(rows[0])[2:]), (what, *(f"{mb:.0f}" for mb in figures)), strict=True)
        )

    def largest(samples: Sequence[Sample], name: str) -> float:
        return max(sample.store[name] for sample in samples)

    times = (first, last, watch.samples)
    totals = (max(sample.total for sample in some) / 1e6 for some in times)
    return [
        *rows,
        row("all processes, shared pages once", *totals),
        row("object store, pinned", *(largest(some, "pinned") / 1e6 for some in times)),
        row("object store, objects (not MB)", *(largest(some, "blocks") for some in times)),
        row("object store, spills (not MB)", *(largest(some, "spills") for some in times)),
    ]


def _largest(figures: Iterable[float]) -> str:
    """The largest as text; empty where there is none."""
    return max((f"{figure:.0f}" for figure in figures), key=int, default="")


def series(watch: Watch) -> list[dict[str, Any]]:
    """The samples, thinned, in MB."""
    pids = watch.own(watch.samples)
    kinds = {kind: [p for p in pids if watch.kind(p) == kind] for kind in sorted(map(watch.kind, pids))}
    rows = []
    for sample in watch.samples[:: max(1, len(watch.samples) // POINTS)]:
        own = watch.own([sample])
        rows.append(
            {
                "seconds": f"{sample.seconds:.0f}",
                "photos": sample.photos,
                "all_processes": f"{sample.total / 1e6:.0f}",
                "object_store": f"{sample.store['pinned'] / 1e6:.1f}",
                "blocks": sample.store["blocks"],
                "spills": sample.store["spills"],
                **{kind: _largest(own[pid] for pid in kinds[kind] if pid in own) for kind in kinds},
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Memory of each kind over photos."""
    figures = [name for name in rows[0] if name not in ("seconds", "photos", "blocks", "spills")]
    points = [
        {"photos": row["photos"], "what": name.replace("_", " "), "MB": float(row[name])}
        for row in rows
        for name in figures
        if row[name] != ""
    ]
    chart = alt.Chart(alt.Data(values=points)).mark_line()
    chart.encode(x="photos:Q", y="MB:Q", color="what:N").properties(width=640, height=360).save(file)


def main() -> int:
    """Audit, watch, compare; write results/soak.csv, soak_series.csv and soak.svg for PHOTOS or more."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.soak", description=__doc__)
    watch, result = soak(settings)
    rows, points = summary(watch, settings.photos), series(watch)
    print(f"{result['photos']} photos, {result['photos_per_second']} a second", file=sys.stderr)
    if settings.photos >= PHOTOS:
        write_csv("soak_series", points)
        write_csv("soak", [{**row, "photos": settings.photos, "workers": settings.workers} for row in rows])
        plot(points, RESULTS / "soak.svg")
    else:
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    grown = [
        row["what"] for row in rows if "own" in row["what"] and int(row["growth_mb"] or 0) > MOST_GROWTH_MB
    ]
    total = max(sample.total for sample in watch.samples) / 1e6
    spills = watch.samples[-1].store["spills"]
    for name, is_wrong in {
        f"grew by more than {MOST_GROWTH_MB} MB: {', '.join(grown)}": grown,
        f"the object store spilled {spills} times": spills,
        f"all processes held {total:.0f} MB": total > MOST_TOTAL_MB,
    }.items():
        if is_wrong:
            print(name, file=sys.stderr)
    return 1 if grown or spills or total > MOST_TOTAL_MB else 0


if __name__ == "__main__":
    sys.exit(main())
