"""Which failed reads are tried again, and what each is called."""

import socket

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
)
from s3fs.errors import translate_boto_error

from pipeline import fetch, storage
from pipeline.schema import RETRYABLE_STATUSES


def client_error(code):
    """What S3 answers, as botocore says it."""
    return ClientError({"Error": {"Code": code, "Message": f"it said\n{code}"}}, "GetObject")


def s3fs_error(code):
    """The same as s3fs raises it."""
    return translate_boto_error(client_error(code))


def failing(monkeypatch, *errors, data=b"photo"):
    """Let reads fail in turn, then succeed; return the list that gets each wait in seconds."""
    waits, left = [], list(errors)

    def read_version(uri, etag):
        if left:
            raise left.pop(0)
        return data

    monkeypatch.setattr(storage, "read_version", read_version)
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    return waits


CLASSIFIED = [
    (s3fs_error("PreconditionFailed"), "changed"),
    (s3fs_error("412"), "changed"),
    (client_error("PreconditionFailed"), "changed"),
    (storage.ChangedError("other"), "changed"),
    (s3fs_error("NoSuchKey"), "missing"),
    (s3fs_error("NoSuchBucket"), "missing"),
    (FileNotFoundError(2, "gone"), "missing"),
    (s3fs_error("AccessDenied"), "denied"),
    (s3fs_error("403"), "denied"),
    (s3fs_error("SignatureDoesNotMatch"), "denied"),
    (PermissionError(13, "no"), "denied"),
    # s3fs calls it a PermissionError; the photo sleeps in an archive's storage class.
    (s3fs_error("InvalidObjectState"), "archived"),
    (s3fs_error("SlowDown"), "throttled"),
    (s3fs_error("503"), "throttled"),
    (s3fs_error("ServiceUnavailable"), "throttled"),
    (client_error("TooManyRequests"), "throttled"),
    (s3fs_error("InternalError"), "timeout"),
    (s3fs_error("RequestTimeout"), "timeout"),
    (TimeoutError(), "timeout"),
    (ConnectionResetError(104, "reset"), "timeout"),
    (socket.gaierror(-3, "no name"), "timeout"),
    (OSError(5, "Input/output error"), "timeout"),
    (ReadTimeoutError(endpoint_url="http://s3"), "timeout"),
    (EndpointConnectionError(endpoint_url="http://s3"), "timeout"),
    (IncompleteReadError(actual_bytes=1, expected_bytes=2), "timeout"),
    (ClientPayloadError("the connection broke in mid-body"), "timeout"),
]


@pytest.mark.parametrize(
    ("error", "status"), CLASSIFIED, ids=lambda value: str(value).replace("\n", " ")[:40]
)
def test_every_failed_read_becomes_a_retryable_status(monkeypatch, error, status):
    failing(monkeypatch, *[error] * fetch.ATTEMPTS)
    fetched = fetch.fetch("s3://photos/a.jpg", "e")
    assert (fetched.data, fetched.status) == (None, status)
    assert status in RETRYABLE_STATUSES
    assert "\n" not in fetched.error


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_throttled_and_timed_out_reads_are_tried_again_and_give_the_photo(monkeypatch, code):
    waits = failing(monkeypatch, s3fs_error(code), s3fs_error(code))
    assert fetch.fetch("s3://photos/a.jpg", "e") == fetch.Fetched(b"photo")
    assert len(waits) == 2


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchKey", "PreconditionFailed", "InvalidObjectState"])
def test_reads_that_would_fail_again_are_tried_once(monkeypatch, code):
    waits = failing(monkeypatch, s3fs_error(code))
    assert fetch.fetch("s3://photos/a.jpg", "e").data is None
    assert waits == []


def test_the_wait_doubles_and_there_is_an_end(monkeypatch):
    longest = []
    monkeypatch.setattr(fetch.random, "uniform", lambda low, high: longest.append((low, high)) or high)
    waits = failing(monkeypatch, *[s3fs_error("SlowDown")] * 100)
    assert fetch.fetch("s3://photos/a.jpg", "e").status == "throttled"
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert [low for low, _ in longest] == [0] * 4  # any time up to it: readers don't come back in step


def test_a_later_failure_of_another_kind_counts(monkeypatch):
    failing(monkeypatch, s3fs_error("SlowDown"), s3fs_error("NoSuchKey"))
    assert fetch.fetch("s3://photos/a.jpg", "e").status == "missing"


def test_a_long_answer_is_cut(monkeypatch):
    failing(monkeypatch, PermissionError("no " * 1_000))
    assert len(fetch.fetch("s3://photos/a.jpg", "e").error) == 500


def test_a_photo_without_credentials_does_not_stop_the_others(monkeypatch):
    failing(monkeypatch, *[NoCredentialsError()] * fetch.ATTEMPTS)
    assert fetch.fetch("s3://photos/a.jpg", "e").status in RETRYABLE_STATUSES


def test_a_bug_of_ours_is_no_status(monkeypatch):
    failing(monkeypatch, KeyError("etag"))
    with pytest.raises(KeyError):
        fetch.fetch("s3://photos/a.jpg", "e")
