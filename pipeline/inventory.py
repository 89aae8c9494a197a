"""The photo versions that an S3 Inventory lists: its manifest.json and the Parquet or CSV files in it."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus

import pyarrow.parquet as pq

from pipeline import storage

_NEEDED = ("bucket", "key", "size", "etag")
# What plain, cut or foreign files make of gzip, csv and Parquet; a row's value may be null.
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OSError, EOFError, zlib.error, csv.Error)


def entries(manifest: str) -> Iterator[dict[str, Any]]:
    """Yield the latest version of each object as ``schema.LISTING``; memory holds one inventory file.

    Raises:
        ValueError: the manifest is no S3 Inventory's, or the inventory lacks a field.
    """
    content = storage.read_bytes(manifest)
    try:
        content = json.loads(content)
        bucket, kind = content["destinationBucket"].rpartition(":")[2], content["fileFormat"]
        files = [f"s3://{bucket}/{file['key']}" for file in content["files"]]
        fields = [_plain(name) for name in content["fileSchema"].split(",")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{manifest} is not the manifest of an S3 Inventory ({error!r}); "
            "give the manifest.json of one of its days"
        ) from error
    if kind not in ("Parquet", "CSV"):
        raise ValueError(f"{manifest}: the inventory is in {kind}; have it written in Parquet or CSV")
    for uri in files:
        data = storage.read_bytes(uri)
        try:
            for row in _parquet_rows(data) if kind == "Parquet" else _csv_rows(data, fields):
                if (entry := _entry(row)) is not None:
                    yield entry
        except _DAMAGED as error:
            raise ValueError(
                f"{uri} is not as an S3 Inventory should be ({error}); correct it, or give another day's"
            ) from error


def _entry(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of ``schema.LISTING``; None where there is no object any more."""
    missing = [name for name in _NEEDED if name not in row]
    if missing:
        raise ValueError(f"no {missing[0]}; add it to the optional fields of the inventory")
    gone = row.get("isdeletemarker") in (True, "true") or row.get("islatest") in (False, "false")
    # Some writers leave an empty key for a folder.
    if gone or row["key"].endswith("/"):
        return None
    if not 0 <= (size := int(row["size"])) < 2**63:
        raise ValueError(f"{row['key']!r} has a size of {size}")
    moment = row.get("lastmodifieddate")
    return {
        "uri": f"s3://{row['bucket']}/{row['key']}",
        "etag": row["etag"].strip('"'),
        "size_bytes": size,
        "modified_at": datetime.fromisoformat(moment) if isinstance(moment, str) else moment,
    }


def _parquet_rows(data: bytes) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches():
        for row in batch.to_pylist():
            yield {_plain(name): value for name, value in row.items()}


def _csv_rows(data: bytes, fields: list[str]) -> Iterator[dict[str, Any]]:
    with gzip.open(io.BytesIO(data), "rt", encoding="utf-8", newline="") as lines:
        for values in csv.reader(lines):
            row = dict(zip(fields, values, strict=True))
            # Keys are percent-encoded in CSV alone.
            yield {**row, "key": unquote_plus(row["key"])}


def _plain(name: str) -> str:
    """``last_modified_date`` of Parquet and ``LastModifiedDate`` of CSV are the same field."""
    return name.strip().replace("_", "").lower()
