"""The audit: list, subtract, read, decode, detect, stage and commit, report; it reads as it runs."""

import hashlib
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray.data

from bdnet.model import Card, read_card
from bdnet.photo import DECODER_VERSION
from bdnet.preprocess import PREPROCESSING_VERSION
from pipeline import cluster, storage
from pipeline.layout import AuditLayout, RunLayout
from pipeline.ledger import Committer, Staged, known_keys, open_table, subtract
from pipeline.listing import Listing, write_listing
from pipeline.progress import Progress
from pipeline.report import build_report
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, SCHEMA_VERSION
from pipeline.steps import Detector, Provenance, read_and_decode, stage_rows

log = logging.getLogger("bdnet")

PHOTOS_PER_BLOCK = 32
# Rows of one staged file: small enough that a crash repeats seconds of work, not minutes.
PHOTOS_PER_FILE = 128
# Photos of one Ray Data execution: what the driver keeps about blocks is bounded by it.
PHOTOS_PER_WINDOW = 50_000


@dataclass(frozen=True)
class AuditSettings:
    """What to audit, with what, into where. ``working_size`` None is the model's own."""

    source: str
    out: str
    model: str
    working_size: int | None
    masks: Literal["table", "shards"]
    limit: int | None
    workers: int | None


def new_run_id() -> str:
    """A name for a run that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def audit_digest(model_digest: str, working_size: int) -> str:
    """Hash of all that changes pixels or their scores; never of thresholds."""
    parts = [model_digest, working_size, DECODER_VERSION, PREPROCESSING_VERSION]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check(settings: AuditSettings) -> Card:
    """Refuse what can't work before anything is written.

    Raises:
        ValueError: source and output lie in each other, or there is no such model.
    """
    source, out = settings.source, settings.out
    if storage.is_inside(out, source) or storage.is_inside(source, out):
        raise ValueError(f"--out {out} and the source {source} lie in each other; choose another --out")
    return read_card(settings.model)


def audit(settings: AuditSettings, run_id: str) -> dict[str, Any]:
    """Audit an archive: afterwards the table has one row for each photo version that could be read.

    Returns:
        what ``jobs.audit`` prints: table, report, run_id, photos, by_status, by_verdict, seconds, rate.

    Raises:
        ValueError: the settings are wrong or nothing is at the source.
        OSError: storage refuses; what was committed until then stays.
    """
    began = time.monotonic()
    card = check(settings)
    working_size = settings.working_size or card.working_size
    layout, run = AuditLayout(settings.out), AuditLayout(settings.out).run(run_id)
    provenance = Provenance(card.digest, audit_digest(card.digest, working_size), run_id)

    log.info("listing %s", settings.source)
    started_at = datetime.now(UTC)
    listing = write_listing(settings.source, run.listing, settings.limit)
    log.info("%s", _found(listing))

    open_table(layout.table, AUDIT_TABLE)
    known = known_keys(layout.table, provenance.audit_digest)
    to_do = sum(photos.num_rows for photos in subtract(listing.shards, known))
    log.info("%s photos to audit, %s audited before", f"{to_do:,}", f"{listing.photos - to_do:,}")
    _write_settings(settings, card, working_size, provenance, listing, run, started_at)

    outcome = Outcome()
    if to_do:
        with cluster.connect(settings.workers) as shares:
            log.info("%s", _shares_said(shares))
            progress = Progress("photos", to_do)
            committers = {
                "table": Committer(layout.table, AUDIT_TABLE, run_id),
                "failures": Committer(layout.failures, FAILURES_TABLE, run_id),
            }
            for window in _windows(subtract(listing.shards, known)):
                _audit_window(
                    window, settings, working_size, provenance, shares, committers, outcome, progress
                )
            progress.close()
    # By row, never by block: every photo of the to-do has its answer.
    if outcome.photos != to_do:
        raise OSError(f"{to_do - outcome.photos} photos have no row yet; run the same command again")

    seconds = time.monotonic() - began
    log.info("report: %s", run.report)
    build_report(settings.out, run.report)
    return {
        "table": layout.table,
        "report": run.report,
        "run_id": run_id,
        "photos": outcome.photos,
        "by_status": dict(outcome.by_status),
        "by_verdict": dict(outcome.by_verdict),
        "seconds": round(seconds, 2),
        "photos_per_second": round(outcome.photos / seconds, 2),
    }


def dry_run(settings: AuditSettings, scratch: str) -> dict[str, Any]:
    """List and subtract only; the listing goes to the folder ``scratch``, nothing is written to ``out``."""
    card = check(settings)
    digest = audit_digest(card.digest, settings.working_size or card.working_size)
    listing = write_listing(settings.source, scratch, settings.limit)
    log.info("%s", _found(listing))
    layout = AuditLayout(settings.out)
    known = known_keys(layout.table, digest)
    to_do = sum(photos.num_rows for photos in subtract(listing.shards, known))
    return {
        "dry_run": True,
        "table": layout.table,
        "listed": listing.photos,
        "photos": to_do,
        "skipped_by_suffix": listing.skipped_by_suffix,
    }


class Outcome:
    """What the run's committed files hold."""

    def __init__(self) -> None:
        self.photos = 0
        self.by_status: Counter[str] = Counter()
        self.by_verdict: Counter[str] = Counter()


def _audit_window(
    photos: Sequence[pa.Table],
    settings: AuditSettings,
    working_size: int,
    provenance: Provenance,
    shares: cluster.Shares,
    committers: dict[str, Committer],
    outcome: Outcome,
    progress: Progress,
) -> None:
    """Run the steps on the cluster for a bounded number of photos and commit what they stage."""
    files = (
        ray.data.from_arrow(list(photos))
        .map_batches(
            partial(read_and_decode, working_size=working_size),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=shares.decode_cpus,
        )
        .map_batches(
            Detector,
            fn_constructor_args=(settings.model, provenance.model_digest, shares.threads_per_detector),
            batch_size=PHOTOS_PER_BLOCK,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=shares.detectors),
            num_cpus=shares.detector_cpus,
            num_gpus=shares.detector_gpus or None,
        )
        .map_batches(
            partial(
                stage_rows,
                out=settings.out,
                provenance=provenance,
                mask_shards=settings.masks == "shards",
            ),
            batch_size=PHOTOS_PER_FILE,
            batch_format="pyarrow",
            num_cpus=shares.stage_cpus,
        )
    )
    try:
        # By default Ray hands over a block when it has the next one: behind a slow photo, files that are
        # written would wait for their commit.
        for written in files.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(written, pa.Table)
            for row in written.to_pylist():
                committers[row["target"]].add(Staged(row["path"], row["size"], row["rows"]))
                outcome.photos += row["rows"]
                outcome.by_status.update(json.loads(row["by_status"]))
                outcome.by_verdict.update(json.loads(row["by_verdict"]))
                progress.add(row["rows"])
    finally:
        # Also when a step fails: what is staged and known here is not done twice.
        for committer in committers.values():
            committer.flush()


def _windows(to_do: Iterator[pa.Table]) -> Iterator[list[pa.Table]]:
    """Cut the to-do into blocks, and gather blocks into windows of bounded size."""
    window: list[pa.Table] = []
    for shard in to_do:
        for start in range(0, len(shard), PHOTOS_PER_BLOCK):
            window.append(shard.slice(start, PHOTOS_PER_BLOCK))
            if len(window) * PHOTOS_PER_BLOCK >= PHOTOS_PER_WINDOW:
                yield window
                window = []
    if window:
        yield window


def _write_settings(
    settings: AuditSettings,
    card: Card,
    working_size: int,
    provenance: Provenance,
    listing: Listing,
    run: RunLayout,
    started_at: datetime,
) -> None:
    """A run without this file has no complete listing."""
    content = {
        **asdict(settings),
        **asdict(provenance),
        "arch": card.arch,
        "working_size": working_size,
        "schema_version": SCHEMA_VERSION,
        "started_at": started_at.isoformat(),
        "listing_complete": listing.complete,
        "listed": listing.photos,
        "skipped_by_suffix": listing.skipped_by_suffix,
    }
    storage.write_bytes(run.settings, json.dumps(content, indent=2).encode())


def _found(listing: Listing) -> str:
    text = f"{listing.photos:,} photos listed" + ("" if listing.complete else " (limited)")
    if listing.skipped_by_suffix:
        skipped = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(listing.skipped_by_suffix.items()))
        text += f"; not photos: {skipped}"
    return text


def _shares_said(shares: cluster.Shares) -> str:
    where = (
        f"{shares.detector_gpus:g} GPU" if shares.detector_gpus else f"{shares.threads_per_detector} threads"
    )
    return f"{shares.detectors} detector{'s' if shares.detectors > 1 else ''} with {where} each"
