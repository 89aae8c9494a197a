"""The table is the ledger: subtract what it holds, stage new rows beside it, commit them in the driver.

Staged files that no commit names are never read. A task that is retried stages another file, and only the
file whose add-action came back is committed, so no row is lost or doubled.
"""

import io
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, QueryBuilder, Schema, Transaction
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from pipeline import storage
from pipeline.listing import read_listing
from pipeline.schema import LISTING

COMMIT_EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Staged:
    """One Parquet file beside a table, written but not yet part of it."""

    path: str  # relative to the table
    size: int
    rows: int


def open_table(uri: str, schema: pa.Schema) -> DeltaTable:
    """Open the Delta table at ``uri``, created empty where there is none."""
    options = storage.delta_options(uri)
    try:
        return DeltaTable(uri, storage_options=options)
    except TableNotFoundError:
        return DeltaTable.create(uri, Schema.from_arrow(schema), mode="ignore", storage_options=options)


def query(uri: str, sql: str, schema: pa.Schema) -> pa.Table:
    """Run ``sql`` on the Delta table at ``uri``, named ``delta``; no rows where no table was begun.

    Raises:
        OSError: the table has lost a file or can't be read.
    """
    # Filters are pushed into the Parquet scan, so that wide columns are read for matching rows only.
    builder = QueryBuilder({"datafusion.execution.parquet.pushdown_filters": "true"})
    try:
        table = DeltaTable(uri, storage_options=storage.delta_options(uri))
        found = pa.table(builder.register("delta", table).execute(sql).read_all())
    except TableNotFoundError:
        return schema.empty_table()
    except Exception as error:  # The engine raises bare Exception for a file that it can't read.
        raise OSError(f"cannot read the table {uri}: {error}") from error
    return found.cast(schema)  # The engine answers with string views, which joins don't take.


def quoted(text: str) -> str:
    """``text`` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def known_keys(table_uri: str, audit_digest: str) -> pa.Table:
    """(uri, etag) of every row of the audit table with this digest; empty where there is no table."""
    keys = pa.schema([("uri", pa.string()), ("etag", pa.string())])
    return query(table_uri, f"SELECT uri, etag FROM delta WHERE audit_digest = {quoted(audit_digest)}", keys)


def subtract(shards: Sequence[str], known: pa.Table) -> Iterator[pa.Table]:
    """Photo versions of each listing shard that the table doesn't know yet, as ``schema.LISTING``."""
    for shard in shards:
        listing = read_listing(shard)
        if known.num_rows:
            listing = listing.join(known, keys=["uri", "etag"], join_type="left anti").cast(LISTING)
        if listing.num_rows:
            yield listing.combine_chunks()


def stage(rows: pa.Table, table_uri: str, run_id: str) -> Staged:
    """Write rows as one Parquet file beside the table."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    name = f"part-{run_id}-{uuid.uuid4().hex}.parquet"
    storage.write_bytes(storage.join(table_uri, name), buffer.getvalue())
    return Staged(name, buffer.tell(), rows.num_rows)


class Committer:
    """Commits staged files to one table, in groups. Only the driver has one.

    Every commit names the run and a rising version, so that the log tells which commit of which run it was.
    """

    def __init__(self, table_uri: str, schema: pa.Schema, run_id: str) -> None:
        self._uri, self._schema, self._run_id = table_uri, schema, run_id
        self._version = 0
        self._pending: list[Staged] = []
        self._committed_at = time.monotonic()

    def add(self, staged: Staged) -> None:
        """Take a file; commit all that wait when the last commit is a while ago."""
        self._pending.append(staged)
        if time.monotonic() - self._committed_at >= COMMIT_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what waits, all of it or nothing."""
        if not self._pending:
            return
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(s.path, s.size, {}, now, data_change=True, stats=json.dumps({"numRecords": s.rows}))
            for s in self._pending
        ]
        self._version += 1
        open_table(self._uri, self._schema).create_write_transaction(
            actions,
            mode="append",
            schema=Schema.from_arrow(self._schema),
            commit_properties=CommitProperties(
                app_transactions=[Transaction(self._run_id, self._version, now)]
            ),
        )
        self._pending.clear()
        self._committed_at = time.monotonic()
