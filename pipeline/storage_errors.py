"""What storage says when it fails: whether that may pass, which status it is, a line that says what to check.

Storage is a foreign country: s3fs, botocore, aiohttp and other file systems' packages raise what they like.
From here on it is an OSError whose words name no credentials.
"""

import errno
import itertools
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
from botocore.exceptions import (
    ClientError,
    ConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from pipeline.schema import RetryableStatus

T = TypeVar("T")

# Each attempt is up to 4 requests of the client itself (``storage.filesystem``), so a call to storage that
# throttles is 20 requests at the most, and within a storm 10: botocore's own retries have a quota.
ATTEMPTS = 5
# A wrong address must be said soon; a server that restarts is worth 3 seconds.
UNREACHABLE_ATTEMPTS = 3
BACKOFF_SECONDS = 0.5  # doubled at each attempt, with full jitter: 15 s in all at the most
PATIENCE_SECONDS = 60.0  # no new attempt later than this

_STATUS: dict[str, RetryableStatus] = {
    "PreconditionFailed": "changed",
    "412": "changed",
    "InvalidObjectState": "archived",
    "SlowDown": "throttled",
    "ServiceUnavailable": "throttled",
    "503": "throttled",
    "TooManyRequests": "throttled",
    "429": "throttled",
    "RequestLimitExceeded": "throttled",
    "401": "denied",
    "403": "denied",
    "404": "missing",
}
# Refusals of a request that arrived damaged or late: the next one may arrive whole.
_PASSING = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted"}
# Of this machine's file systems; what a network's has, such as EIO and ESTALE, may pass.
_LASTING = {
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
}
_DENIED = "check that this identity may do this there"
_REGION = "the bucket lies in another region; check AWS_DEFAULT_REGION"
_ADVICE = {
    "SignatureDoesNotMatch": "the secret key is not the one of this key id; check AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the server does not know the key id; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "ExpiredToken": "the session token is too old; get a new AWS_SESSION_TOKEN",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "NoSuchBucket": "there is no such bucket; check the URI and AWS_ENDPOINT_URL",
    "InvalidBucketName": "that is no name of a bucket; check the URI",
    "InvalidObjectState": "the object is in an archived storage class; restore it",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AccessDenied": f"access is denied; {_DENIED}",
    "AllAccessDisabled": f"access is denied; {_DENIED}",
    "403": f"access is denied; {_DENIED}, and the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_KINDS = (FileNotFoundError, FileExistsError, PermissionError, TimeoutError)


class ChangedError(OSError):
    """The object is not the version that was asked for."""


def patiently(call: Callable[[], T], uri: str) -> T:
    """Return ``call()``, a call to the storage of ``uri``, made again with backoff where that can help.

    Raises:
        OSError: what storage said in the end, as ``explained``.
        Exception: an error that this project itself raised, a bug, as it is.
    """
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except Exception as error:
            if is_ours(error):
                raise
            allowed = UNREACHABLE_ATTEMPTS if _is_unreachable(error) else ATTEMPTS
            late = time.monotonic() - began > PATIENCE_SECONDS
            if late or attempt >= allowed or not _may_pass(error):
                failure = explained(error, uri)
                if failure is error:
                    raise
                raise failure from error
        time.sleep(random.uniform(0, BACKOFF_SECONDS * 2**attempt))
    raise AssertionError("unreachable")


def classify(error: BaseException) -> RetryableStatus:
    """The status of a failed read. What isn't known is a timeout: tried again now and next night."""
    if isinstance(error, ChangedError):
        return "changed"
    code = error_code(error)
    if code in _STATUS:
        return _STATUS[code]
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "denied"
    return "timeout"


def error_code(error: BaseException) -> str:
    """The code of S3's or another server's answer (``NoSuchKey``, ``403``); empty where there was none."""
    for cause in _causes(error):
        if isinstance(cause, ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
        for name in ("status", "status_code", "code"):  # of aiohttp, Azure, Google
            value = getattr(cause, name, None)
            if isinstance(value, int):
                return str(value)
    return ""


def is_ours(error: BaseException) -> bool:
    """Whether this project's own code raised ``error``, and not as an answer of storage: a bug."""
    if isinstance(error, OSError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] in ("bdnet", "pipeline")


def explained(error: Exception, uri: str) -> OSError:
    """``error`` of the storage of ``uri`` as an OSError of the same kind that says what to check.

    Errors of this machine's file system, which name their file, stay as they are.
    """
    if isinstance(error, ChangedError) or (isinstance(error, OSError) and "://" not in uri):
        return error
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
    return kind(f"{uri}: {_reason(error)}")


def redacted(text: str) -> str:
    """``text`` in one line without credentials, signatures, query strings of URLs, and terminal colours.

    What no terminal should take from a file's name is spelled out, as are bytes that are no UTF-8.
    """
    text = text.encode(errors="backslashreplace").decode()
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "…")
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """``text`` with what would not be seen, would reorder the line or command a terminal, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# What S3 puts into a refusal to help with the signature is enough to repeat the request.
_SIGNING = (
    "AWSAccessKeyId|StringToSign|StringToSignBytes|CanonicalRequest|CanonicalRequestBytes|SignatureProvided"
)
# Of a URL's query or fragment: Azure's sig, a presigned URL's X-Amz-Signature, ?api-key=.
SECRET_PARAMETER = re.compile(
    r"[?&#;](?:[\w.-]*(?:signature|credential|secret|password|token|authorization|access[-_]?key(?:[-_]?id)?"
    r"|api[-_]?key)|(?:[\w.-]*[-_.])?(?:sig|auth|jwt|pwd|key))=",
    re.IGNORECASE,
)
_SECRETS = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(rf"<({_SIGNING})>.*?</\1>", re.DOTALL), ""),
    (re.compile(r"(https?://)[^/\s\"'<>]*@"), r"\1"),
    # A password may hold a slash or an @; digits and a slash are a port and a path.
    (re.compile(r"(?<=://)(?!arn:)[^/@\s:]*:(?:[^/\s\"'<>]*|(?!\d{1,5}/)[^@\s\"'<>]*)@"), ""),
    (re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]*"), r"\1"),
    (re.compile(f"({SECRET_PARAMETER.pattern})[^&\\s\"'<>]*", re.IGNORECASE), r"\1…"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "…"),
)
_SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|API_KEY", re.IGNORECASE)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_unreachable(error: BaseException) -> bool:
    places = (ConnectionError, ConnectionRefusedError, socket.gaierror, aiohttp.ClientConnectorError)
    return any(isinstance(cause, (*places, NoCredentialsError)) for cause in _causes(error))


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment. What isn't known may."""
    if classify(error) not in ("throttled", "timeout") or isinstance(
        error, (ParamValidationError, PartialCredentialsError)
    ):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING:
        return False
    answers = [cause.response for cause in _causes(error) if isinstance(cause, ClientError)]
    refused = any(300 <= a.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500 for a in answers)
    return not refused or error_code(error) in _PASSING or classify(error) == "throttled"


def _reason(error: BaseException) -> str:
    code = error_code(error)
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time; check the network, AWS_ENDPOINT_URL and how busy the server is"
    # Packages' own errors may have no words; a type that isn't an answer of storage helps to find out.
    words = redacted(str(error)) or type(error).__name__
    if code in _ADVICE:
        return f"{_ADVICE[code]} ({code})"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return f"{words}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
    if _is_unreachable(error):
        where, name = _endpoint(error), type(error).__name__
        return f"nothing answers at {where}; check AWS_ENDPOINT_URL and the network ({name})"
    if code and code not in words:
        words = f"{words} ({code})"
    return words if isinstance(error, OSError) else f"{words} ({type(error).__name__})"


def _endpoint(error: BaseException) -> str:
    url = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    return redacted(f"{url.scheme}://{url.netloc}") if url.netloc else "its address"
