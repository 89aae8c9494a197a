"""The table is the ledger: subtract what it holds, stage new rows beside it, commit them in the driver.

Why nothing is lost or doubled, whatever dies when (drawing: docs/exactly-once.md):

- Staged files that no commit names are never read. A task that is retried stages another file, and only the
  file whose add-action came back to the driver is committed.
- A commit is one object of the Delta log, written if nobody was faster: it is there or it isn't.
- Every commit of every run carries the same app id with a rising number, and is made on top of the very
  version that the run subtracted: a writer that was thought dead and wakes up is refused.
"""

import contextlib
import io
import json
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from pipeline import storage
from pipeline.delta import SKIPPED_BY, open_table, quoted, read_table, scan
from pipeline.layout import new_part
from pipeline.listing import read_listing

APP_ID = "bdnet-audit"
COMMIT_EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Staged:
    """One Parquet file beside a table, written but not yet part of it. ``stats`` is Delta's JSON of them."""

    path: str  # relative to the table
    size: int
    rows: int
    stats: str


def subtract(shard: str, to_do: str, table_uri: str, version: int | None, audit_digest: str) -> int:
    """Write to ``to_do`` the photo versions of a listing shard that the table doesn't know; return how many.

    A listing comes in the order of its keys, so a shard spans a small range of them and few of the table's
    files reach into it. The answer streams: memory is bounded by the shard even where the range is all.
    """
    listing = read_listing(shard)
    keys = _keys(listing)
    is_known = np.zeros(len(listing), bool)
    if len(listing):
        span = pc.min_max(listing["uri"]).as_py()
        sql = f"""SELECT uri, etag FROM delta WHERE audit_digest = {quoted(audit_digest)}
            AND uri BETWEEN {quoted(span["min"])} AND {quoted(span["max"])}"""
        for known in scan(read_table(table_uri, version), sql):
            is_known |= pc.is_in(keys, _keys(known).combine_chunks()).to_numpy(zero_copy_only=False)
    rest = listing.filter(pa.array(~is_known))
    if rest.num_rows:
        buffer = io.BytesIO()
        pq.write_table(rest, buffer, compression="zstd")
        storage.write_bytes(to_do, buffer.getvalue())
    return rest.num_rows


def _keys(rows: pa.Table) -> pa.ChunkedArray:
    """(uri, etag) as one string each; an etag holds no line break."""
    uri, etag = (rows[name].cast(pa.string()) for name in ("uri", "etag"))
    return pc.binary_join_element_wise(etag, uri, "\n")


def stage(rows: pa.Table, table_uri: str, run_id: str) -> Staged:
    """Write rows as one Parquet file beside the table."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    name = new_part(run_id, ".parquet")
    storage.write_bytes(storage.join(table_uri, name), buffer.getvalue())
    spans = {name: pc.min_max(rows[name]).as_py() for name in SKIPPED_BY if name in rows.schema.names}
    stats = {
        "numRecords": rows.num_rows,
        "minValues": {name: span["min"] for name, span in spans.items()},
        "maxValues": {name: span["max"] for name, span in spans.items()},
    }
    # As UTF-8: the log's reader takes an escaped pair of surrogates for another character.
    return Staged(name, buffer.tell(), rows.num_rows, json.dumps(stats, ensure_ascii=False))


class Committer:
    """Commits staged files to one table, in groups. Only the driver of a run that holds the lock has one."""

    def __init__(self, table_uri: str, schema: pa.Schema, run_id: str) -> None:
        self._uri, self._run_id = table_uri, run_id
        self._schema = Schema.from_arrow(schema)
        self._table = open_table(table_uri, schema)
        # The table looks it up in the log from the last checkpoint on, file by file: once is enough.
        self._commits = self._table.transaction_version(APP_ID) or 0
        self._pending: list[Staged] = []
        self._committed_at = time.monotonic()

    @property
    def version(self) -> int:
        """The version of the table that the next commit follows."""
        return self._table.version()

    def _check_seen(self) -> None:
        for file in self._pending:
            if not storage.exists(storage.join(self._uri, file.path)):
                raise OSError(
                    f"{file.path} was written to {self._uri} on another machine, not on this one; give an"
                    " --out that all nodes of the cluster see: s3://… or a shared folder"
                )

    def add(self, staged: Staged) -> None:
        """Take a file for the next commit."""
        self._pending.append(staged)

    def flush(self, *, if_due: bool = False) -> None:
        """Commit what waits, all of it or nothing; ``if_due``: only when the last commit is a while ago.

        Raises:
            OSError: another run has committed to the table since this one began, or a file lies on another
                machine's disk.
        """
        if not self._pending or (if_due and time.monotonic() - self._committed_at < COMMIT_EVERY_SECONDS):
            return
        if storage.is_local(self._uri):
            self._check_seen()
        # What is being committed no longer waits: stopped in here, a run never commits a file twice.
        files, self._pending = self._pending, []
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(file.path, file.size, {}, now, data_change=True, stats=file.stats) for file in files
        ]
        following = self.version + 1
        ours = {"bdnet_commit": f"{self._run_id} {following}"}
        self._commits += 1
        properties = CommitProperties(ours, app_transactions=[Transaction(APP_ID, self._commits, now)])
        # Refused, or perhaps written and only the answer was lost: the table tells.
        with contextlib.suppress(CommitFailedError):
            self._table.create_write_transaction(
                actions, mode="append", schema=self._schema, commit_properties=properties
            )
        self._table.update_incremental()
        last = self._table.history(1)[0]
        if self.version != following or last.get("bdnet_commit") != ours["bdnet_commit"]:
            raise OSError(
                f"another audit has written to {self._uri} since this one began; what this one had committed"
                " stays. Run the same command again when no other runs"
            )
        self._committed_at = time.monotonic()
