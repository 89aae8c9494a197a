"""The one opener of storage: local folders, ``s3://`` and any other fsspec URI.

Credentials come from the environment (``AWS_*``) or the machine's role, never from settings, so that
they appear in no file that bdnet writes.
"""

import asyncio
import contextlib
import functools
import os
import re
import stat
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import fsspec
import fsspec.asyn
from fsspec import AbstractFileSystem

from pipeline.storage_errors import SECRET_PARAMETER, ChangedError, error_code, patiently

# Every wait has a bound. A request: CONNECT_SECONDS for the connection, then SILENCE_SECONDS without a byte.
CONNECT_SECONDS = 5
SILENCE_SECONDS = 15
# botocore makes 2 such tries (its jittered wait is under 1 s) and s3fs 2 of those: 83 s, so CALL_SECONDS ends
# what trickles. ``patiently`` begins no new call after 60 s, so an answer or an error takes
# 60 + 8 + CALL_SECONDS = 188 s at the most, where servers that don't listen or are unknown take seconds.
CALL_SECONDS = 120
# A body may take BODY_SECONDS and its size at this speed besides: 5 MB 130 s, a body of a byte a second 30 s.
BODY_SECONDS = 30
SLOWEST_BYTES_PER_SECOND = 50_000
# Of the largest too: a run without news ends after half an hour (``stream.STALL_ENDS_SECONDS``).
LONGEST_BODY_SECONDS = 900
_PIECE_BYTES = 2**20
# Other file systems than S3 don't tell the size before the bytes, and a listing of folders has many pages.
LONG_CALL_SECONDS = 600

_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": SILENCE_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": 2},
        # More than any process has threads: one that waits for its bytes must not keep the others waiting.
        "max_pool_connections": 64,
    },
}
# s3fs's own tries: the second is for a body that breaks off, which botocore does not read.
_S3FS_TRIES = 2

_FILE_URI = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL)
_ETAGS = ("etag", "ETag")
# What file systems call the moment when an object was last written; the last three are FTP, WebHDFS and HTTP.
_MOMENTS = ("mtime", "created", "LastModified", "modify", "modificationTime", "Last-Modified")
_ALIASES = {"s3a": "s3", "gcs": "gs"}
# A password before the host; a colon may also begin a port, and stands in the ARN of an access point.
_PASSWORD = re.compile(r"://(?!arn:)[^/@\[]*:(?!\d{1,5}(?:/|$))")
# What stands before a web server's name is a token.
_WEB_USER = re.compile(r"\bhttps?://[^/]*@", re.IGNORECASE)
_ACCESS_POINT = re.compile(r"arn:[^/]*[:/]accesspoint/[^/]+")
_S3_USER = re.compile(r"\b(?:s3a?|gc?s)://[^/]*@")
_CREDENTIALS = (_PASSWORD, _WEB_USER, _S3_USER)


def normalize(uri: str | os.PathLike[str]) -> str:
    """Return ``uri`` without a trailing slash; a local path or ``file:`` URI becomes an absolute path.

    A scheme has one name, whatever was written: s3 for s3a, gs for gcs.

    Raises:
        ValueError: the URI is empty or a scheme alone, or holds credentials, which would be seen in the list
            of processes, or is a ``file:`` URI of another machine.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise ValueError("a path or URI is empty; is a variable of the command not set?")
    if is_local(text):
        try:
            return str(Path(local_path(text)).expanduser().resolve())
        except RuntimeError as error:  # no such user, or a loop of links
            raise ValueError(f"{text}: {error}") from error
    _refuse_credentials(text, *_CREDENTIALS, SECRET_PARAMETER)
    scheme, _, rest = text.partition("://")
    if not (rest := rest.rstrip("/")):
        raise ValueError(f"{text} names no bucket or host; is a variable of the command not set?")
    return f"{_one_name(scheme)}://{rest}"


def _one_name(scheme: str) -> str:
    return _ALIASES.get(scheme.lower(), scheme.lower())


def _refuse_credentials(uri: str, *patterns: re.Pattern[str]) -> None:
    if any(pattern.search(uri) for pattern in patterns):
        raise ValueError(
            f"a {uri.partition(':')[0]}:// URI holds credentials, which others would see; take them out and"
            " give them in the environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def normalize_file(uri: str) -> str:
    """Return the URI of one file among millions, with its scheme's one name; no file system is asked.

    Raises:
        ValueError: no process could open it, or each another file: a relative path, a ``file:`` URI of
            another machine, a NUL, a file system that is unknown or not installed; or it holds credentials.
    """
    if "\0" in uri:
        raise ValueError(f"{uri!r} holds a NUL; correct it")
    if is_local(uri):
        if not os.path.isabs(local_path(uri)):
            raise ValueError(f"{uri} is a relative path; write the whole path, or a URI")
        return uri
    scheme, _, rest = uri.partition("://")
    known = _known_scheme(scheme)
    # An object may be named as it likes; what follows a host may be a signature.
    _refuse_credentials(uri, *_CREDENTIALS, *([] if known in ("s3", "gs") else [SECRET_PARAMETER]))
    return f"{known}://{rest}"


@functools.cache
def _known_scheme(scheme: str) -> str:
    name = _one_name(scheme)
    _file_system_class(f"{name}://")
    return name


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a path on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path that a ``file:`` URI names (RFC 8089), percent-decoded; any other local ``uri`` is its path.

    Raises:
        ValueError: the URI names another machine, or no absolute path.
    """
    if not uri.startswith(("file://", "file:/")):
        return uri
    found = _FILE_URI.fullmatch(uri)
    if found is None:
        raise ValueError(
            f"{uri} is no file of this machine; write file:/// and an absolute path, or the path"
        )
    return os.fsdecode(unquote_to_bytes(found[1]))


def join(uri: str, *parts: str) -> str:
    """Append path ``parts`` to ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


def is_inside(inner: str, outer: str) -> bool:
    """Whether ``inner`` is ``outer`` or lies below it."""
    return join(normalize(inner), "").startswith(join(normalize(outer), ""))


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Open the file system of ``uri`` and return it with the path inside it.

    Instances are cached per process by fsspec; listings are not, so a photo written a moment ago is seen.

    Raises:
        ValueError: the protocol of the URI is unknown or its package is missing.
        OSError: a server that is asked for a connection refuses it.
    """
    if is_local(uri):
        return fsspec.filesystem("file", auto_mkdir=True), normalize(uri)
    create = _file_system_class(uri)
    if uri.startswith("s3://"):
        fs = create(**_S3_OPTIONS)
        fs.retries = _S3FS_TRIES
        return fs, fs._strip_protocol(uri.rstrip("/"))

    def opened() -> tuple[AbstractFileSystem, str]:
        fs = create(**_server(uri))
        return fs, fs._strip_protocol(uri.rstrip("/"))

    return patiently(opened, uri)  # with a server it may connect at once


def _file_system_class(uri: str) -> type[AbstractFileSystem]:
    try:
        return fsspec.get_filesystem_class(uri.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri}: {error}. Use a local folder, s3://… or install it.") from error


def _server(uri: str) -> dict[str, Any]:
    """What the file system must know of the host in ``uri``; nothing where a bucket or container stands."""
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]
    return _file_system_class(uri)._get_kwargs_from_urls(f"{scheme}://{host}")


def uri_maker(root: str) -> Callable[[str], str]:
    """What makes a URI of the name that the file system of ``root`` gives to a file below it.

    A file system with a server leaves the host out of its names, so the URI begins with ``root`` itself.
    """
    fs, inside = filesystem(root)
    if not _server(root):
        return fs.unstrip_protocol

    def uri_of(name: str) -> str:
        assert name.startswith(inside), (name, inside)
        return join(root, name[len(inside.rstrip("/")) :].removeprefix("/"))

    return uri_of


def split_bucket(path: str) -> tuple[str, str]:
    """The bucket and the key of a path on S3; the ARN of an access point holds a slash of its own."""
    access_point = _ACCESS_POINT.match(path)
    bucket = access_point[0] if access_point else path.partition("/")[0]
    return bucket, path[len(bucket) :].removeprefix("/")


def within(seconds: float, fs: AbstractFileSystem, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of ``fs``; where that can be stopped, it ends after ``seconds`` as TimeoutError."""
    if fs.async_impl:
        call = getattr(fs, f"_{method}")
        return fsspec.asyn.sync(fs.loop, call, *arguments, timeout=seconds, **options)
    return getattr(fs, method)(*arguments, **options)


def info(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    """What ``fs`` says of one file; FileNotFoundError where there is none, and for nothing else."""
    try:
        found: dict[str, Any] = within(CALL_SECONDS, fs, "info", path)
        return found
    except FileNotFoundError as error:
        # Of a web server fsspec calls every failure so.
        if error.__cause__ is None or error_code(error) in ("404", "410"):
            raise
        raise error.__cause__ from None


def read_bytes(uri: str) -> bytes:
    """Read a whole object, again with backoff where that can help.

    Raises:
        OSError: what storage says; FileNotFoundError or PermissionError where it says that.
    """
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):
        return patiently(lambda: fsspec.asyn.sync(fs.loop, _read_s3, fs, path), uri)
    return patiently(lambda: within(LONG_CALL_SECONDS, fs, "cat_file", path), uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object; a local file appears at once or not at all, as an object does on S3.

    Raises:
        OSError: what storage says, after attempts where they can help.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a file that lost power may have its name and be empty
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        seconds = CALL_SECONDS + len(data) / SLOWEST_BYTES_PER_SECOND
        patiently(lambda: within(seconds, fs, "pipe_file", path, data), uri)


def remove(uri: str) -> None:
    """Remove a file; one that is gone already is no error."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: within(CALL_SECONDS, fs, "rm_file", path), uri)


def remove_folder(uri: str) -> None:
    """Remove a folder with all that is in it; none is no error."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: within(LONG_CALL_SECONDS, fs, "rm", path, recursive=True), uri)


def exists(uri: str) -> bool:
    """Whether a file, or a folder with anything in it, lies at ``uri``."""
    fs, path = filesystem(uri)
    try:  # fsspec's own exists says no to whatever error a file system that isn't asynchronous raises
        patiently(lambda: within(CALL_SECONDS, fs, "info", path), uri)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of the files below ``uri`` that end in ``suffix``, sorted; empty where there is no such folder.

    For folders that bdnet wrote itself (shards, listings). Archives are listed by page in ``listing``.
    """
    fs, path = filesystem(uri)
    # By default a local folder that can't be read counts as empty.
    strict = {"on_error": _raise_unless_gone} if is_local(uri) else {}
    try:
        found = patiently(lambda: within(LONG_CALL_SECONDS, fs, "find", path, **strict), uri)
    except FileNotFoundError:
        return []
    names = sorted(name for name in found if name.endswith(suffix))
    return names if is_local(uri) else [*map(uri_maker(uri), names)]


def local_etag(status: os.stat_result) -> str:
    """A plain file's version: size and modification time."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def info_etag(info: dict[str, Any]) -> str:
    """An object's version from what its file system says of it: the etag, else size and time."""
    if etag := next((info[name] for name in _ETAGS if info.get(name)), None):
        return str(etag).strip('"')
    moment = next((info[name] for name in _MOMENTS if info.get(name)), "")
    # Some file systems say it as a datetime of one file and as seconds in a listing.
    return f"{info.get('size')}-{moment.timestamp() if isinstance(moment, datetime) else moment}"


def tells_versions(info: dict[str, Any]) -> bool:
    """Whether a file system says enough of an object to tell that it was changed."""
    return any(info.get(name) for name in (*_ETAGS, *_MOMENTS))


def read_version(uri: str, etag: str, most: int | None = None) -> bytes:
    """Read one version of an object, again with backoff where that can help.

    S3 and web servers may send what they like: of theirs, ``most`` bytes are held, without unpacking any.

    Raises:
        ChangedError: the object has another etag by now, or more than ``most`` bytes. On S3 it is the server
            that compares (If-Match) and the refusal comes as an OSError that ``storage_errors.classify``
            calls changed.
        OSError: what storage says.
    """
    if is_local(uri):
        return patiently(lambda: _read_local_version(uri, etag, most), uri)
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):
        return patiently(
            lambda: fsspec.asyn.sync(fs.loop, _read_s3, fs, path, most, IfMatch=f'"{etag}"'), uri
        )
    if uri.startswith(("http://", "https://")):
        read = functools.partial(
            fsspec.asyn.sync, fs.loop, _read_http, fs, path, most, timeout=LONG_CALL_SECONDS
        )
    else:
        read = functools.partial(within, LONG_CALL_SECONDS, fs, "cat_file", path)
    data = patiently(read, uri)
    if info_etag(patiently(lambda: info(fs, path), uri)) != etag:
        raise ChangedError(f"{uri} changed after it was listed")
    _check_size(len(data), most)
    return data


def _check_size(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise ChangedError(f"it has {size:,} bytes or more; {most:,} were listed")


def _read_local_version(uri: str, etag: str, most: int | None) -> bytes:
    # A pipe in a manifest would be waited for as long as nobody writes.
    with open(os.fsencode(local_path(uri)), "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{uri} is no file")
        if local_etag(status) != etag:
            raise ChangedError(f"{uri} changed after it was listed")
        _check_size(status.st_size, most)
        data = file.read(status.st_size)
        # Written to meanwhile, or cut short by a network's file system.
        if len(data) != status.st_size or local_etag(os.fstat(file.fileno())) != etag:
            raise ChangedError(f"{uri} changed while it was read")
        return data


def _open_at_once(path: str | bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


async def _read_s3(fs: AbstractFileSystem, path: str, most: int | None = None, **condition: str) -> bytes:
    """The object's bytes; TimeoutError where they come too slowly for their number."""
    bucket, key = split_bucket(path)
    call = fs._call_s3("get_object", Bucket=bucket, Key=key, **condition)
    response = await asyncio.wait_for(call, CALL_SECONDS)
    async with response["Body"] as body:
        # Where a gateway doesn't tell the size, the largest has its time.
        size = response.get("ContentLength", most or 0)
        _check_size(size, most)
        seconds = min(BODY_SECONDS + size / SLOWEST_BYTES_PER_SECOND, LONGEST_BODY_SECONDS)
        try:
            return await asyncio.wait_for(_read_at_most(most, body.read), seconds)
        except TimeoutError as error:
            raise TimeoutError(
                f"{size:,} bytes were not read in {seconds:.0f} s or stopped coming"
            ) from error


async def _read_http(fs: AbstractFileSystem, url: str, most: int | None) -> bytes:
    """The bytes as they lie on the server: some kilobytes could unpack to more than any memory."""
    session = await fs.set_session()
    headers = fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
    options = fs.kwargs | {"headers": headers, "auto_decompress": False}
    async with session.get(fs.encode_url(url), **options) as answer:
        fs._raise_not_found_for_status(answer, url)
        return await _read_at_most(most, answer.content.read)


async def _read_at_most(most: int | None, read: Callable[[int], Awaitable[bytes]]) -> bytes:
    data = bytearray()
    while piece := await read(_PIECE_BYTES):
        data += piece
        _check_size(len(data), most)
    return bytes(data)


def write_if_unchanged(uri: str, data: bytes, etag: str | None) -> str | None:
    """Write an object of S3 if it still has ``etag``, or if there is none where ``etag`` is None.

    Returns:
        its new etag; None when another writer was faster.
    """
    fs, path = filesystem(uri)
    bucket, key = split_bucket(path)
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    put = {"Bucket": bucket, "Key": key, "Body": data, **condition}
    try:
        answer = patiently(lambda: within(CALL_SECONDS, fs, "call_s3", "put_object", **put), uri)
    except OSError as error:
        code = error_code(error)
        # NoSuchKey: it is gone, which is a change too.
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchKey"):
            return None
        raise
    return answer["ETag"].strip('"')


def read_with_age(uri: str) -> tuple[bytes, str, float]:
    """An object of S3, its etag, and the seconds since it was written, both ends by the server's clock."""
    fs, path = filesystem(uri)
    bucket, key = split_bucket(path)
    return patiently(
        lambda: fsspec.asyn.sync(fs.loop, _read_s3_with_age, fs, bucket, key, timeout=CALL_SECONDS), uri
    )


async def _read_s3_with_age(fs: AbstractFileSystem, bucket: str, key: str) -> tuple[bytes, str, float]:
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    async with answer["Body"] as body:
        data = await body.read()
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return data, answer["ETag"].strip('"'), (now - answer["LastModified"]).total_seconds()
