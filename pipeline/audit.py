"""The audit: list, subtract, read, decode, detect, stage and commit, tidy, report; it reads as it runs."""

import contextlib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import ray
from deltalake.exceptions import DeltaError

from bdnet.card import ARCH_VERSIONS, PREPROCESSING_VERSION, Card
from bdnet.photo import decoder_version
from pipeline import cluster, lock, models, storage
from pipeline.execution import Outcome, Plan, work_off
from pipeline.housekeeping import remove_old_lists, tidy
from pipeline.layout import AuditLayout, RunLayout
from pipeline.ledger import Committer, subtract
from pipeline.listing import Listing, write_listing
from pipeline.progress import duration
from pipeline.report import build_report
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE, SCHEMA_VERSION
from pipeline.steps import Provenance
from pipeline.storage_errors import redacted
from pipeline.view import lost, previous_listing

log = logging.getLogger("bdnet")

# The table's engine reads names as URLs: it would end the name here, or take it for another character.
_AMBIGUOUS = re.compile(r"[#?\\\x00-\x1f]|%[0-9a-fA-F]{2}|(?<=[^:/])//|(?<=/)\.{1,2}(?=/|$)")
SUBTRACT_WITHIN_SECONDS = 1800.0
TIDY_WITHIN_SECONDS = 7200.0


@dataclass(frozen=True)
class AuditSettings:
    """What to audit, with what, into where. ``working_size`` None is the model's own.

    ``max_denied`` is a share of the listed photos, ``max_lost`` one of the last listing of the same source.
    """

    source: str
    out: str
    model: str
    working_size: int | None
    masks: Literal["table", "shards"]
    limit: int | None
    workers: int | None
    max_denied: float
    max_lost: float


def audit_digest(card: Card, working_size: int) -> str:
    """Hash of all that changes pixels or their scores; never of thresholds."""
    parts: list[Any] = [card.digest, card.temperature, working_size, decoder_version(), PREPROCESSING_VERSION]
    if card.arch in ARCH_VERSIONS:
        parts.append(ARCH_VERSIONS[card.arch])
    if card.ranges:
        parts.append(card.ranges)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def check(settings: AuditSettings) -> Card:
    """Refuse what can't work before anything is written.

    Raises:
        ValueError: the output's name means two places, source and output lie in each other, or there is no
            such model.
    """
    source, out = settings.source, settings.out
    if ambiguous := _AMBIGUOUS.search(out):
        raise ValueError(
            f"--out {out!r} holds {ambiguous[0]!r}, with which the table would lie elsewhere; choose another"
            " name"
        )
    if storage.is_inside(out, source) or storage.is_inside(source, out):
        raise ValueError(f"--out {out} and the source {source} lie in each other; choose another --out")
    return models.read_card(settings.model)


def audit(settings: AuditSettings, run_id: str) -> dict[str, Any]:
    """Audit an archive: afterwards the table has one row for each photo version that could be read.

    Returns:
        what ``jobs.audit`` prints: table, report, run_id, photos, by_status, by_verdict, seconds, rate, and
        the seconds of each step, added up over its workers, with the one that bounds the run.

    Raises:
        ValueError: the settings are wrong or nothing is at the source.
        OSError: storage refuses, another audit writes to ``out``, too many photos are denied or gone, or the
            process was told to end; what was committed until then stays.
    """
    began = time.monotonic()
    card = check(settings)
    working_size = settings.working_size or card.working_size
    layout, run = AuditLayout(settings.out), AuditLayout(settings.out).run(run_id)
    provenance = Provenance(card.digest, audit_digest(card, working_size), run_id)

    with lock.hold(layout.lock, run_id) as check_lock:
        log.info("listing %s", settings.source)
        started_at = datetime.now(UTC)
        listing = write_listing(settings.source, run.listing, settings.limit)
        log.info("%s", _found(listing))
        _check_lost(listing, layout, settings)

        table = Committer(layout.table, AUDIT_TABLE, run_id)
        failures = Committer(layout.failures, FAILURES_TABLE, run_id)
        outcome = Outcome()
        with contextlib.ExitStack() as until_ray_ends:

            def connect() -> cluster.Shares:
                return until_ray_ends.enter_context(cluster.connect(settings.workers))

            # A night without news on a small archive needs no cluster.
            shares = connect() if len(listing.shards) > 1 else None
            known = (layout.table, table.version, provenance.audit_digest)
            to_do = _subtract_all(listing.shards, run.to_do, known, shares)
            photos = sum(to_do.values())
            log.info("%s photos to audit, %s audited before", f"{photos:,}", f"{listing.photos - photos:,}")
            # From here on the listing is what the archive holds: a run without settings has none.
            _write_settings(settings, card, working_size, provenance, listing, run, started_at)
            if photos:
                plan = Plan(
                    settings.out,
                    settings.model,
                    working_size,
                    settings.masks,
                    settings.max_denied,
                    listing.photos,
                    provenance,
                    shares or connect(),
                )
                log.info("%s", _shares_said(plan.shares))
                outcome = work_off(to_do, plan, table, failures, check_lock)
                _tidy(settings.out, plan.shares)
        _remove_lists(settings.out, run)

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
        "step_seconds": {step: round(seconds, 3) for step, seconds in outcome.seconds.items()},
        "bound_by": outcome.bound_by(),
    }


def dry_run(settings: AuditSettings, scratch: str) -> dict[str, Any]:
    """List and subtract only; the lists go to the folder ``scratch``, nothing is written to ``out``.

    Raises:
        ValueError, OSError: as ``audit`` does before it begins to read photos.
    """
    card = check(settings)
    digest = audit_digest(card, settings.working_size or card.working_size)
    listing = write_listing(settings.source, scratch, settings.limit)
    log.info("%s", _found(listing))
    _check_lost(listing, AuditLayout(settings.out), settings)
    table = AuditLayout(settings.out).table
    return {
        "dry_run": True,
        "table": table,
        "listed": listing.photos,
        "photos": sum(subtract(shard, f"{shard}.to_do", table, None, digest) for shard in listing.shards),
        "skipped_by_suffix": listing.skipped_by_suffix,
    }


def _check_lost(listing: Listing, layout: AuditLayout, settings: AuditSettings) -> None:
    """Ask, instead of taking photos out of the view, where a listing lacks many that the last one had."""
    before = previous_listing(layout, settings.source) if listing.complete else []
    if not before:
        return
    gone, had = lost(before, listing.shards)
    # Rounded up, so that what is asked for below is enough.
    if gone > settings.max_lost * had + 1e-6:
        raise OSError(
            f"{gone:,} of the {had:,} photos that were at {settings.source} are gone. If that is right, run"
            f" again with --max-lost {min(1.0, math.ceil(gone / had * 100) / 100):g}; nothing was changed"
        )
    if gone:
        log.info("%s photos are gone; they leave the view and keep their rows", f"{gone:,}")


def _subtract_all(
    shards: Sequence[str], folder: str, known: tuple[str, int, str], shares: cluster.Shares | None
) -> dict[str, int]:
    """Subtract shard by shard, in tasks where there is a cluster; return to-do lists with their lengths."""
    lists = [storage.join(folder, shard.rpartition("/")[2]) for shard in shards]
    if shares is None:
        lengths = [subtract(shard, to_do, *known) for shard, to_do in zip(shards, lists, strict=True)]
    else:
        task = ray.remote(subtract).options(num_cpus=shares.decode_cpus)
        found = [task.remote(shard, to_do, *known) for shard, to_do in zip(shards, lists, strict=True)]
        waiting = found
        while waiting:
            done, waiting = ray.wait(waiting, timeout=SUBTRACT_WITHIN_SECONDS)
            if not done:
                waited = duration(SUBTRACT_WITHIN_SECONDS)
                raise OSError(f"no task read the table for {waited}; see whether the cluster has a free CPU")
        lengths = ray.get(found)
    return {to_do: photos for to_do, photos in zip(lists, lengths, strict=True) if photos}


def _tidy(out: str, shares: cluster.Shares) -> None:
    """Compact and clean in a task: it takes memory that the driver need not have."""
    try:
        done = ray.get(
            ray.remote(tidy).options(num_cpus=shares.stage_cpus).remote(out), timeout=TIDY_WITHIN_SECONDS
        )
    except (ray.exceptions.RayError, OSError, DeltaError) as error:
        # All photos have their rows; the next run tidies.
        reason = str(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            reason = f"not done after {duration(TIDY_WITHIN_SECONDS)}"
        log.warning("not all small files were joined, the next run goes on: %s", redacted(reason)[:300])
    else:
        if any(done.values()):
            log.info("%(compacted)d small files joined, %(removed)d old files removed", done)


def _remove_lists(out: str, run: RunLayout) -> None:
    try:
        storage.remove_folder(run.to_do)
        removed = remove_old_lists(out)
    except OSError as error:
        # Nothing depends on it; the next run tries again.
        log.warning("old lists were not removed: %s", redacted(str(error))[:300])
    else:
        if removed:
            log.info("%d old files of lists removed", removed)


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
