"""What ``benchmarks.chaos`` finds in the end; reads listing, rows and shards without the code under test."""

import io
import tarfile
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from deltalake import DeltaTable
from PIL import Image
from s3fs import S3FileSystem

from benchmarks.chaos_world import ARCHIVE, OUT, Archive


def verdict(archive: Archive, result: dict[str, Any], waiting: int) -> dict[str, int]:
    """What is wrong after the last run; all zero when each photo version has its one row and mask.

    Reads the listing, the rows and the tar shards anew, and none of it with the code under test.
    """
    bucket, prefix = ARCHIVE.split("/", 1)
    listed = set()
    token: dict[str, str] = {}
    while True:
        page = archive.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", **token)
        listed |= {(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"')) for item in page["Contents"]}
        if not page["IsTruncated"]:
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}
    rows = table_rows(archive)
    keys = Counter((row["uri"], row["etag"]) for row in rows)
    tars: dict[str, dict[str, bytes]] = {}
    masks = Counter[str]()
    for row in rows:
        if row["status"] != "ok":
            masks["not ok"] += 1
            continue
        try:
            with Image.open(io.BytesIO(row["mask"])) as mask:
                masks["no mask"] += (mask.width, mask.height) != (row["mask_width"], row["mask_height"])
        except (TypeError, OSError):
            masks["no mask"] += 1
        tar, _, member = (row["mask_shard"] or "").partition("/")
        if tar not in tars:
            tars[tar] = _members(archive.fs, f"{OUT}/masks/{tar}")
        masks["not in its shard"] += tars[tar].get(member) != row["mask"]
    return {
        "listed_wrong": len(listed ^ set(archive.now.items())),
        "lost": len((listed | archive.committed.keys()) - keys.keys()),
        "doubled": sum(keys.values()) - len(keys),
        "never_there": len(keys.keys() - archive.ever),
        "not_ok": masks["not ok"],
        "without_mask": masks["no mask"],
        "not_in_mask_shard": masks["not in its shard"],
        # A row that was staged and never committed, if it were read, would not be audited again.
        "uncommitted_read": abs(waiting - result["photos"]),
    }


def table_rows(archive: Archive) -> list[dict[str, Any]]:
    """All rows of the table's present version, of all audit digests (there is but one)."""
    options = dict(archive.environment) | {"AWS_ALLOW_HTTP": "true"}
    options = {name: value for name, value in options.items() if name.startswith("AWS_")}
    columns = ["uri", "etag", "audit_digest", "status", "mask", "mask_width", "mask_height", "mask_shard"]
    rows: list[dict[str, Any]] = []
    for uri in DeltaTable(f"s3://{archive.log.path}", storage_options=options).file_uris():
        rows += pq.read_table(io.BytesIO(archive.fs.cat_file(uri)), columns=columns).to_pylist()
    assert len({row["audit_digest"] for row in rows}) == 1
    return rows


def _members(fs: S3FileSystem, path: str) -> dict[str, bytes]:
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
