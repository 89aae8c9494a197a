"""Audit and plain loop: ``python -m benchmarks.throughput`` (a quick look: ``--photos 600 --rounds 1``).

``jobs.audit`` and ``benchmarks.plain_loop`` take turns on the same photos of 3 megapixels in a local S3
server, on all cores of this machine: the loop as one would write it at first, one network with all threads,
and in a process for each core. Rates are by the times at which rows were written (``deltalog.steady_rate``);
what came before the first ones is start-up. Writes results/throughput.csv.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import tyro

from bdnet.card import DEFAULT_MODEL
from benchmarks.command import run
from benchmarks.deltalog import rows_by_time, steady_rate
from benchmarks.photos import large_photos, write_copies
from benchmarks.tables import write_csv
from infra.s3_server import fill, s3_server

SOURCE = "s3://photos/archive"
MEGAPIXELS = 3


@dataclass(frozen=True)
class Settings:
    """Compare the audit with a plain loop."""

    photos: int = 2000
    """Photos of the archive."""
    rounds: int = 3
    """Runs of each."""
    model: str = DEFAULT_MODEL
    """Shipped name, folder or URI."""


def audit(model: str, out: str) -> list[tuple[float, int]]:
    """Run ``jobs.audit``; returns when how many rows were in the table."""
    run("jobs.audit", SOURCE, "--out", out, "--model", model)
    return rows_by_time(fsspec.filesystem("s3"), f"{out.removeprefix('s3://')}/table")


def plain_loops(model: str, out: str, processes: int) -> list[tuple[float, int]]:
    """Run ``benchmarks.plain_loop`` in so many processes; returns when how many rows were written."""
    threads = max(1, (os.cpu_count() or 1) // processes)

    def loop(number: int) -> list[tuple[float, int]]:
        shares = ("--threads", str(threads), "--processes", str(processes), "--number", str(number))
        return run("benchmarks.plain_loop", SOURCE, f"{out}/{number}", "--model", model, *shares)["written"]

    with ThreadPoolExecutor(processes) as pool:
        written = sorted(at for times in pool.map(loop, range(processes)) for at in times)
    times, counts = zip(*written, strict=True)
    return list(zip(times, itertools.accumulate(counts), strict=True))


RUNNERS: dict[str, Callable[[str, str], list[tuple[float, int]]]] = {
    "jobs.audit": audit,
    "plain loop": partial(plain_loops, processes=1),
    "plain loops, one for each core": partial(plain_loops, processes=os.cpu_count() or 1),
}


def main() -> int:
    """Measure and write results/throughput.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "archive")
        write_copies(archive, large_photos(MEGAPIXELS), settings.photos)
        with s3_server(Path(folder, "server"), ["photos", "out"]) as server:
            os.environ.update(server.environment())
            fill(server, archive, SOURCE)
            for number in range(settings.rounds):
                for name, runner in RUNNERS.items():
                    began = time.time()
                    times = runner(settings.model, f"s3://out/{name.replace(' ', '-')}-{number}")
                    assert times[-1][1] == settings.photos
                    row = {"runner": name, "round": number, "model": settings.model}
                    row |= {"photos": settings.photos, "megapixels": MEGAPIXELS}
                    row |= {"first_rows_s": f"{times[0][0] - began:.1f}"}
                    row |= {"photos_per_second": f"{steady_rate(times):.2f}"}
                    rows.append(row)
                    print(row, file=sys.stderr)
    write_csv("throughput", [*rows, *_medians(rows)])
    return 0


def _medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    medians = {}
    for name in RUNNERS:
        its = [row for row in rows if row["runner"] == name]
        medians[name] = {
            **its[0],
            "round": "median",
            **{
                column: f"{statistics.median(float(row[column]) for row in its):.2f}"
                for column in ("first_rows_s", "photos_per_second")
            },
        }
    audit_rate, *others = (float(row["photos_per_second"]) for row in medians.values())
    ratios = [
        {"runner": f"jobs.audit / {name}", "round": "median", "photos_per_second": f"{audit_rate / rate:.3f}"}
        for name, rate in zip([*RUNNERS][1:], others, strict=True)
    ]
    return [*medians.values(), *(dict.fromkeys(rows[0], "") | ratio for ratio in ratios)]


if __name__ == "__main__":
    sys.exit(main())
