"""What a run said, kept beside its result."""

import contextlib
import io
import logging
from collections.abc import Iterator

from pipeline import storage


@contextlib.contextmanager
def saved_log(uri: str) -> Iterator[None]:
    """Write what the logger ``bdnet`` says to ``uri`` at the end, also when the run fails."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("bdnet")
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        text.write(f"failed: {' '.join(str(error).split())}\n")
        raise
    finally:
        logger.removeHandler(handler)
        # A source that is wrong, or an output that can't be written, left nothing worth keeping.
        with contextlib.suppress(OSError):
            storage.write_bytes(uri, text.getvalue().encode())
