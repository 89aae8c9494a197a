"""A photo version's bytes, or the status of why not."""

import os

import pytest
from aiohttp import ClientPayloadError

from pipeline import storage, storage_errors
from pipeline.fetch import Fetched, fetch
from pipeline.listing import local_uri


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photo in the memory file system, and its version; no wait is waited."""
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    uri = f"memory://{tmp_path}/a.jpg"
    storage.write_bytes(uri, b"photo")
    fs, path = storage.filesystem(uri)
    return uri, storage.info_etag(fs.info(path))


def failing(monkeypatch, *errors):
    """Let the file system of the photo fail in turn, then read."""
    fs, _ = storage.filesystem("memory://")
    left, read = list(errors), fs.cat_file

    def cat_file(path):
        if left:
            raise left.pop(0)
        return read(path)

    monkeypatch.setattr(fs, "cat_file", cat_file)


def test_a_photo_version_is_its_bytes(photo):
    assert fetch(*photo) == Fetched(b"photo")


def test_a_changed_photo_whose_name_is_no_utf8_has_a_reason_that_a_table_takes(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(path, "wb") as file:
        file.write(b"photo")
    fetched = fetch(local_uri(os.fsdecode(path)), "other")
    assert fetched.status == "changed"
    assert "caf%E9.jpg" in fetched.error
    fetched.error.encode()


def test_a_photo_that_changed_or_went_is_a_status(photo):
    uri, etag = photo
    assert fetch(uri, "other").status == "changed"
    assert fetch(f"{uri}.gone", etag).status == "missing"


def test_a_fault_that_passes_is_not_seen(photo, monkeypatch):
    failing(monkeypatch, ClientPayloadError("the connection broke"), TimeoutError())
    assert fetch(*photo) == Fetched(b"photo")


# Neither is an OSError: file systems raise what their packages have.
@pytest.mark.parametrize("error", [ClientPayloadError("the connection broke"), KeyError("etag")])
def test_whatever_the_file_system_raises_becomes_a_status(photo, monkeypatch, error):
    failing(monkeypatch, *[error] * storage_errors.ATTEMPTS)
    fetched = fetch(*photo)
    assert (fetched.data, fetched.status) == (None, "timeout")
    assert type(error).__name__ in fetched.error


def test_a_bug_of_ours_is_no_status(photo, monkeypatch):
    uri, _ = photo
    monkeypatch.delattr(storage, "info_etag")
    with pytest.raises(NameError):
        fetch(uri, "etag")


def test_the_reason_is_one_short_line_without_the_uri_and_without_keys(photo, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-distinctive-key-id")
    failing(monkeypatch, PermissionError("no\nfor a-distinctive-key-id " * 100))
    error = fetch(*photo).error
    assert error.startswith("no for … ")
    assert "\n" not in error
    assert len(error) == 500
