"""The current view of an audit: what the latest complete listings hold ⋈ what the audit table knows of it.

A photo is in the view as the newest complete listing that *covers* it says. A listing of a folder or prefix
covers all URIs below it, one of a manifest covers the URIs that it names. Of each source only its latest
complete listing counts. It follows that

- a photo that the latest complete listing of its source lacks is gone from the view; its rows stay;
- a newer listing of a narrower prefix refreshes the photos below it and hides no other;
- a newer listing of a wider prefix replaces the older ones of all that lies in it;
- a failed listing, which has no settings.json, and one that ``--limit`` ended change nothing. Only where no
  listing is complete, the latest limited one is the view, and the report says so.

A photo is shown with its row under the audit digest of the run that listed it. Without such a row, also after
a change of the model, its status is that of its latest retryable failure, or ``not_audited``: what an older
model measured is never shown as the new one's.

Memory holds one listing shard and its rows at a time, however large the archive is.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote_from_bytes

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from pipeline import storage
from pipeline.delta import quoted, read_table, scan
from pipeline.layout import AuditLayout, RunLayout
from pipeline.listing import is_manifest, local_uri, read_listing
from pipeline.schema import AUDIT_TABLE, FAILURES_TABLE
from pipeline.storage_errors import patiently

NOT_AUDITED = "not_audited"

# Reading the log of a table of many files takes a second: of a view each is opened once, if at all.
_Opener = Callable[[str], DeltaTable | None]

_KEYS = ["uri", "etag"]
_LISTED = ["uri", "etag", "size_bytes"]
_MEASURED = ["blurred_fraction", "subject_blurred_fraction", "blur_kind", "verdict", "focus"]

# Only narrow columns are read for the whole archive; a mask is a thousand times wider.
PHOTOS = pa.schema(
    [
        (name, AUDIT_TABLE.field(name).type)
        for name in (*_LISTED, "status", "error", *_MEASURED, "audit_digest")
    ]
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
    """The runs whose listings make up the view, newest first."""

    layout: AuditLayout
    runs: tuple[Run, ...]

    @property
    def run(self) -> Run:
        """The newest of the runs."""
        return self.runs[0]

    @property
    def outermost(self) -> list[Run]:
        """The runs whose sources lie in no other's."""
        sources = [run.source for run in self.runs]
        return [run for run in self.runs if not any(_covers(source, run.source) for source in sources)]

    def name(self, uri: str) -> str:
        """``uri`` below the source; whole where there are several sources."""
        if len(self.outermost) > 1:
            return uri
        return uri.removeprefix(storage.join(self.outermost[0].source, ""))

    def tables(self) -> Iterator[pa.Table]:
        """The photos as tables of ``PHOTOS``, each of at most one listing shard, in no particular order.

        Raises:
            OSError: a listing or a table can't be read.
        """
        open_once = functools.cache(read_table)
        for n, run in enumerate(self.runs):
            covered = [_covered_by(self.layout, newer) for newer in self.runs[:n]]
            for shard in _shards(self.layout, run):
                listing = read_listing(shard, _LISTED)
                for by in covered:
                    listing = listing.filter(pc.invert(by(listing["uri"].combine_chunks())))
                if listing.num_rows:
                    yield _with_what_is_known(self.layout, open_once, listing, run.audit_digest)


def current_view(layout: AuditLayout) -> View:
    """The view of the audit as it is now, see above.

    Raises:
        ValueError: there is no run under the layout, or settings.json lacks something.
    """
    runs = current_runs(layout)
    return View(
        layout,
        tuple(run for n, run in enumerate(runs) if not any(_covers(r.source, run.source) for r in runs[:n])),
    )


def current_runs(layout: AuditLayout) -> list[Run]:
    """The run with the latest complete listing of each source, newest first; without any, the latest run.

    Raises:
        ValueError: there is no run, or settings.json is not what an audit writes.
    """
    runs = sorted(_runs(layout), key=_began)
    if not runs:
        raise ValueError(
            f"no audit at {layout.out}: it has no runs/*/settings.json. Give the --out of an audit."
        )
    latest = {_origin(run.source): run for run in runs if run.listing_complete}
    return sorted(latest.values(), key=_began, reverse=True) or runs[-1:]


def previous_listing(layout: AuditLayout, source: str) -> list[str]:
    """Shards of the latest complete listing of exactly ``source``; empty where there is none.

    A run counts from the moment its settings.json is written: ask before that for the one before it.

    Raises:
        ValueError: a settings.json is not what an audit writes.
    """
    runs = [run for run in _runs(layout) if run.listing_complete and _origin(run.source) == _origin(source)]
    return _shards(layout, max(runs, key=_began)) if runs else []


def lost(before: Sequence[str], now: Sequence[str]) -> tuple[int, int]:
    """How many URIs of the listing shards ``before`` are in none of the shards ``now``, of how many.

    Memory holds two shards at a time. Listings in key order are compared in one pass; of a manifest in random
    order each shard is compared with every other.

    Raises:
        OSError: a shard can't be read.
    """
    is_in_now = _membership(now)
    gone = had = 0
    for shard in before:
        uris = pc.unique(read_listing(shard, ["uri"])["uri"])
        gone += len(uris) - (pc.sum(is_in_now(uris)).as_py() or 0)
        had += len(uris)
    return gone, had


def first(photos: pa.Table, count: int, column: str, order: str) -> pa.Table:
    """The first ``count`` rows by ``column``, then by name and version: the same ones each time."""
    keys = [(column, order), ("uri", "ascending"), ("etag", "ascending")]
    return photos.take(
        pc.select_k_unstable(photos, min(count, photos.num_rows), sort_keys=list(dict.fromkeys(keys)))
    )


def moment(text: str) -> datetime:
    """An ISO time; without a time zone it is UTC."""
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _with_what_is_known(
    layout: AuditLayout, open_once: _Opener, listing: pa.Table, audit_digest: str
) -> pa.Table:
    """The listed photos with their rows, or their latest failures, as ``PHOTOS``."""
    known = pa.schema([PHOTOS.field(name) for name in (*_KEYS, "status", "error", *_MEASURED)])
    rows = list(_rows_of(listing, layout.table, open_once, known, f"audit_digest = {quoted(audit_digest)}"))
    joined = listing.join(pa.concat_tables([known.empty_table(), *rows]), _KEYS)
    left = joined.filter(pc.is_null(joined["status"]))
    failures = _latest_failures(left.select(_KEYS), layout.failures, open_once)
    left = left.drop_columns(["status", "error"]).join(failures, _KEYS)
    left = left.set_column(
        left.schema.get_field_index("status"), "status", pc.fill_null(left["status"], NOT_AUDITED)
    )
    parts = [joined.filter(pc.is_valid(joined["status"])), left]
    names = [name for name in PHOTOS.names if name != "audit_digest"]
    photos = pa.concat_tables([part.select(names) for part in parts], promote_options="default")
    return photos.append_column("audit_digest", pa.repeat(audit_digest, len(photos))).cast(PHOTOS)


def _latest_failures(keys: pa.Table, uri: str, open_once: _Opener) -> pa.Table:
    """(uri, etag, status, error) of the latest failure of each of these photo versions that has one."""
    names = (*_KEYS, "status", "error", "failed_at")
    columns = pa.schema([(name, FAILURES_TABLE.field(name).type) for name in names])
    latest = columns.empty_table()
    for found in _rows_of(keys, uri, open_once, columns):
        both = pa.concat_tables([latest, found]).sort_by(
            [("failed_at", "descending"), ("status", "ascending")]
        )
        numbered = both.select(_KEYS).append_column("age", pa.array(range(len(both))))
        latest = both.take(numbered.group_by(_KEYS).aggregate([("age", "min")])["age_min"])
    return latest.drop_columns(["failed_at"])


def _rows_of(
    photos: pa.Table, uri: str, open_once: _Opener, schema: pa.Schema, where: str = "true"
) -> Iterator[pa.Table]:
    """Stream the rows of the Delta table at ``uri`` for the (uri, etag) of ``photos``.

    Listings come in key order: a shard spans a small range of keys, and few of the table's files reach into
    it. Where the range is everything, as in a manifest in random order, all rows stream by.
    """
    if not photos.num_rows:
        return
    ends = pc.min_max(photos["uri"]).as_py()
    sql = (
        f"SELECT {', '.join(schema.names)} FROM delta"
        f" WHERE {where} AND uri BETWEEN {quoted(ends['min'])} AND {quoted(ends['max'])}"
    )
    keys = photos.select(_KEYS)
    for rows in scan(open_once(uri), sql):
        # The engine answers with string views, which joins don't take.
        yield rows.cast(schema).join(keys, _KEYS, join_type="left semi")


def _covered_by(layout: AuditLayout, run: Run) -> Callable[[pa.Array], pa.Array]:
    """Which of the URIs that it is given the listing of ``run`` covers."""
    if is_manifest(run.source):
        return _membership(_shards(layout, run))
    prefixes = _prefixes(run.source)
    return lambda uris: pc.or_(*(pc.starts_with(uris, prefix) for prefix in prefixes))


def _covers(outer: str, inner: str) -> bool:
    """Whether a listing of ``outer`` covers all that one of ``inner`` can."""
    if is_manifest(outer) or is_manifest(inner) or inner == outer:
        return False
    return inner.startswith(storage.join(outer, ""))


def _prefixes(source: str) -> tuple[str, str]:
    """How URIs below a folder or prefix begin: as it does, or as a local file whose name is no UTF-8."""
    inside = storage.join(source, "")
    return local_uri(inside), "file://" + quote_from_bytes(os.fsencode(inside))


def _origin(source: str) -> str:
    """What stays of a source from night to night: an S3 Inventory writes each manifest to a dated folder."""
    return re.sub(r"/\d{4}-\d\d-\d\dT\d\d-\d\dZ/manifest\.json$", "/manifest.json", source)


def _membership(shards: Sequence[str]) -> Callable[[pa.Array], pa.Array]:
    """Which of the URIs that it is given the listing shards name; a shard out of their range isn't read."""
    spans = [(shard, span) for shard in shards if (span := _span(shard)) is not None]

    def is_named(uris: pa.Array) -> pa.Array:
        found = pa.repeat(False, len(uris))
        if not len(uris):
            return found
        ends = pc.min_max(uris).as_py()
        for shard, (low, high) in spans:
            if pc.all(found).as_py():
                break
            if low <= ends["max"] and (high is None or ends["min"] <= high):
                found = pc.or_(found, pc.is_in(uris, read_listing(shard, ["uri"])["uri"].combine_chunks()))
        return found

    return is_named


def _span(shard: str) -> tuple[str, str | None] | None:
    """The first and the last URI of a shard, by its Parquet footer; None where the shard has no rows.

    Writers leave them out where they are very long; then the span is everything, ("", None).
    """
    fs, path = storage.filesystem(shard)
    metadata = patiently(lambda: pq.read_metadata(path, filesystem=fs), shard)
    column = metadata.schema.names.index("uri")
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    found = [group.column(column).statistics for group in groups if group.num_rows]
    if not all(statistics is not None and statistics.has_min_max for statistics in found):
        return "", None
    return (min(s.min for s in found), max(s.max for s in found)) if found else None


def _shards(layout: AuditLayout, run: Run) -> list[str]:
    return storage.list_files(layout.run(run.run_id).listing, ".parquet")


def _began(run: Run) -> tuple[datetime, str]:
    return moment(run.started_at), run.run_id


def _runs(layout: AuditLayout) -> list[Run]:
    """All runs that came as far as settings.json."""
    fs, path = storage.filesystem(layout.runs)
    try:
        folders = patiently(
            lambda: storage.within(storage.LONG_CALL_SECONDS, fs, "ls", path, detail=False), layout.runs
        )
    except FileNotFoundError:
        return []
    names = {folder.rstrip("/").rpartition("/")[2] for folder in folders}
    # A year of nights are some hundred small objects.
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(_read_run, [layout.run(name) for name in sorted(names)])
        return [run for run in found if run is not None]


def _read_run(layout: RunLayout) -> Run | None:
    try:
        settings = json.loads(storage.read_bytes(layout.settings))
        run = Run(**{name: settings[name] for name in Run.__dataclass_fields__})
        moment(run.started_at)
        if not isinstance(run.source, str):
            raise TypeError("source is no string")
    except (FileNotFoundError, NotADirectoryError):
        return None  # its listing failed or goes on
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{layout.settings} is not the settings of an audit run ({error!r}); remove that run."
        ) from error
    return run
