"""A bound on what the threads of one process hold in memory together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
