"""Against what people use today: ``.venv-peers/bin/python -m benchmarks.peers`` (``make bench-peers``).

Each runs as a command of its own, in turns, on folders with few and with many of the same photos; the rate is
that of the photos that the second has more, so that start-up doesn't count. All have all cores. CleanVision
and the variance of the Laplacian say one number a photo; the others say it of every pixel.
Writes results/peers.csv.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.photos import large_photos, write_copies
from benchmarks.tables import write_csv

ROUNDS = 3


@dataclass(frozen=True)
class Peer:
    """A command that works through a folder of photos; ``few`` and ``many`` photos."""

    name: str
    command: Sequence[str]
    few: int
    many: int


PEERS = (
    # Few is more than an audit decodes ahead while it starts, which would count for nothing.
    Peer("jobs.audit", ("jobs.audit", "{folder}", "--out", "{out}"), 800, 1700),
    Peer(
        "jobs.audit --model bdnet-fast",
        ("jobs.audit", "{folder}", "--out", "{out}", "--model", "bdnet-fast"),
        *(800, 2700),
    ),
    Peer("CleanVision", ("benchmarks.peer", "cleanvision", "{folder}"), 100, 2000),
    Peer("variance of the Laplacian", ("benchmarks.peer", "laplacian", "{folder}"), 100, 500),
    Peer("Ray's batch inference recipe, eager", ("benchmarks.peer", "ray_recipe", "{folder}"), 100, 300),
    Peer("the authors' way, ResNet-152", ("benchmarks.peer", "authors", "{folder}"), 2, 12),
)


@dataclass(frozen=True)
class Settings:
    """Time each on photos of one size."""

    megapixels: tuple[int, ...] = (3, 12)
    """Sizes of the photos: 3, 12 or 48."""
    rounds: int = ROUNDS
    """Runs of each."""


def seconds(peer: Peer, photos: list[bytes], count: int) -> float:
    """How long a peer takes for so many photos, start-up included."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photos")
        write_copies(folder, photos, count)
        command = [part.format(folder=folder, out=Path(scratch, "out")) for part in peer.command]
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began


def main() -> int:
    """Write results/peers.csv."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    for megapixels in settings.megapixels:
        photos = large_photos(megapixels)
        rates: dict[str, list[float]] = {peer.name: [] for peer in PEERS}
        starts: dict[str, list[float]] = {peer.name: [] for peer in PEERS}
        for _ in range(settings.rounds):
            for peer in PEERS:
                few, many = (seconds(peer, photos, count) for count in (peer.few, peer.many))
                each = (many - few) / (peer.many - peer.few)
                rates[peer.name].append(1 / each)
                starts[peer.name].append(few - peer.few * each)
                print(f"{megapixels} MP, {peer.name}: {1 / each:.2f} photos/s", file=sys.stderr)
        for peer in PEERS:
            rows.append(
                {
                    "megapixels": megapixels,
                    "peer": peer.name,
                    "photos_per_second": f"{statistics.median(rates[peer.name]):.2f}",
                    "start_s": f"{statistics.median(starts[peer.name]):.1f}",
                    "rounds": settings.rounds,
                }
            )
        write_csv("peers", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
