"""Delta tables: open, read with SQL. Writing is the ledger's."""

import os
import re
from collections.abc import Iterator

import botocore.session
import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder, Schema
from deltalake.exceptions import TableNotFoundError

from pipeline import storage

SKIPPED_BY = ("uri", "audit_digest")
# The engine answers in batches as small as the table's files; so many rows are handed over together.
ROWS_AT_ONCE = 50_000
_AWS_ENDPOINT = re.compile(r"https://s3(\.[a-z0-9-]+)?\.amazonaws\.com(\.cn)?")


def open_table(uri: str, schema: pa.Schema) -> DeltaTable:
    """Open the Delta table at ``uri`` to append to it, created empty where there is none.

    Raises:
        ValueError: its columns are others. Files that are added to a log aren't checked against them: what
            the table has no column for would be lost in silence.
    """
    options = storage_options(uri)
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
        return DeltaTable(uri, version, storage_options(uri))
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


def storage_options(uri: str) -> dict[str, str]:
    """Storage options for ``deltalake``, which reads other names than s3fs does for the same facts."""
    if not uri.startswith("s3://"):
        return {}
    options = {
        "AWS_REGION": os.environ.get("AWS_REGION") or _profile_region() or "us-east-1",
        # Of one request, body and all; the last of the tries begins within retry_timeout, so one call ends
        # after 120 s at the most.
        "connect_timeout": f"{storage.CONNECT_SECONDS}s",
        "timeout": "60s",
        "retry_timeout": "60s",
        "max_retries": "6",
    }
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint := environment or _profile_endpoint():
        options["AWS_ENDPOINT_URL"] = endpoint
        if endpoint.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
    return options


def _profile_region() -> str | None:
    """The region that s3fs takes: of AWS_DEFAULT_REGION, else of the user's profile."""
    return botocore.session.get_session().get_config_variable("region")


def _profile_endpoint() -> str | None:
    """The server that s3fs takes of the user's profile; None for AWS itself."""
    endpoint: str = botocore.session.get_session().create_client("s3").meta.endpoint_url
    return None if _AWS_ENDPOINT.fullmatch(endpoint) else endpoint


def quoted(text: str) -> str:
    """``text`` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
