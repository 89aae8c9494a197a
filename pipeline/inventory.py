"""The photo versions that an S3 Inventory lists: its manifest.json and the Parquet or CSV files in it."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus

import pyarrow.parquet as pq

from pipeline import storage

_NEEDED = ("bucket", "key", "size", "etag")


def entries(manifest: str) -> Iterator[dict[str, Any]]:
    """Yield the latest version of each object as ``schema.LISTING``; memory holds one inventory file.

    Raises:
        ValueError: the manifest is no S3 Inventory's, or the inventory lacks a field.
    """
    content = json.loads(storage.read_bytes(manifest))
    try:
        bucket, kind = content["destinationBucket"].rpartition(":")[2], content["fileFormat"]
        files = [f"s3://{bucket}/{file['key']}" for file in content["files"]]
        fields = [_plain(name) for name in content["fileSchema"].split(",")]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{manifest} is not the manifest of an S3 Inventory ({error!r}); "
            "give the manifest.json of one of its days"
        ) from error
    if kind not in ("Parquet", "CSV"):
        raise ValueError(f"{manifest}: the inventory is in {kind}; have it written in Parquet or CSV")
    for uri in files:
        data = storage.read_bytes(uri)
        for row in _parquet_rows(data) if kind == "Parquet" else _csv_rows(data, fields):
            missing = [name for name in _NEEDED if name not in row]
            if missing:
                raise ValueError(f"{uri}: no {missing[0]}; add it to the optional fields of the inventory")
            gone = row.get("isdeletemarker") in (True, "true") or row.get("islatest") in (False, "false")
            # Some writers leave an empty key for a folder.
            if not gone and not row["key"].endswith("/"):
                moment = row.get("lastmodifieddate")
                yield {
                    "uri": f"s3://{row['bucket']}/{row['key']}",
                    "etag": row["etag"].strip('"'),
                    "size_bytes": int(row["size"]),
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
