"""Memory of one process: a bound on what its threads hold together; keeping what will be needed again."""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): freed memory at the end of the heap goes back to the system beyond this, and what is larger than
# this never comes from the heap at all.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HEAP = 1 << 30
# Before 2.35 glibc takes no larger threshold for mmap.
_OLD_LIMIT = 32 << 20


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB that it freed, for a network's next batch.

    glibc would give every large tensor back to the system, which zeroes it page by page when it is wanted
    again a millisecond later. Other C libraries stay as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        _ = libc.mallopt(_M_MMAP_THRESHOLD, _HEAP) or libc.mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT)
        libc.mallopt(_M_TRIM_THRESHOLD, _HEAP)


class MemoryBudget:
    """Bytes to share: who asks for more than is left waits until others are done.

    More than the whole budget counts as the whole of it: it waits until it is alone, and never for ever.
    """

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes of the budget for the length of a block."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: size <= self._left)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()
