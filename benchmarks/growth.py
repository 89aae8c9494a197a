"""How an audit grows: ``python -m benchmarks.growth`` (a quick look: ``--photos 100``).

Photos a second against detectors, node processes, the photos' size and the photos of a block, one changed at
a time; all on this machine's cores, so more workers and nodes share them. Rates as in
``benchmarks.throughput``, and beside them what the detectors would take if they never waited. Writes
results/growth.csv.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import fsspec
import tyro
from ray.cluster_utils import Cluster

from benchmarks.deltalog import rows_by_time, steady_rate
from benchmarks.photos import large_photos, write_copies
from benchmarks.tables import write_csv

# Detectors have threads by their nodes' logical CPUs: nodes that share this machine's cores divide them, so
# that two detectors on two cores have one thread each, as in a local audit.
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """Audit folders of photos in different ways."""

    photos: int = 600
    """Photos of each run: more than twice as many as the largest blocks decode ahead."""


@dataclass(frozen=True)
class Point:
    """One way to audit."""

    workers: int = 2
    nodes: int = 1
    megapixels: int = 3
    # Photos of each block. An audit's grow to 64: four for each detector are decoded ahead, and of 600 photos
    # that would be all (see deltalog.steady_rate).
    block: int = 16


# Of a core, but for detect, which has the threads of its detector.
STEPS = ("decode", "detect", "encode")
USUAL = Point()
AXES = {
    "workers": (Point(workers=1), USUAL, Point(workers=4)),
    "nodes": (USUAL, Point(nodes=2), Point(nodes=4)),
    "megapixels": (USUAL, Point(megapixels=12), Point(megapixels=48)),
    "block": (Point(block=8), USUAL, Point(block=32)),
}


def measured(point: Point, folder: Path, photos: int) -> dict[str, str]:
    """Photos a second, and milliseconds of each step for a photo."""
    archive = folder / f"{point.megapixels}"
    if not archive.exists():
        write_copies(archive, large_photos(point.megapixels), photos)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        # The size of a block is no option: nobody but this benchmark asks for another one.
        code = "from pipeline import execution; "
        code += f"execution.SMALLEST_BLOCK = execution.LARGEST_BLOCK = {point.block}; "
        code += f"import sys; from jobs.audit import main; sys.exit(main({[str(archive), '--out', out]!r}"
        code += f" + ['--workers', '{point.workers}']))"
        with patch.dict(os.environ):
            cluster = None
            if point.nodes > 1:
                os.environ["RAY_AUTH_MODE"] = "disabled"
                cluster = Cluster()
                for _ in range(point.nodes):
                    cluster.add_node(num_cpus=max(1, CORES // point.nodes))
                os.environ["RAY_ADDRESS"] = cluster.address
            try:
                done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
            finally:
                if cluster is not None:
                    cluster.shutdown()
        grown = rows_by_time(fsspec.filesystem("file"), f"{out}/table")
    assert grown[-1][1] == photos
    steps = json.loads(done.stdout.splitlines()[-1])["step_seconds"]
    found = {f"{step}_ms": f"{1000 * steps[step] / photos:.1f}" for step in STEPS}
    detectors = point.workers * photos / (steps["detect"] + steps["encode"])
    found["detectors_photos_per_second"] = f"{detectors:.1f}"
    return found | {"photos_per_second": f"{steady_rate(grown):.2f}"}


def main() -> int:
    """Write results/growth.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    known: dict[Point, dict[str, str]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, points in AXES.items():
            for point in points:
                if point not in known:
                    known[point] = measured(point, Path(folder), settings.photos)
                found = {"axis": axis, **vars(point), **known[point]}
                print(found, file=sys.stderr)
                rows.append(found)
    write_csv("growth", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
