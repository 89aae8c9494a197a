"""The current view of an audit: latest complete listing ⋈ audit table.

Only narrow columns are read for the whole archive; a mask is a thousand times wider.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline import storage
from pipeline.layout import AuditLayout
from pipeline.ledger import query, quoted
from pipeline.schema import AUDIT_TABLE, LISTING

NOT_AUDITED = "not_audited"

NARROW = (
    *("uri", "etag", "status", "error", "blurred_fraction", "subject_blurred_fraction"),
    *("blur_kind", "verdict", "focus"),
)


@dataclass(frozen=True)
class Run:
    """What a run wrote about itself in settings.json."""

    run_id: str
    started_at: str
    source: str
    audit_digest: str
    model_digest: str
    model: str
    working_size: int
    listing_complete: bool
    skipped_by_suffix: dict[str, int]


@dataclass(frozen=True)
class View:
    """The photos of one run's listing with what is known of them now.

    ``photos`` has one row per photo version: the columns of NARROW and ``size_bytes``. The status of a photo
    without a row is that of its latest retryable failure, or ``not_audited``.
    """

    run: Run
    photos: pa.Table


def current_view(layout: AuditLayout) -> View:
    """Join the latest complete listing (or, without one, the latest) with the audit table.

    Raises:
        ValueError: there is no run under the layout, or settings.json lacks something.
    """
    run = latest_run(layout)
    listing = _read_listing(layout.run(run.run_id).listing)
    rows = query(
        layout.table,
        f"SELECT {', '.join(NARROW)} FROM delta WHERE audit_digest = {quoted(run.audit_digest)}",
        pa.schema([AUDIT_TABLE.field(name) for name in NARROW]),
    )
    failures = query(
        layout.failures,
        "SELECT uri, etag, status AS failure, error AS failure_error FROM (SELECT *, row_number() OVER"
        " (PARTITION BY uri, etag ORDER BY failed_at DESC) AS age FROM delta) WHERE age = 1",
        pa.schema([(name, pa.string()) for name in ("uri", "etag", "failure", "failure_error")]),
    )
    joined = listing.join(rows, ["uri", "etag"]).join(failures, ["uri", "etag"])
    error = pc.if_else(pc.is_null(joined["status"]), joined["failure_error"], joined["error"])
    status = pc.coalesce(joined["status"], joined["failure"], pa.scalar(NOT_AUDITED))
    joined = joined.drop_columns(["status", "error", "failure", "failure_error"])
    return View(run, joined.append_column("status", status).append_column("error", error))


def latest_run(layout: AuditLayout) -> Run:
    """The run with the latest complete listing; where there is none, the latest run.

    Raises:
        ValueError: there is no run, or settings.json is not what an audit writes.
    """
    found = storage.list_files(layout.runs, "/settings.json")
    if not found:
        raise ValueError(
            f"no audit at {layout.out}: it has no runs/*/settings.json. Give the --out of an audit."
        )
    runs = [_read_run(uri) for uri in found]
    return max(runs, key=lambda run: (run.listing_complete, moment(run.started_at), run.run_id))


def _read_run(uri: str) -> Run:
    try:
        settings = json.loads(storage.read_bytes(uri))
        run = Run(**{name: settings[name] for name in Run.__dataclass_fields__})
        moment(run.started_at)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{uri} is not the settings of an audit run ({error!r}); remove that run."
        ) from error
    return run


def _read_listing(uri: str) -> pa.Table:
    files = storage.list_files(uri, ".parquet")
    columns = ["uri", "etag", "size_bytes"]
    if not files:
        return LISTING.empty_table().select(columns)
    fs, _ = storage.filesystem(uri)
    paths = [storage.filesystem(file)[1] for file in files]
    return ds.dataset(paths, schema=LISTING, filesystem=fs, format="parquet").to_table(columns=columns)


def moment(text: str) -> datetime:
    """An ISO time; without a time zone it is UTC."""
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
