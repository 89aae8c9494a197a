"""The snapshot of photo versions that a run sees, by pages, into Parquet shards: driver memory stays flat."""

import contextlib
import errno
import hashlib
import html
import io
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote_from_bytes

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.ftp import FTPFileSystem

from pipeline import inventory, storage
from pipeline.progress import Progress
from pipeline.schema import LISTING
from pipeline.storage_errors import classify, explained, is_ours, patiently

_PHOTO_TYPES = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "tif",
    "tiff",
    "gif",
    "bmp",
    "heic",
    "heif",
    "avif",
)
PHOTO_SUFFIXES = frozenset(f".{name}" for name in _PHOTO_TYPES)
ROWS_PER_SHARD = 50_000
# So many suffixes are counted by name; frame.0000001 and the like are the others.
COUNTED_SUFFIXES = 50
OTHERS = "(other)"
LINKED_FOLDER = "(linked folder)"
# Of what a manifest's reader remembers in memory.
SEEN_CACHE_KIB = 64 << 10


@dataclass(frozen=True)
class Listing:
    """What a listing found. ``complete`` is False when a limit ended it early."""

    shards: tuple[str, ...]
    photos: int
    skipped_by_suffix: dict[str, int]
    complete: bool


def write_listing(source: str, folder: str, limit: int | None = None) -> Listing:
    """List the photos under ``source`` into Parquet shards of ``schema.LISTING`` in ``folder``.

    ``source`` is a folder, a prefix, a ``.parquet`` manifest with those columns, or the ``manifest.json`` of
    an S3 Inventory. What isn't a photo by its suffix is counted by suffix; links to folders are counted too.

    Raises:
        ValueError: there is nothing under ``source``, or a manifest is not as it should be.
        OSError: storage refuses; the shards in ``folder`` are no listing then.
    """
    shards: list[str] = []
    skipped: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    photos, complete = 0, True
    entries = Progress("listed files", None)

    def flush() -> None:
        uri = storage.join(folder, f"part-{len(shards):05d}.parquet")
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=LISTING), buffer, compression="zstd")
        storage.write_bytes(uri, buffer.getvalue())
        shards.append(uri)
        rows.clear()

    for entry in _entries(source):
        entries.add(1)
        if not _is_photo(entry["uri"]):
            name = LINKED_FOLDER if entry["uri"].endswith("/") else _counted(_suffix(entry["uri"]))
            skipped[name if name in skipped or len(skipped) < COUNTED_SUFFIXES else OTHERS] += 1
            continue
        if photos == limit:
            complete = False
            break
        rows.append(entry)
        photos += 1
        if len(rows) == ROWS_PER_SHARD:
            flush()
    entries.close()
    if not entries.done:
        raise ValueError(f"nothing is at {source}; check the path or prefix")
    if rows or not shards:
        flush()
    return Listing(tuple(shards), photos, dict(skipped), complete)


def read_listing(shard: str, columns: list[str] | None = None) -> pa.Table:
    """Read one shard of a listing, or some of its columns."""
    return pq.read_table(io.BytesIO(storage.read_bytes(shard)), schema=LISTING, columns=columns)


def is_manifest(source: str) -> bool:
    """Whether a SOURCE is a list of photos, by its name: a Parquet manifest or that of an S3 Inventory."""
    return source.endswith((".parquet", "/manifest.json"))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_photo(name: str) -> bool:
    return _suffix(name) in PHOTO_SUFFIXES


def _counted(suffix: str) -> str:
    """The suffix itself, where it may be one: names are untrusted."""
    if not suffix:
        return "(none)"
    return suffix if len(suffix) <= 8 and suffix[1:].isascii() and suffix[1:].isalnum() else OTHERS


def _entries(source: str) -> Iterator[dict[str, Any]]:
    try:
        yield from _entries_of(source)
    except Exception as error:
        if isinstance(error, OSError) or is_ours(error):
            raise
        raise explained(error, source) from error  # a file system's own kind of error


def _entries_of(source: str) -> Iterator[dict[str, Any]]:
    if is_manifest(source):
        read = _manifest_entries if source.endswith(".parquet") else inventory.entries
        return _once(read(source))
    if storage.is_local(source):
        return _local_entries(source)
    if source.startswith("s3://"):
        return _s3_entries(*storage.filesystem(source))
    return _fsspec_entries(source)


def _once(entries: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each photo version once, however often a manifest lists it; what was seen lies on disk.

    Raises:
        OSError: the disk for temporary files takes no more.
    """
    in_a_temporary_file = ""
    connection = sqlite3.connect(in_a_temporary_file, isolation_level=None)
    with _disk_errors_explained(), contextlib.closing(connection) as seen:
        seen.execute("PRAGMA journal_mode = OFF")
        seen.execute(f"PRAGMA cache_size = -{SEEN_CACHE_KIB}")
        seen.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        seen.execute("BEGIN")
        for entry in entries:
            key = hashlib.blake2b(f"{entry['uri']}\0{entry['etag']}".encode(), digest_size=16).digest()
            if seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount:
                yield entry


@contextlib.contextmanager
def _disk_errors_explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(
            f"what a manifest has listed can't be noted in a temporary file, 25 bytes a photo ({error}); free"
            " some disk, or set SQLITE_TMPDIR to a folder with room"
        ) from error


def _manifest_entries(source: str) -> Iterator[dict[str, Any]]:
    fs, path = storage.filesystem(source)
    with patiently(lambda: fs.open(path, "rb"), source) as file:
        manifest = pq.ParquetFile(file)
        _check_columns(source, manifest.schema_arrow)
        for batch in manifest.iter_batches(columns=LISTING.names):
            moments = _moments_of(batch["modified_at"])
            rows = batch.drop_columns("modified_at").to_pylist()
            for row, row["modified_at"] in zip(rows, moments, strict=True):
                if row["uri"] is None or row["etag"] is None or row["size_bytes"] is None:
                    raise ValueError(
                        f"{source}: a row lacks uri, etag or size_bytes ({row['uri']}); fill it in"
                    )
                if not 0 <= row["size_bytes"] < 2**63:
                    raise ValueError(f"{source}: size_bytes of {row['uri']} is no size; correct it")
                if not row["etag"].isprintable():
                    raise ValueError(
                        f"{source}: the etag of {row['uri']} is none ({row['etag']!r}); correct it"
                    )
                try:
                    row["uri"] = storage.normalize_file(row["uri"])
                except ValueError as error:
                    raise ValueError(f"{source}: {error}") from error
                yield {**row, "etag": row["etag"].strip('"')}


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


# A manifest's columns, those of ``schema.LISTING``: what their types may be, in code and in words.
_MANIFEST_COLUMNS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    **dict.fromkeys(("uri", "etag"), (_is_text, "a string")),
    "size_bytes": (pa.types.is_integer, "an integer"),
    "modified_at": (lambda type_: pa.types.is_timestamp(type_) or pa.types.is_null(type_), "a timestamp"),
}


def _check_columns(source: str, schema: pa.Schema) -> None:
    for name, (is_right, kind) in _MANIFEST_COLUMNS.items():
        if name not in schema.names:
            raise ValueError(f"{source}: column {name} is missing; needed: {', '.join(_MANIFEST_COLUMNS)}")
        found = schema.field(name).type
        values = found.value_type if pa.types.is_dictionary(found) else found
        if not is_right(values):
            raise ValueError(f"{source}: column {name} is {found}; make it {kind}")


def _local_entries(source: str) -> Iterator[dict[str, Any]]:
    """Regular files below a folder. Links to folders are told, not entered: a loop can't trap the walk."""
    if not os.path.isdir(source):
        raise ValueError(
            f"{source} is no folder, nor a .parquet manifest or the manifest.json of an S3 Inventory"
        )
    folders = [source]  # not os.walk, which calls itself for each level: a thousand of them end it
    while folders:
        folder = folders.pop()
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue  # gone since the folder above was read
        inside = []
        for path in (os.path.join(folder, name) for name in names):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # a dangling link, or gone since its folder was read
            except OSError as error:
                if not os.path.islink(path):
                    raise
                if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                    continue  # it leads to itself, or nowhere
                if not isinstance(error, PermissionError):
                    raise
                # What it leads to isn't gone: reading this version of it is denied, and any other is new.
                status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) or (stat.S_ISLNK(status.st_mode) and _is_photo(path)):
                yield {
                    "uri": local_uri(path),
                    "etag": storage.local_etag(status),
                    "size_bytes": status.st_size,
                    "modified_at": _moment(status.st_mtime),
                }
            elif stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode):
                if os.path.islink(path):
                    yield {"uri": local_uri(path) + "/"}
                else:
                    inside.append(path)
        folders += reversed(inside)


def _moments_of(column: pa.Array) -> Iterator[datetime | None]:
    """A manifest's times; None for those that no calendar has."""
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    for moment in column:
        try:
            yield moment.as_py()
        except (ValueError, OverflowError):
            yield None


def _moment(seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # beyond the year 9999; the etag tells versions apart
        return None


def local_uri(path: str) -> str:
    """The path itself; a name that is no UTF-8 becomes a ``file://`` URI with its bytes percent-encoded."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(path))
    return path


def _s3_entries(fs: AbstractFileSystem, path: str) -> Iterator[dict[str, Any]]:
    bucket, prefix = storage.split_bucket(path)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    token: dict[str, str] = {}

    def next_page() -> dict[str, Any]:
        # The bound is of the whole answer: one that trickles is never silent.
        within = {"timeout": storage.CALL_SECONDS}
        return fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **token, **within)

    while True:
        page = patiently(next_page, f"s3://{path}")
        for item in page.get("Contents", []):
            # Some writers leave an empty key for a folder.
            if not item["Key"].endswith("/"):
                yield {
                    "uri": f"s3://{bucket}/{item['Key']}",
                    "etag": _etag_of(bucket, item),
                    "size_bytes": item["Size"],
                    "modified_at": item["LastModified"],
                }
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _etag_of(bucket: str, item: dict[str, Any]) -> str:
    if "ETag" not in item:
        raise ValueError(
            f"s3://{bucket}/{item['Key']}: its server tells no etag, so a changed photo would never be seen;"
            " copy the archive, or mount it"
        )
    return item["ETag"].strip('"')


def _fsspec_entries(source: str) -> Iterator[dict[str, Any]]:
    """Files below ``source``, by folders. ``fs.walk`` leaves out what can't be listed, as if it were gone."""
    fs, path = storage.filesystem(source)
    uri_of = storage.uri_maker(source)
    is_web = source.startswith(("http://", "https://"))
    folders = [path]
    while folders:
        folder = folders.pop()
        page = partial(_page, fs, folder)
        try:
            found = patiently(page, uri_of(folder))
        except FileNotFoundError:
            continue  # gone since the folder above was read
        if is_web:  # a page writes & in another way
            found = [info | {"name": html.unescape(info["name"])} for info in found]
        for info in sorted(found, key=lambda info: str(info["name"])):
            if is_web and _leads_away(folder, info["name"]):
                continue
            if info["type"] == "directory":
                if info["name"].rstrip("/") != folder.rstrip("/"):
                    folders.append(info["name"])
            elif not _is_photo(info["name"]):
                yield {"uri": uri_of(info["name"])}
            else:
                if not storage.tells_versions(info):
                    try:
                        info = _info(fs, info["name"])
                    except FileNotFoundError:
                        continue  # a dead link, or gone since its folder was read
                    except OSError as error:
                        if classify(error) != "denied":
                            raise
                        # One of many: reading will be denied too, and what may be read some day is new.
                        info |= {"etag": "unknown"}
                yield {
                    "uri": uri_of(info["name"]),
                    "etag": storage.info_etag(info),
                    "size_bytes": info.get("size") or 0,
                    "modified_at": None,
                }


def _page(fs: AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = storage.within(storage.LONG_CALL_SECONDS, fs, "ls", folder, detail=True)
    if not found and isinstance(fs, FTPFileSystem):
        # It calls a folder empty that the server doesn't list; this says why.
        fs.ftp.dir(folder, lambda line: None)
    return found


def _leads_away(folder: str, name: str) -> bool:
    """Whether a link on a web server's page is no file or folder right below: a parent, a way to sort."""
    segment = name.removeprefix(folder.rstrip("/") + "/").rstrip("/")
    return segment in ("", ".", "..") or not set("/?#").isdisjoint(segment)


def _info(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    """What a file system says of one file, where its listing doesn't tell versions (HTTP)."""
    uri = fs.unstrip_protocol(path)
    info = patiently(partial(storage.info, fs, path), uri)
    if not storage.tells_versions(info):
        raise ValueError(
            f"{uri}: its server tells no etag and no time of change, so a changed photo would never be seen;"
            " copy the archive, or mount it"
        )
    return info
