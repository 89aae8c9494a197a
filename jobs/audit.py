"""Find the blur in every photo of an archive: ``python -m jobs.audit SOURCE --out URI``."""

import logging
import sys
import tempfile
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from bdnet.card import DEFAULT_MODEL
from jobs.command import UsageError, run
from pipeline import models, storage
from pipeline.audit import AuditSettings, audit, dry_run
from pipeline.layout import AuditLayout, new_run_id
from pipeline.runlog import saved_log
from pipeline.schema import RETRYABLE_STATUSES


@dataclass(frozen=True)
class Settings:
    """Options of jobs.audit."""

    source: Annotated[str, tyro.conf.Positional]
    """The archive: a folder (links to folders are counted, not followed), s3://bucket/prefix, any fsspec URI,
    a .parquet manifest of a listing, or an S3 Inventory's manifest.json."""
    out: str
    """Folder or URI of the table, reports and runs; the same one each night."""
    model: str = DEFAULT_MODEL
    """A shipped model's name, or folder or URI of a model that jobs.train wrote."""
    working_size: int | None = None
    """Long side in pixels at which the network looks; the model's own when not given."""
    masks: Literal["table", "shards"] = "table"
    """table: masks in the table's column mask; shards: also as PNG files in tar shards."""
    limit: int | None = None
    """List and audit no more photos than this."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List and count what would be audited; write nothing."""
    workers: int | None = None
    """Detectors; when not given, one per GPU, else one per two logical CPUs of each node, at least one."""
    max_denied: float = 0.5
    """Stop when more than this share of the listed photos is denied."""
    max_lost: float = 0.2
    """Stop and ask when more than this share of the last listing's photos is gone."""
    fail_on_errors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Exit with 3 when photos could not be read and will be tried again by the next run."""


def work(settings: Settings) -> dict[str, Any]:
    """Audit, or count what an audit would do."""
    for name in ("working_size", "limit", "workers"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("max_denied", "max_lost"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UsageError(f"--{name.replace('_', '-')} is a share between 0 and 1")
    audited = AuditSettings(
        source=storage.normalize(settings.source),
        out=storage.normalize(settings.out),
        model=models.resolved(settings.model),
        working_size=settings.working_size,
        masks=settings.masks,
        limit=settings.limit,
        workers=settings.workers,
        max_denied=settings.max_denied,
        max_lost=settings.max_lost,
    )
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            return dry_run(audited, scratch)
    run_id = new_run_id()
    with saved_log(AuditLayout(audited.out).run(run_id).log):
        return audit(audited, run_id)


def exit_code(settings: Settings, result: dict[str, Any]) -> int:
    """3 when the user asked to be told of photos that remain to be read."""
    failed = sum(result.get("by_status", {}).get(status, 0) for status in RETRYABLE_STATUSES)
    return 3 if settings.fail_on_errors and failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("bdnet").setLevel(logging.INFO)

    def result_uri(settings: Settings, result: dict[str, Any]) -> str | None:
        out = AuditLayout(storage.normalize(settings.out))
        return None if settings.dry_run else out.run(result["run_id"]).result

    return run(Settings, work, argv, __doc__, result_uri, exit_code)


if __name__ == "__main__":
    sys.exit(main())
