"""What an audit is compared with: the same fetch, decode, network and measurement in a plain process.

``python -m benchmarks.plain_loop SOURCE OUT``: eight threads fetch and decode, the main thread runs the
network and writes a Parquet file of rows every 64 photos of all processes. No table, no resumption, no
retries. The last line on stdout tells as JSON when photos were written, in seconds since 1970, and how many.
"""

import json
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import tyro

import bdnet
from bdnet.card import DEFAULT_MODEL
from bdnet.detect import measure
from bdnet.memory import keep_freed_memory
from bdnet.photo import Limits, Photo, decode
from pipeline import storage
from pipeline.execution import LARGEST_BLOCK
from pipeline.fetch import fetch
from pipeline.ledger import stage
from pipeline.listing import read_listing, write_listing
from pipeline.steps import FETCH_THREADS, measurements

AHEAD = 64


@dataclass(frozen=True)
class Settings:
    """Detect blur in all photos of SOURCE without Ray."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder or URI."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder or URI of the rows."""
    model: str = DEFAULT_MODEL
    """Shipped name, folder or URI."""
    threads: int = torch.get_num_threads()
    """Threads of the network."""
    processes: int = 1
    """Processes that share the photos, of which this is one."""
    number: int = 0
    """Which one, from 0."""


def photos(settings: Settings, working_size: int) -> Iterator[tuple[str, Photo]]:
    """Decode this process' photos, in the order of the listing, some of them ahead."""
    listing = write_listing(settings.source, storage.join(settings.out, "listing"), None)
    waiting: deque[tuple[str, Future[Photo]]] = deque()

    def read(uri: str, etag: str) -> Photo:
        fetched = fetch(uri, etag, Limits().max_bytes)
        assert fetched.data is not None, fetched.error
        return decode(fetched.data, working_size)

    with ThreadPoolExecutor(FETCH_THREADS // settings.processes) as pool:
        for shard in listing.shards:
            for row in read_listing(shard).to_pylist()[settings.number :: settings.processes]:
                waiting.append((row["uri"], pool.submit(read, row["uri"], row["etag"])))
                if len(waiting) > AHEAD:
                    uri, photo = waiting.popleft()
                    yield uri, photo.result()
        for uri, photo in waiting:
            yield uri, photo.result()


def main() -> int:
    """Work through SOURCE and tell when how many photos were written."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    model = bdnet.load(settings.model)
    alike: defaultdict[tuple[int, ...], list[tuple[str, np.ndarray]]] = defaultdict(list)
    rows: list[dict[str, object]] = []
    written: list[tuple[float, int]] = []

    def detect(batch: list[tuple[str, np.ndarray]]) -> None:
        probabilities, kinds = model.predict(np.stack([pixels for _, pixels in batch]))
        for index, (uri, _) in enumerate(batch):
            detection = measure(probabilities[index], None if kinds is None else kinds[index])
            rows.append({"uri": uri, **measurements(detection)})

    def write(at_least: int) -> None:
        if len(rows) >= at_least:
            stage(pa.Table.from_pylist(rows), settings.out, "plain")
            written.append((time.time(), len(rows)))
            rows.clear()

    for uri, photo in photos(settings, model.card.working_size):
        if photo.pixels is None:
            continue
        batch = alike[photo.pixels.shape]
        batch.append((uri, photo.pixels))
        if len(batch) == model.batch:
            detect(alike.pop(photo.pixels.shape))
        write(LARGEST_BLOCK // settings.processes)
    for batch in alike.values():
        detect(batch)
    write(1)
    print(json.dumps({"written": written}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
