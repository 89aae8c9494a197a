"""What a run said, kept beside its result."""

import contextlib
import io
import logging
from collections.abc import Iterator

from pipeline import storage
from pipeline.storage_errors import redacted


@contextlib.contextmanager
def saved_log(uri: str) -> Iterator[None]:
    """Write what the logger ``bdnet`` says to ``uri`` at the end, also when the run fails.

    A run that was refused before it said anything leaves no file: its ``uri`` may lie where none belongs.
    """
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("bdnet")
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        if text.getvalue():
            text.write(f"failed: {redacted(str(error))}\n")
        raise
    finally:
        logger.removeHandler(handler)
        if text.getvalue():
            # An output that can't be written has made the run fail with its own reason.
            with contextlib.suppress(OSError):
                # Names of files need not be UTF-8.
                storage.write_bytes(uri, text.getvalue().encode(errors="backslashreplace"))
