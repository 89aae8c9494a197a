"""Which failures of storage are waited for, what each is called, and what its line says."""

import errno
import socket

import pytest
from aiohttp import ClientPayloadError, ClientResponseError, RequestInfo
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from pipeline import storage_errors
from pipeline.schema import RETRYABLE_STATUSES
from pipeline.storage_errors import ChangedError, classify, explained, patiently, redacted

URI = "s3://photos/a.jpg"


def client_error(code, http_status=500):
    """What S3 answers, as botocore says it."""
    answer = {"Error": {"Code": code, "Message": f"it said\n{code}"}}
    return ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": http_status}}, "GetObject")


def s3fs_error(code, http_status=500):
    """The same as s3fs raises it."""
    return translate_boto_error(client_error(code, http_status))


def http_error(status):
    """What file systems on aiohttp raise; it is no OSError."""
    return ClientResponseError(RequestInfo("http://host/?sig=s3cret", "GET", {}, None), (), status=status)


class Failing:
    """A call to storage that fails with the errors in turn, then gives the photo."""

    def __init__(self, *errors):
        self.left = list(errors)

    def __call__(self):
        if self.left:
            raise self.left.pop(0)
        return b"photo"


@pytest.fixture
def waits(monkeypatch):
    """Each wait in seconds; none is waited."""
    waited = []
    monkeypatch.setattr(storage_errors.time, "sleep", waited.append)
    return waited


CLASSIFIED = [
    (s3fs_error("PreconditionFailed"), "changed"),
    (s3fs_error("412"), "changed"),
    (client_error("PreconditionFailed"), "changed"),
    (ChangedError("other"), "changed"),
    (http_error(412), "changed"),
    (s3fs_error("NoSuchKey"), "missing"),
    (s3fs_error("NoSuchBucket"), "missing"),
    (FileNotFoundError(2, "gone"), "missing"),
    (http_error(404), "missing"),
    (s3fs_error("AccessDenied"), "denied"),
    (s3fs_error("403"), "denied"),
    (s3fs_error("SignatureDoesNotMatch"), "denied"),
    (PermissionError(13, "no"), "denied"),
    (http_error(403), "denied"),
    # s3fs calls it a PermissionError; the photo sleeps in an archive's storage class.
    (s3fs_error("InvalidObjectState"), "archived"),
    (s3fs_error("SlowDown"), "throttled"),
    (s3fs_error("503"), "throttled"),
    (s3fs_error("ServiceUnavailable"), "throttled"),
    (client_error("TooManyRequests", 429), "throttled"),
    (http_error(429), "throttled"),
    (s3fs_error("InternalError"), "timeout"),
    (s3fs_error("RequestTimeout", 400), "timeout"),
    (TimeoutError(), "timeout"),
    (ConnectionResetError(104, "reset"), "timeout"),
    (socket.gaierror(-3, "no name"), "timeout"),
    (OSError(5, "Input/output error"), "timeout"),
    (ReadTimeoutError(endpoint_url="http://s3"), "timeout"),
    (EndpointConnectionError(endpoint_url="http://s3"), "timeout"),
    (IncompleteReadError(actual_bytes=1, expected_bytes=2), "timeout"),
    (ClientPayloadError("the connection broke in mid-body"), "timeout"),
    (NoCredentialsError(), "timeout"),
    (RuntimeError("of some package"), "timeout"),
]


@pytest.mark.parametrize(
    ("error", "status"), CLASSIFIED, ids=lambda value: str(value).replace("\n", " ")[:40]
)
def test_every_failure_ends_as_an_os_error_with_a_retryable_status(waits, error, status):
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its class and words are looked at below
        patiently(Failing(*[error] * storage_errors.ATTEMPTS), URI)
    assert classify(caught.value) == classify(error) == status
    assert status in RETRYABLE_STATUSES
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        s3fs_error("SlowDown", 503),
        s3fs_error("InternalError"),
        s3fs_error("RequestTimeout", 400),
        http_error(503),
        ClientPayloadError("the connection broke in mid-body"),
        EndpointConnectionError(endpoint_url="http://s3"),
        RuntimeError("of some package"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(waits, error):
    assert patiently(Failing(error, error), URI) == b"photo"
    assert len(waits) == 2


@pytest.mark.parametrize(
    "error",
    [
        s3fs_error("AccessDenied", 403),
        s3fs_error("SignatureDoesNotMatch", 403),
        s3fs_error("NoSuchKey", 404),
        s3fs_error("NoSuchBucket", 404),
        s3fs_error("PreconditionFailed", 412),
        s3fs_error("InvalidObjectState", 403),
        s3fs_error("PermanentRedirect", 301),
        s3fs_error("AuthorizationHeaderMalformed", 400),
        ParamValidationError(report="no such name of a bucket"),
        ChangedError("other"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", ".DS_Store/settings.json"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=str,
)
def test_what_would_fail_again_is_tried_once(waits, error):
    with pytest.raises(type(explained(error, URI))):
        patiently(Failing(error), URI)
    assert waits == []


def test_the_wait_doubles_and_there_is_an_end(waits, monkeypatch):
    longest = []
    monkeypatch.setattr(storage_errors.random, "uniform", lambda low, high: longest.append(low) or high)
    with pytest.raises(OSError, match="SlowDown"):
        patiently(Failing(*[s3fs_error("SlowDown", 503)] * 100), URI)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert longest == [0] * 4  # any time up to it: readers don't come back in step


def test_nobody_waits_long_for_an_address_where_nothing_answers(waits, monkeypatch):
    monkeypatch.setattr(storage_errors.random, "uniform", lambda low, high: high)
    with pytest.raises(OSError, match="nothing answers at http://s3; check AWS_ENDPOINT_URL"):
        patiently(Failing(*[EndpointConnectionError(endpoint_url="http://s3/b/key")] * 100), URI)
    assert waits == [1.0, 2.0]


def test_attempts_that_take_long_are_few(waits, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(storage_errors.time, "monotonic", lambda: next(clock))
    with pytest.raises(TimeoutError):
        patiently(Failing(*[TimeoutError()] * 100), URI)
    assert len(waits) == 1


def test_a_later_failure_of_another_kind_counts(waits):
    with pytest.raises(FileNotFoundError):
        patiently(Failing(s3fs_error("SlowDown", 503), s3fs_error("NoSuchKey", 404)), URI)


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, TimeoutError, FileExistsError])
def test_the_kind_of_an_error_is_kept(kind):
    assert type(explained(kind("words"), URI)) is kind


def test_an_error_of_a_local_file_is_as_the_system_says_it():
    error = PermissionError(13, "Permission denied", "/photos/a.jpg")
    with pytest.raises(PermissionError) as caught:
        patiently(Failing(error), "/photos/a.jpg")
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (s3fs_error("SignatureDoesNotMatch"), "check AWS_SECRET_ACCESS_KEY"),
        (s3fs_error("InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID"),
        (s3fs_error("ExpiredToken"), "get a new AWS_SESSION_TOKEN"),
        (s3fs_error("NoSuchBucket"), "no such bucket; check the URI"),
        (s3fs_error("AccessDenied"), "check that this identity may do this there"),
        (s3fs_error("PermanentRedirect"), "check AWS_DEFAULT_REGION"),
        (s3fs_error("RequestTimeTooSkewed"), "clock"),
        (s3fs_error("Unheard"), "it said Unheard"),
        (NoCredentialsError(), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (RuntimeError(), "RuntimeError"),
        (TimeoutError(), "no answer in time; check the network"),
        (FSTimeoutError(), "no answer in time; check the network"),
    ],
    ids=str,
)
def test_the_line_names_the_place_and_what_to_check(error, said):
    line = str(explained(error, URI))
    assert line.startswith(f"{URI}: ")
    assert said in line


SECRETS = [
    "http://127.0.0.1:1/out/t?X-Amz-Credential=SEKRET%2F2026&X-Amz-Signature=SEKRET",
    "http://h/o'brien.jpg?X-Amz-Credential=SEKRET&X-Amz-Signature=SEKRET",
    "url: /c/x.jpg?sv=2026&sig=SEKRET",
    "https://user:SEKRET@host/path",
    "https://SEKRET@host/path",
    "ftp://user:pass@SEKRET@host/path",
    "ftp://user:SEK/SEKRET@host/path",
    "<Error><AWSAccessKeyId>SEKRET</AWSAccessKeyId><StringToSign>AWS4\nSEKRET</StringToSign></Error>",
    "no key AKIASEKRETSEKRET1234 here",
    "the value SEKRET-of-the-environment is wrong",
    "\x1b[31mSEKRET-of-the-environment\x1b[0m",
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_are_taken_out_and_the_rest_stays(monkeypatch, text):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SEKRET-of-the-environment")
    clean = redacted(f"before {text} after")
    assert "SEKRET" not in clean
    assert "\x1b" not in clean
    assert clean.startswith("before ")
    assert clean.endswith(" after")


def test_what_commands_a_terminal_or_reorders_a_line_is_spelled_out():
    assert redacted("a\x1b]0;title\x07\x9b2J\u202egpj 日本") == r"a\x1b]0;title\x07\x9b2J\u202egpj 日本"


@pytest.mark.parametrize(
    "text",
    [
        "s3://photos/what?/a.jpg",
        "abfs://photos@account.dfs.core.windows.net/a.jpg",
        "http://127.0.0.1:9000/photos/a@b.jpg",
        "sftp://user@host:22/a.jpg",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/a@b.jpg",
    ],
)
def test_addresses_stay_readable(text):
    assert redacted(f"{text}: no") == f"{text}: no"
