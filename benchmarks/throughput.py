"""Audit and plain loop: ``python -m benchmarks.throughput`` (a quick look: ``--photos 200 --rounds 1``).

``jobs.audit`` and ``benchmarks.plain_loop`` take turns on the same photos of 3 megapixels in a local S3
server, on all cores of this machine. The loop is what one would write at first, one network with all threads;
an audit has a detector for each two cores. Rates are by the times at which rows were written
(``deltalog.steady_rate``); what came before the first ones is start-up. Writes results/throughput.csv.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import fsspec
import tyro

from bdnet.card import DEFAULT_MODEL
from benchmarks.command import run, write_csv
from benchmarks.deltalog import rows_by_time, steady_rate
from benchmarks.photos import large_photos, write_copies
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


def plain_loop(model: str, out: str) -> list[tuple[float, int]]:
    """Run ``benchmarks.plain_loop``; returns when how many rows were written."""
    return run("benchmarks.plain_loop", SOURCE, out, "--model", model)["written"]


RUNNERS = {"jobs.audit": audit, "plain loop": plain_loop}


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


def _medians(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    medians = {}
    for name in RUNNERS:
        its = [row for row in rows if row["runner"] == name]
        medians[name] = {
            **its[0],
            "round": "median",
            **{
                column: f"{statistics.median(float(str(row[column])) for row in its):.2f}"
                for column in ("first_rows_s", "photos_per_second")
            },
        }
    audit_rate, loop_rate = (float(str(medians[name]["photos_per_second"])) for name in RUNNERS)
    ratio = {"runner": "ratio", "round": "median", "photos_per_second": f"{audit_rate / loop_rate:.3f}"}
    return [*medians.values(), {**dict.fromkeys(rows[0], ""), **ratio}]


if __name__ == "__main__":
    sys.exit(main())
