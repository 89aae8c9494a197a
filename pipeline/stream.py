"""Rows of a running dataset as they come, and what it waits for when none comes."""

import logging
import queue
import threading
import time
from collections.abc import Generator
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from pipeline.progress import duration

log = logging.getLogger("bdnet")

TICK_SECONDS = 0.5
STALL_SAID_SECONDS = 60.0
# Longer than any node takes to start, or a photo to be retried to the end.
STALL_ENDS_SECONDS = 1800.0
PULLER_ENDS_WITHIN_SECONDS = 10.0


def stream(dataset: Dataset) -> Generator[list[dict[str, Any]], None, None]:
    """Rows of the dataset as soon as they are there, and an empty list whenever none came for a moment.

    Close it (``contextlib.closing``) where its rows may not all be taken: that ends the dataset's execution.

    Raises:
        OSError: nothing came for STALL_ENDS_SECONDS; names the steps that have work.
    """
    arrived: queue.SimpleQueue[list[dict[str, Any]] | BaseException | None] = queue.SimpleQueue()

    def pull() -> None:
        try:
            # By default Ray hands over a block when it has the next one: behind a slow photo, files that
            # are written would wait for their commit.
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                assert isinstance(block, pa.Table)
                arrived.put(block.to_pylist())
        except BaseException as error:
            arrived.put(error)
        else:
            arrived.put(None)

    puller = threading.Thread(target=pull, daemon=True)
    puller.start()
    last = said = time.monotonic()
    try:
        while True:
            try:
                rows = arrived.get(timeout=TICK_SECONDS)
            except queue.Empty:
                now = time.monotonic()
                waited = f"no photo was finished for {duration(now - last)}"
                if now - last > STALL_ENDS_SECONDS:
                    raise OSError(f"{waited}; {_waiting(dataset)}; run the same command again") from None
                if now - said > STALL_SAID_SECONDS:
                    said = now
                    log.warning("%s; %s", waited, _waiting(dataset))
                yield []
                continue
            if rows is None:
                return
            if isinstance(rows, BaseException):
                raise rows
            last = said = time.monotonic()
            yield rows
    finally:
        # A thread that goes on pulling outlives Ray.
        if puller.is_alive() and dataset._current_executor is not None:
            dataset._current_executor.shutdown(force=True)
            puller.join(PULLER_ENDS_WITHIN_SECONDS)


def _waiting(dataset: Dataset) -> str:
    """The steps that have work, with their tasks and the blocks that wait for them."""
    topology = getattr(dataset._current_executor, "_topology", None) or {}
    steps = [
        f"{operator.name}: {operator.num_active_tasks()} tasks running,"
        f" {state.total_enqueued_input_blocks()} blocks waiting"
        for operator, state in list(topology.items())
        if operator.num_active_tasks() or state.total_enqueued_input_blocks()
    ]
    return "; ".join(steps) or "no step has begun"
