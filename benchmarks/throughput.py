"""What does Ray cost? ``python -m benchmarks.throughput`` (a quick look: ``--photos 200 --rounds 1``).

``jobs.audit`` and ``benchmarks.plain_loop`` take turns on the same photos of 3 megapixels in a local S3
server, on all cores of this machine. A run's rate is that of the photos after its first file of rows, by the
times at which rows were written; what came before is its start-up. Writes results/throughput.csv.
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

from bdnet.model import DEFAULT_MODEL
from benchmarks.command import run, write_csv
from benchmarks.deltalog import DeltaLog
from benchmarks.photos import large_photos
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
    log = DeltaLog(fsspec.filesystem("s3"), f"{out.removeprefix('s3://')}/table")
    log.read_new()
    return [(at, rows) for at, rows in log.grown if rows]


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
        archive.mkdir()
        photos = large_photos(MEGAPIXELS)
        for number in range(settings.photos):
            (archive / f"{number:05d}.jpg").write_bytes(photos[number % len(photos)])
        with s3_server(Path(folder, "server"), ["photos", "out"]) as server:
            os.environ.update(server.environment())
            fill(server, archive, SOURCE)
            for number in range(settings.rounds):
                for name, runner in RUNNERS.items():
                    began = time.time()
                    times = runner(settings.model, f"s3://out/{name.replace(' ', '-')}-{number}")
                    first, early = times[0]
                    # Joining small files comes after the last row.
                    last, all_rows = next(entry for entry in times if entry[1] == times[-1][1])
                    assert all_rows == settings.photos
                    row = {"runner": name, "round": number, "model": settings.model, "photos": all_rows}
                    row |= {"megapixels": MEGAPIXELS, "first_rows_s": f"{first - began:.1f}"}
                    row |= {"photos_per_second": f"{(all_rows - early) / (last - first):.2f}"}
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
