"""Delta tables: open, read with SQL. Writing is the ledger's."""

from collections.abc import Iterator

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder, Schema
from deltalake.exceptions import TableNotFoundError

from pipeline import storage

SKIPPED_BY = ("uri", "audit_digest")
# The engine answers in batches as small as the table's files; so many rows are handed over together.
ROWS_AT_ONCE = 50_000


def open_table(uri: str, schema: pa.Schema) -> DeltaTable:
    """Open the Delta table at ``uri`` to append to it, created empty where there is none.

    Raises:
        ValueError: its columns are others. Files that are added to a log aren't checked against them: what
            the table has no column for would be lost in silence.
    """
    options = storage.delta_options(uri)
    try:
        table = DeltaTable(uri, storage_options=options)
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
    if differ := _columns(table.schema()) ^ _columns(Schema.from_arrow(schema)):
        names = ", ".join(sorted({name for name, _ in differ}))
        raise ValueError(
            f"the table {uri} was not made by this version of bdnet: its columns differ in {names}. Give"
            " another --out"
        )
    return table


def _columns(schema: Schema) -> set[tuple[str, str]]:
    return {(field.name, str(field.type)) for field in schema.fields}


def read_table(uri: str, version: int | None = None) -> DeltaTable | None:
    """The Delta table at ``uri`` with its log, which may take a second to read; None where none was begun.

    Raises:
        OSError: it can't be read.
    """
    try:
        return DeltaTable(uri, version, storage.delta_options(uri))
    except TableNotFoundError:
        return None
    except Exception as error:  # The engine raises bare Exception for a file that it can't read.
        raise OSError(f"cannot read the table {uri}: {error}") from error


def scan(table: DeltaTable | None, sql: str) -> Iterator[pa.Table]:
    """Stream what ``sql`` finds in a Delta table, called ``delta``; nothing without a table.

    Raises:
        OSError: the table has lost a file or can't be read.
    """
    if table is None:
        return
    # Filters are pushed into the Parquet scan, so that wide columns are read for matching rows only.
    builder = QueryBuilder({"datafusion.execution.parquet.pushdown_filters": "true"})
    batches: list[pa.RecordBatch] = []
    try:
        found = pa.RecordBatchReader.from_stream(builder.register("delta", table).execute(sql))
        for batch in found:
            batches.append(batch)
            if sum(map(len, batches)) >= ROWS_AT_ONCE:
                yield pa.Table.from_batches(batches)
                batches = []
    except Exception as error:  # as above
        raise OSError(f"cannot read the table {table.table_uri}: {error}") from error
    if batches:
        yield pa.Table.from_batches(batches)


def query(table: DeltaTable | None, sql: str, schema: pa.Schema) -> pa.Table:
    """All that ``sql`` finds in a Delta table, called ``delta``, in memory; no rows without a table.

    Raises:
        OSError: the table has lost a file or can't be read.
    """
    # The engine answers with string views, which joins don't take.
    return pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in scan(table, sql))])


def quoted(text: str) -> str:
    """``text`` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
