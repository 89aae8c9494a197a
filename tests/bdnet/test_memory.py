"""The bound on memory: who asks for too much waits, and nobody for ever. What was freed stays."""

import platform
import subprocess
import sys
import threading

import pytest

from bdnet.memory import MemoryBudget


def test_together_threads_never_hold_more_than_the_budget():
    budget, lock = MemoryBudget(100), threading.Lock()
    held, most = 0, 0

    def work(size):
        nonlocal held, most
        for _ in range(50):
            with budget.reserve(size):
                with lock:
                    held += size
                    most = max(most, held)
                with lock:
                    held -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (10, 30, 60, 100, 45)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 0 < most <= 100


def test_more_than_the_whole_budget_waits_until_it_is_alone():
    budget, entered = MemoryBudget(100), threading.Event()

    def ask_for_too_much():
        with budget.reserve(10_000):
            entered.set()

    thread = threading.Thread(target=ask_for_too_much)
    with budget.reserve(1):
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(30)
    thread.join()


def test_a_failure_gives_back_what_it_held():
    budget = MemoryBudget(100)

    def fail():
        with budget.reserve(100):
            raise OSError("broken")

    for _ in range(3):
        with pytest.raises(OSError, match="broken"):
            fail()
    with budget.reserve(100):
        pass


LIBC, LIBC_VERSION = platform.libc_ver()


@pytest.mark.skipif(
    LIBC != "glibc" or tuple(map(int, LIBC_VERSION.split("."))) < (2, 35),
    reason="mallopt is glibc's, and an older one keeps nothing above 32 MiB",
)
@pytest.mark.parametrize(("kept", "faults"), [("", "many"), ("keep_freed_memory()", "none")])
def test_a_process_keeps_the_memory_that_it_needs_again(kept, faults):
    code = f"""
import resource
import numpy as np
from bdnet.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(40 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{kept}
faults()
count = faults()
print("none" if count < 100 else "many")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == faults
