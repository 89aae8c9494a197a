"""Decoding that survives its decoder: a photo that crashes or hangs native code gets its row.

A task decodes in its own process, at no cost. A crash ends that process, and so does ``Watchdog`` when
nothing moves: Ray then runs the task again, and ``attempt`` tells it so. From then on it goes carefully:
``Isolated`` decodes each photo in a process of its own, with bounds on time and memory, so that the culprit
is known and its neighbours are decoded.

As a program it is what ``Isolated`` starts: a process with one thread, hence one that can fork.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Self

from bdnet.photo import Limits, Photo, decode

# The largest photo within the limits takes seconds; a busy machine is given much more.
TIMEOUT_S = 120.0
# What decoding may take by ``Limits.max_memory``, the file itself twice, and the libraries. If it is more
# after all, this process ends and not the node.
_MEMORY_OF_A_PROCESS = 3 * 2**30
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def attempt() -> int:
    """How often this task was begun before: its worker died, or what it had made was lost. 0 outside Ray."""
    import ray  # not above: a decoder's process does without it

    if not ray.is_initialized():
        return 0
    # Ray 2.60 says it in its logs and its state API, but gives a task itself no public way to ask.
    worker = ray._private.worker.global_worker
    return worker.core_worker.get_current_task_attempt_number()  # type: ignore[attr-defined]


class Watchdog:
    """Ends this process when decodings are under way and none began or ended for ``TIMEOUT_S``.

    It runs in C: a thread of Python would wait for ever for the lock that a hanging decoder holds. There is
    one such timer in a process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._set_at = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the block as a decoding under way."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            was_idle = not self._running
            self._running += change
            now = time.monotonic()
            if not self._running:
                faulthandler.cancel_dump_traceback_later()
            elif was_idle or now - self._set_at > TIMEOUT_S / 100:  # setting it starts a thread
                faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=2)
                self._set_at = now


class Isolated:
    """Decodes each photo in a process forked for it. Use it as a context manager, from one thread."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        ours, theirs = Pipe()
        # Its imports are those of this process, wherever Ray took the code from.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decoding", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._connection.close()
        self._forker.kill()
        self._forker.wait()

    def decode(self, data: bytes, working_size: int | None, limits: Limits) -> Photo:
        """Decode as ``bdnet.photo.decode`` does; a photo that crashes the decoder or hangs is unreadable, one
        whose decoder the system killed, or the process that starts it, has status timeout.

        Raises:
            OSError: no process can be started for it.
        """
        try:
            self._connection.send((data, working_size, limits, TIMEOUT_S))
            return self._connection.recv()
        except (EOFError, OSError):
            # No photo does that to it either: the others are still decoded.
            self._end()
            self._start()
            return Photo("timeout", "the process for careful decoding was killed")


def _serve(connection: Connection) -> None:
    """Fork for each photo that arrives and send back what became of it, until nobody asks any more."""
    fork = multiprocessing.get_context("fork")
    while True:
        try:
            data, working_size, limits, timeout = connection.recv()
        except EOFError:
            return
        ours, theirs = Pipe(duplex=False)
        child = fork.Process(target=_decode_into, args=(connection, theirs, data, working_size, limits))
        child.start()
        theirs.close()
        try:
            if ours.poll(timeout):
                photo = ours.recv()
            else:
                photo = Photo("unreadable", f"decoding took longer than {timeout:g} s")
        except (EOFError, OSError):  # an OSError: in the midst of its answer
            child.join()
            photo = _crashed(child.exitcode or 0)
        child.kill()
        child.join()
        ours.close()
        connection.send(photo)


def _crashed(code: int) -> Photo:
    if code == -signal.SIGKILL:
        # No decoder does that to itself: the node ran out of memory, which is no photo's fault.
        return Photo("timeout", "its decoder was killed, as happens where memory runs out")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Photo("unreadable", f"the decoder crashed on it ({how})")


def _decode_into(
    asker: Connection, answer: Connection, data: bytes, working_size: int | None, limits: Limits
) -> None:
    # Who asks must see the process that forked this one end, also while decoding hangs.
    asker.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_OF_A_PROCESS, _MEMORY_OF_A_PROCESS))
    # A crash is told by who waits for it; a core dump of every bad photo would fill the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer.send(decode(data, working_size, limits))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
