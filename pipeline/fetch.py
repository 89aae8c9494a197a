"""Bytes of one photo version, or why not: retried where that can help, typed where it can't."""

import random
import time
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, ClientError
from s3fs.core import S3_RETRYABLE_ERRORS  # a connection that breaks in mid-body raises these, untranslated

from pipeline import storage
from pipeline.schema import RetryableStatus

ATTEMPTS = 5
BACKOFF_SECONDS = 0.5  # doubled at each attempt, with full jitter
RETRIED = ("throttled", "timeout")

_CODES: dict[str, RetryableStatus] = {
    "PreconditionFailed": "changed",
    "412": "changed",
    "InvalidObjectState": "archived",
    "SlowDown": "throttled",
    "ServiceUnavailable": "throttled",
    "503": "throttled",
    "TooManyRequests": "throttled",
    "429": "throttled",
    "RequestLimitExceeded": "throttled",
}


@dataclass(frozen=True)
class Fetched:
    """``data`` of the photo version, or a retryable ``status`` with its reason."""

    data: bytes | None
    status: RetryableStatus | None = None
    error: str | None = None


def fetch(uri: str, etag: str) -> Fetched:
    """Read the photo version that the listing saw. What fails comes back as a status; nothing is raised."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, BACKOFF_SECONDS * 2**attempt))
        try:
            return Fetched(storage.read_version(uri, etag))
        except (OSError, BotoCoreError, ClientError, *S3_RETRYABLE_ERRORS) as error:
            failure = Fetched(None, classify(error), " ".join(str(error).split())[:500])
        if failure.status not in RETRIED:
            break
    return failure


def classify(error: BaseException) -> RetryableStatus:
    """The status of a failed read. What isn't known is a timeout: tried again now and next night."""
    if isinstance(error, storage.ChangedError):
        return "changed"
    for cause in (error, error.__cause__):
        if isinstance(cause, ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
            if code in _CODES:
                return _CODES[code]
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "denied"
    return "timeout"
