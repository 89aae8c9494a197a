"""Bytes of one photo version, or why not."""

from dataclasses import dataclass

from pipeline import storage
from pipeline.schema import RetryableStatus
from pipeline.storage_errors import classify, redacted


@dataclass(frozen=True)
class Fetched:
    """``data`` of the photo version, or a retryable ``status`` with its reason."""

    data: bytes | None
    status: RetryableStatus | None = None
    error: str | None = None


def fetch(uri: str, etag: str, most: int) -> Fetched:
    """Read the photo version that the listing saw, of at most ``most`` bytes. What storage refuses comes back
    as a status."""
    try:
        return Fetched(storage.read_version(uri, etag, most))
    except MemoryError:
        return Fetched(None, "timeout", "memory ran out while it was read")
    except OSError as error:
        return Fetched(None, classify(error), redacted(str(error).removeprefix(f"{uri}: "))[:500])
    except ValueError as error:  # a file system that isn't installed here
        return Fetched(None, "missing", redacted(str(error))[:500])
