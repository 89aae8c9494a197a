"""Progress for people: done, rate and ETA on stderr."""

import sys
import time


class Progress:
    """Counts items and says so: on a terminal in one line each second, in a log file a line each ten.

    Args:
        what: what is counted.
        total: how many there are; None where nobody knows. Then no time is left, and what is quick stays
            unsaid.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done, self.failed = what, total, 0, 0
        self._said_at: int | None = None
        self._first: tuple[float, int] | None = None
        self._started = self._said = time.monotonic()
        self._interval = 1.0 if sys.stderr.isatty() else 10.0

    @property
    def rate(self) -> float:
        """Items a second since the first came, whose time is also that of starting workers."""
        first_at, first = self._started, 0
        if self._first is not None and self.done > self._first[1]:
            first_at, first = self._first
        return (self.done - first) / (time.monotonic() - first_at) if self.done else 0.0

    def add(self, count: int, *, failed: bool = False) -> None:
        """Count ``count`` more items, done or ``failed`` for now."""
        self.done += count
        self.failed += count if failed else 0
        self._first = self._first or (time.monotonic(), self.done)
        if time.monotonic() - self._said >= self._interval:
            self._said = time.monotonic()
            self._say()

    def close(self) -> None:
        """Say the last figures, unless they were just said, and end the line."""
        if self.total is None and self._said_at is None:
            return
        if self._said_at != self.done:
            self._say()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def _say(self) -> None:
        self._said_at = self.done
        total = "" if self.total is None else f" of {self.total:,}"
        failed = f" ({self.failed:,} failed)" if self.failed else ""
        text = f"{self.what}: {self.done:,}{total}{failed}"
        # While workers start nobody knows the rate.
        if self.total in (None, self.done) or (self._first is not None and self.done > self._first[1]):
            text += f", {self.rate:.1f}/s"
            if self.total:
                text += f", {duration((self.total - self.done) / self.rate)} left"
        print(f"\r{text}\033[K" if sys.stderr.isatty() else text, file=sys.stderr, end="", flush=True)
        if not sys.stderr.isatty():
            print(file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
