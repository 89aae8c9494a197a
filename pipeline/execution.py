"""Work off a to-do on the cluster: the steps as one stream, committed every few seconds by the driver."""

import contextlib
import json
import math
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import ray.data

from bdnet.photo import decoder_version
from pipeline import cluster
from pipeline.ledger import Committer, Staged
from pipeline.listing import read_listing
from pipeline.progress import Progress
from pipeline.steps import FETCH_THREADS, Detector, Provenance, read_and_decode, stage_rows
from pipeline.stream import stream

# A block is what one task decodes and one file holds: small at first, so that rows come soon, and at the end,
# so that detectors end together; large between, for tasks and files cost time too, but seconds of work, not
# minutes, for a crash repeats it.
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 64
# Pixels of a block; its photos are fewer where they are audited larger than most.
BLOCK_BYTES = 128 << 20
# Files of a block: they take their time to be read, and its rows come together.
BLOCK_FILE_BYTES = 256 << 20
# After SIGTERM, for files that are on their way to the driver; `ray job stop` kills after 3 s.
GRACE_SECONDS = 1.0
TOLD_TO_END = "told to end (SIGTERM); what was staged is committed, run it again"
MIN_BLOCK_BYTES = 64 << 20
# Detectors that work for so much of their time are what the run waits for.
BUSY = 0.8
# Photos of one Ray Data execution. What the driver keeps about blocks is bounded by it: 56 KB for each, by
# hand. At the end of each, detectors wait for the last one, and those of the next one load the network anew.
PHOTOS_PER_WINDOW = 200_000
# When each of so many photos is denied, so are the rest.
DENIED_FROM_THE_START = 1_000


@dataclass(frozen=True)
class Plan:
    """How a run works off its to-do."""

    out: str
    model: str
    working_size: int
    masks: Literal["table", "shards"]
    max_denied: float
    listed: int  # photos at the source, to do or done
    provenance: Provenance
    shares: cluster.Shares


class Outcome:
    """What the run's committed files hold, and the time that each step took, added up over its workers."""

    def __init__(self) -> None:
        self.photos = 0
        self.by_status: Counter[str] = Counter()
        self.by_verdict: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def bound_by(self) -> str | None:
        """The step that more workers, or faster ones, would have to help first; None where nothing ran."""
        seconds = self.seconds
        busy = seconds["detect"] + seconds["encode"]
        if not busy + seconds["idle"]:
            return None
        if busy >= BUSY * (busy + seconds["idle"]):
            return "detect" if seconds["detect"] >= seconds["encode"] else "encode"
        # Threads wait for storage side by side; decoding takes a core.
        return "fetch" if seconds["fetch"] / FETCH_THREADS > seconds["decode"] else "decode"


def work_off(
    to_do: dict[str, int], plan: Plan, table: Committer, failures: Committer, check_lock: Callable[[], None]
) -> Outcome:
    """Audit the photo versions of the lists ``to_do`` (URI and length); commit rows as they are staged.

    Raises:
        OSError: a step fails, too many photos are denied, SIGTERM came, or rows are missing in the end. All
            that was staged until then is committed, unless the lock is lost.
    """
    outcome, photos = Outcome(), sum(to_do.values())
    progress = Progress("photos", photos)
    committers = {"table": table, "failures": failures}

    def commit(if_due: bool) -> None:
        began = time.monotonic()
        for committer in committers.values():
            committer.flush(if_due=if_due)
        outcome.seconds["commit"] += time.monotonic() - began

    with _sigterm_noted() as told_to_end:
        for window in _windows(to_do, plan.shares.detectors, plan.working_size):
            with contextlib.closing(stream(_steps(window, plan))) as written:
                try:
                    for files in written:
                        for file in files:
                            target = file.pop("target")
                            outcome.by_status.update(json.loads(file.pop("by_status")))
                            outcome.by_verdict.update(json.loads(file.pop("by_verdict")))
                            for step, seconds in json.loads(file.pop("seconds")).items():
                                outcome.seconds[step] += seconds
                            staged = Staged(**file)
                            committers[target].add(staged)
                            outcome.photos += staged.rows
                            progress.add(staged.rows, failed=target == "failures")
                        check_lock()
                        commit(if_due=True)
                        _check_denied(outcome, photos, plan)
                        if told_to_end.lasts() > GRACE_SECONDS:
                            raise OSError(TOLD_TO_END)
                finally:
                    # Also when a step fails: what is staged and known here is not done twice.
                    check_lock()
                    commit(if_due=False)
            if told_to_end.lasts() >= 0:
                raise OSError(TOLD_TO_END)
    progress.close()
    # By row, never by block: every photo of the to-do has its answer.
    if outcome.photos != photos:
        raise OSError(f"{photos - outcome.photos} photos have no row yet; run the same command again")
    return outcome


def _check_denied(outcome: Outcome, to_do: int, plan: Plan) -> None:
    """Stop where too many of the listed photos are denied. A few are tried again each night, alone."""
    denied, most = outcome.by_status["denied"], plan.max_denied * plan.listed
    from_the_start = outcome.photos >= DENIED_FROM_THE_START and denied == outcome.photos
    if denied > most or (from_the_start and to_do > most):
        raise OSError(
            f"{denied:,} of {outcome.photos:,} photos read are denied, of {plan.listed:,} listed. Check the"
            " rights to read them; if that is right so, run again with --max-denied 1"
        )


def _windows(to_do: Mapping[str, int], detectors: int, working_size: int) -> Iterator[list[pa.Table]]:
    """Cut the to-do into blocks, and gather blocks into windows of bounded size."""
    window: list[pa.Table] = []
    in_window, before, after = 0, 0, sum(to_do.values())
    most = photos_that_fit(working_size)
    for shard in to_do:
        photos = read_listing(shard)
        start = 0
        while start < len(photos):
            block = photos.slice(start, min(most, photos_of_block(before, after, detectors)))
            block = block.slice(0, _first_that_fit(block["size_bytes"].to_numpy()))
            window.append(block)
            start, before, after = start + len(block), before + len(block), after - len(block)
            in_window += len(block)
            if in_window >= PHOTOS_PER_WINDOW:
                yield window
                window, in_window = [], 0
    if window:
        yield window


def photos_of_block(before: int, after: int, detectors: int) -> int:
    """How many photos the next block takes, with so many before it and so many left."""
    blocks = max(8, 2 * detectors)
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, before // blocks, after // blocks))


def _first_that_fit(size_bytes: np.ndarray) -> int:
    """How many files from the first one on a block may read, one at least, by their sizes, int64 [photos]."""
    # A larger one has a block for itself; and a manifest's sizes could be more than their sum can hold.
    up_to_each = np.cumsum(size_bytes.clip(max=BLOCK_FILE_BYTES))
    return int(np.searchsorted(up_to_each, BLOCK_FILE_BYTES, "right"))


def photos_that_fit(working_size: int) -> int:
    """How many photos at ``working_size`` a block holds at most."""
    return max(1, min(LARGEST_BLOCK, BLOCK_BYTES // (3 * working_size**2)))


def _steps(photos: Sequence[pa.Table], plan: Plan) -> ray.data.Dataset:
    """Read, decode, detect and stage a bounded number of photos: one row per file written."""
    shares = plan.shares
    # Ray takes a task that it does not know yet for one with large blocks: at a tight bound it starts few.
    cluster.bound_decoded(
        shares, max(MIN_BLOCK_BYTES, photos_that_fit(plan.working_size) * 3 * plan.working_size**2)
    )
    return (
        ray.data.from_arrow(list(photos))
        .map_batches(
            partial(read_and_decode, working_size=plan.working_size, decoder=decoder_version()),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=shares.decode_cpus,
            **cluster.off_gpu_nodes(),
        )
        .map_batches(
            Detector,
            fn_constructor_args=(plan.model, plan.provenance.model_digest, shares.threads_per_detector),
            # Block by block. Ray wants a number for GPUs, and then brings small blocks together.
            batch_size=photos_that_fit(plan.working_size) if shares.detector_gpus else None,
            batch_format="pyarrow",
            # For a few photos a second network is loaded in vain.
            compute=ray.data.ActorPoolStrategy(size=min(shares.detectors, len(photos))),
            num_cpus=shares.detector_cpus,
            num_gpus=shares.detector_gpus or None,
        )
        .map_batches(
            partial(
                stage_rows,
                out=plan.out,
                provenance=plan.provenance,
                mask_shards=plan.masks == "shards",
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=shares.stage_cpus,
        )
    )


class _Noted:
    """When a signal came."""

    def __init__(self) -> None:
        self._at = math.inf

    def note(self, *_: object) -> None:
        self._at = min(self._at, time.monotonic())

    def lasts(self) -> float:
        """Seconds since it came; negative before."""
        return time.monotonic() - self._at


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[_Noted]:
    """SIGTERM, as a spot node gets it before it goes, is noted instead of ending the process."""
    noted = _Noted()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGTERM, noted.note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
