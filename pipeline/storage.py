"""The one opener of storage: local folders, ``s3://`` and any other fsspec URI.

Credentials come from the environment (``AWS_*``) or the machine's role, never from settings, so that
they appear in no file that bdnet writes.
"""

import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import fsspec
import fsspec.asyn
from fsspec import AbstractFileSystem


def normalize(uri: str | os.PathLike[str]) -> str:
    """Return ``uri`` without a trailing slash; a local path becomes absolute, ``file://`` becomes a path."""
    text = os.fspath(uri)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if is_local(text):
        return str(Path(text).expanduser().resolve())
    return text.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a path on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


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
    """
    uri = normalize(uri)
    if is_local(uri):
        return fsspec.filesystem("file", auto_mkdir=True), uri
    protocol = urlsplit(uri).scheme
    try:
        options = {"use_listings_cache": False} if protocol == "s3" else {}
        fs = fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri}: {error}. Use a local folder, s3://… or install it.") from error
    return fs, fs._strip_protocol(uri)


def read_bytes(uri: str) -> bytes:
    """Read a whole object. Raises FileNotFoundError or PermissionError as the file system does."""
    fs, path = filesystem(uri)
    return fs.cat_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object; a local file appears at once or not at all, as an object does on S3."""
    fs, path = filesystem(uri)
    if is_local(uri):
        partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        fs.pipe_file(path, data)


def exists(uri: str) -> bool:
    """Whether a file, or a folder with anything in it, lies at ``uri``."""
    fs, path = filesystem(uri)
    return fs.exists(path)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of the files below ``uri`` that end in ``suffix``, sorted; empty where there is no such folder.

    For folders that bdnet wrote itself (shards, listings). Archives are listed by page in ``listing``.
    """
    fs, path = filesystem(uri)
    try:
        found = fs.find(path)
    except FileNotFoundError:
        return []
    names = sorted(name for name in found if name.endswith(suffix))
    return [name if is_local(uri) else fs.unstrip_protocol(name) for name in names]


def delta_options(uri: str) -> dict[str, str]:
    """Storage options for ``deltalake``, which reads other names than s3fs does for the same facts."""
    if not uri.startswith("s3://"):
        return {}
    options = {
        "AWS_REGION": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
        if endpoint.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
    return options


class ChangedError(OSError):
    """The object is not the version that was asked for."""


def local_etag(status: os.stat_result) -> str:
    """A plain file's version: size and modification time."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def info_etag(info: dict[str, Any]) -> str:
    """An object's version from what its file system says of it: the etag, else size and time."""
    etag = info.get("etag") or info.get("ETag")
    if etag:
        return str(etag).strip('"')
    moment = info.get("mtime") or info.get("created") or info.get("LastModified") or ""
    # Some file systems say it as a datetime of one file and as seconds in a listing.
    return f"{info.get('size')}-{moment.timestamp() if isinstance(moment, datetime) else moment}"


def read_version(uri: str, etag: str) -> bytes:
    """Read one version of an object.

    Raises:
        ChangedError: the object has another etag by now. On S3 it is the server that compares (If-Match) and
            the refusal comes as the file system's OSError.
        OSError: as the file system raises it.
    """
    if is_local(uri):
        path = unquote_to_bytes(uri[len("file://") :]) if uri.startswith("file://") else os.fsencode(uri)
        with open(path, "rb") as file:
            if local_etag(os.fstat(file.fileno())) != etag:
                raise ChangedError(f"{uri} changed after it was listed")
            return file.read()
    fs, path_in_fs = filesystem(uri)
    if uri.startswith("s3://"):
        return fsspec.asyn.sync(fs.loop, _read_s3_version, fs, path_in_fs, etag)
    data = fs.cat_file(path_in_fs)
    if info_etag(fs.info(path_in_fs)) != etag:
        raise ChangedError(f"{uri} changed after it was listed")
    return data


async def _read_s3_version(fs: AbstractFileSystem, path: str, etag: str) -> bytes:
    bucket, _, key = path.partition("/")
    response = await fs._call_s3("get_object", Bucket=bucket, Key=key, IfMatch=f'"{etag}"')
    async with response["Body"] as body:
        return await body.read()
