"""Decoding beside a decoder that crashes or hangs, without Ray."""

import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from bdnet.photo import Limits, decode
from pipeline import decoding
from pipeline.decoding import Isolated, attempt
from tests.e2e.harness import ROOT


def jpeg(**options) -> bytes:
    cells = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((64, 48)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def isolated():
    """A process for careful decoding whose decoder has faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/faulty_decoder"))
        with Isolated() as started:
            yield started


def test_a_sound_photo_is_decoded_as_ever(isolated):
    alone, apart = decode(jpeg(), 32), isolated.decode(jpeg(), 32, Limits())
    assert (apart.status, apart.width, apart.height, apart.capture) == ("ok", 64, 48, alone.capture)
    np.testing.assert_array_equal(apart.pixels, alone.pixels)


def test_a_crash_is_the_photos_own_status(isolated):
    photo = isolated.decode(jpeg(comment="crash"), 32, Limits())
    assert (photo.status, photo.error) == ("unreadable", "the decoder crashed on it (signal 11)")
    assert isolated.decode(jpeg(), 32, Limits()).status == "ok"


def test_a_decoder_that_the_system_killed_is_no_fault_of_the_photo(isolated):
    photo = isolated.decode(jpeg(comment="killed"), 32, Limits())
    assert (photo.status, photo.error) == (
        "timeout",
        "its decoder was killed, as happens where memory runs out",
    )
    assert isolated.decode(jpeg(), 32, Limits()).status == "ok"


def test_a_killed_starter_of_decoders_costs_one_photo_another_try(isolated):
    isolated._forker.kill()
    isolated._forker.wait()
    assert isolated.decode(jpeg(), 32, Limits()).status == "timeout"
    assert isolated.decode(jpeg(), 32, Limits()).status == "ok"


def test_a_starter_that_is_killed_while_a_decoder_hangs_is_noticed(isolated, monkeypatch):
    monkeypatch.setattr(decoding, "TIMEOUT_S", 600.0)
    threading.Timer(1.0, isolated._forker.kill).start()
    assert isolated.decode(jpeg(comment="hang"), 32, Limits()).status == "timeout"
    assert isolated.decode(jpeg(), 32, Limits()).status == "ok"


def test_a_hang_is_the_photos_own_status(isolated, monkeypatch):
    monkeypatch.setattr(decoding, "TIMEOUT_S", 0.5)
    photo = isolated.decode(jpeg(comment="hang"), 32, Limits())
    assert (photo.status, photo.error) == ("unreadable", "decoding took longer than 0.5 s")
    monkeypatch.setattr(decoding, "TIMEOUT_S", 60.0)
    assert isolated.decode(jpeg(), 32, Limits()).status == "ok"


def test_more_memory_than_a_process_may_have_is_too_large(isolated):
    # 20,000×20,000 pixels of one colour; the limits that would refuse them are lifted.
    blank = io.BytesIO()
    Image.new("RGB", (20_000, 20_000)).save(blank, "PNG", compress_level=1)
    lifted = Limits(max_memory=2**40)
    assert isolated.decode(blank.getvalue(), None, lifted).status == "too_large"


HOLDS_THE_LOCK = """
import ctypes
from pipeline import decoding

decoding.TIMEOUT_S = 1.5
watchdog = decoding.Watchdog()
for _ in range(3):
    with watchdog.watching():
        pass
with watchdog.watching():
    ctypes.CDLL(None).usleep(300_000)
ctypes.CDLL(None).usleep(2_000_000)
print("idle and slow decodings live", flush=True)
with watchdog.watching():
    ctypes.PyDLL(None).sleep(60)
print("not reached", flush=True)
"""


def test_the_watchdog_ends_a_process_that_hangs_even_with_pythons_lock_held():
    ended = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == ["idle and slow decodings live"]
    assert "Timeout (0:00:01.5" in ended.stderr


def test_outside_of_ray_every_attempt_is_the_first():
    assert attempt() == 0
