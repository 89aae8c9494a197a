"""A photo version's bytes, or the status of why not."""

import gzip
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from aiohttp import ClientPayloadError
from s3fs import S3FileSystem

from pipeline import storage, storage_errors
from pipeline.fetch import Fetched, fetch
from pipeline.listing import local_uri

MOST = 1000


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
    assert fetch(*photo, MOST) == Fetched(b"photo")


def test_memory_that_runs_out_while_a_photo_is_read_is_its_own_affair(photo, monkeypatch):
    def read_version(*arguments):
        raise MemoryError

    monkeypatch.setattr(storage, "read_version", read_version)
    assert fetch(*photo, MOST).status == "timeout"


def test_a_changed_photo_whose_name_is_no_utf8_has_a_reason_that_a_table_takes(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(path, "wb") as file:
        file.write(b"photo")
    fetched = fetch(local_uri(os.fsdecode(path)), "other", MOST)
    assert fetched.status == "changed"
    assert "caf%E9.jpg" in fetched.error
    fetched.error.encode()


def test_a_photo_of_more_bytes_than_were_listed_is_another_version(photo, tmp_path, s3):
    local, remote = tmp_path / "a.jpg", f"s3://photos/fetch/{tmp_path.name}.jpg"
    local.write_bytes(b"photo")
    storage.write_bytes(remote, b"photo")
    s3_fs, s3_path = storage.filesystem(remote)
    for uri, etag in (
        photo,
        (str(local), storage.local_etag(local.stat())),
        (remote, storage.info_etag(s3_fs.info(s3_path))),
    ):
        assert fetch(uri, etag, 5) == Fetched(b"photo")
        fetched = fetch(uri, etag, 4)
        assert (fetched.data, fetched.status) == (None, "changed")
        assert "4 were listed" in fetched.error


def test_a_pipe_in_place_of_a_photo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert fetch(f"{tmp_path}/a.jpg", "any", MOST).status == "missing"


@pytest.fixture
def gateway():
    """What a server of one's own may answer: without a length, or packed; by path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = gzip.compress(bytes(MOST * 100)) if "packed" in self.path else b"photo" * 10
            self.send_response(200)
            self.send_header("ETag", '"e"')
            self.send_header("Transfer-Encoding", "chunked")
            if "packed" in self.path:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("ETag", '"e"')
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server_that_tells_no_size_sends_no_more_than_is_held_and_nothing_is_unpacked(gateway):
    assert fetch(f"{gateway}/a.jpg", "e", 50) == Fetched(b"photo" * 10)
    assert fetch(f"{gateway}/a.jpg", "e", 49).status == "changed"
    packed = fetch(f"{gateway}/packed.jpg", "e", MOST).data
    assert gzip.decompress(packed) == bytes(MOST * 100)


def test_an_s3_gateway_that_tells_no_size_is_read_and_bounded(gateway, monkeypatch):
    for name, value in (("ENDPOINT_URL", gateway), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    S3FileSystem.clear_instance_cache()
    try:
        assert fetch("s3://photos/a.jpg", "e", 50) == Fetched(b"photo" * 10)
        assert fetch("s3://photos/a.jpg", "e", 49).status == "changed"
    finally:
        S3FileSystem.clear_instance_cache()


def test_a_uri_that_its_file_system_cannot_take_apart_is_a_status(monkeypatch):
    monkeypatch.setattr(storage_errors.time, "sleep", lambda seconds: None)
    for uri in ("github://a@b@c/x.jpg", "generic://x"):
        assert fetch(uri, "any", MOST).data is None


def test_a_photo_that_changed_or_went_is_a_status(photo):
    uri, etag = photo
    assert fetch(uri, "other", MOST).status == "changed"
    assert fetch(f"{uri}.gone", etag, MOST).status == "missing"


def test_a_fault_that_passes_is_not_seen(photo, monkeypatch):
    failing(monkeypatch, ClientPayloadError("the connection broke"), TimeoutError())
    assert fetch(*photo, MOST) == Fetched(b"photo")


# Neither is an OSError: file systems raise what their packages have.
@pytest.mark.parametrize("error", [ClientPayloadError("the connection broke"), KeyError("etag")])
def test_whatever_the_file_system_raises_becomes_a_status(photo, monkeypatch, error):
    failing(monkeypatch, *[error] * storage_errors.ATTEMPTS)
    fetched = fetch(*photo, MOST)
    assert (fetched.data, fetched.status) == (None, "timeout")
    assert type(error).__name__ in fetched.error


def test_a_bug_of_ours_is_no_status(photo, monkeypatch):
    uri, _ = photo
    monkeypatch.delattr(storage, "info_etag")
    with pytest.raises(NameError):
        fetch(uri, "etag", MOST)


def test_the_reason_is_one_short_line_without_the_uri_and_without_keys(photo, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-distinctive-key-id")
    failing(monkeypatch, PermissionError("no\nfor a-distinctive-key-id " * 100))
    error = fetch(*photo, MOST).error
    assert error.startswith("no for … ")
    assert "\n" not in error
    assert len(error) == 500
