"""Delta tables: open, read with SQL. Writing is the ledger's."""

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder, Schema
from deltalake.exceptions import TableNotFoundError

from pipeline import storage

SKIPPED_BY = ("uri", "audit_digest")


def open_table(uri: str, schema: pa.Schema) -> DeltaTable:
    """Open the Delta table at ``uri`` to append to it, created empty where there is none."""
    options = storage.delta_options(uri)
    try:
        return DeltaTable(uri, storage_options=options)
    except TableNotFoundError:
        # What readers skip files by; by default it is the first 32 columns, masks among them.
        skipped_by = ",".join(name for name in SKIPPED_BY if name in schema.names)
        return DeltaTable.create(
            uri,
            Schema.from_arrow(schema),
            mode="ignore",
            configuration={"delta.dataSkippingStatsColumns": skipped_by},
            storage_options=options,
        )


def scan(uri: str, sql: str, version: int | None = None) -> pa.RecordBatchReader:
    """Stream what ``sql`` finds in the Delta table at ``uri``, which it calls ``delta``.

    Raises:
        TableNotFoundError: no table was begun there.
    """
    # Filters are pushed into the Parquet scan, so that wide columns are read for matching rows only.
    builder = QueryBuilder({"datafusion.execution.parquet.pushdown_filters": "true"})
    table = DeltaTable(uri, version, storage.delta_options(uri))
    return pa.RecordBatchReader.from_stream(builder.register("delta", table).execute(sql))


def query(uri: str, sql: str, schema: pa.Schema) -> pa.Table:
    """All that ``sql`` finds in the Delta table at ``uri``; no rows where no table was begun.

    Raises:
        OSError: the table has lost a file or can't be read.
    """
    try:
        found = scan(uri, sql).read_all()
    except TableNotFoundError:
        return schema.empty_table()
    except Exception as error:  # The engine raises bare Exception for a file that it can't read.
        raise OSError(f"cannot read the table {uri}: {error}") from error
    return found.cast(schema)  # The engine answers with string views, which joins don't take.


def quoted(text: str) -> str:
    """``text`` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
