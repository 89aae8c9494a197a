"""One audit at a time per --out, and none blocked by the dead."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline import lock, storage


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "out/lock.json")
    request.getfixturevalue("s3")
    return f"s3://out/{tmp_path.name}/lock.json"


@pytest.fixture
def s3_uri(s3, tmp_path):
    return f"s3://out/{tmp_path.name}/lock.json"


def hold_in_another_process(uri):
    """A process that holds the lock until it is killed."""
    code = (
        "import sys, time; from pipeline import lock\n"
        "with lock.hold(sys.argv[1], 'r-other'): print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_holder_is_refused_with_the_first_ones_name(uri):
    with lock.hold(uri, "r1") as check:
        check()
        with (
            pytest.raises(OSError, match=f"run r1 on .*, process {os.getpid()}") as refused,
            lock.hold(uri, "r2"),
        ):
            pytest.fail("both hold it")
        assert "wait until it has ended" in str(refused.value)
        check()


def test_a_lock_that_was_released_is_free(uri):
    for run_id in ("r1", "r2", "r3"):
        with lock.hold(uri, run_id) as check:
            check()


def test_a_run_that_fails_releases_the_lock(uri):
    with pytest.raises(ValueError, match="broken"), lock.hold(uri, "r1"):
        raise ValueError("broken")
    with lock.hold(uri, "r2") as check:
        check()


def test_a_process_that_was_killed_leaves_a_lock_that_the_next_takes_at_once(uri):
    holder = hold_in_another_process(uri)
    with pytest.raises(OSError, match="run r-other"), lock.hold(uri, "r2"):
        pytest.fail("both hold it")
    holder.send_signal(signal.SIGKILL)  # not waited for: to its parent it is a zombie
    deadline = time.monotonic() + 20
    while not is_free(uri):
        assert time.monotonic() < deadline, "the lock outlives its owner"
        time.sleep(0.01)  # its threads end one after the other
    holder.wait()


def is_free(uri):
    try:
        with lock.hold(uri, "r2") as check:
            check()
    except OSError:
        return False
    return True


def foreign(uri, **changes):
    """The lock of a process on another machine."""
    owner = {**lock._owner("r-far"), "host": "far", "machine": "another boot", "pid": 1, **changes}
    return storage.write_if_unchanged(uri, json.dumps(owner).encode(), None)


def test_a_lock_of_another_machine_ends_with_its_lease(s3_uri, monkeypatch):
    foreign(s3_uri)
    with pytest.raises(OSError, match=r"run r-far on far.* its lock ends in \d+ s"), lock.hold(s3_uri, "r2"):
        pytest.fail("both hold it")
    monkeypatch.setattr(lock, "LEASE_SECONDS", -1.0)
    with lock.hold(s3_uri, "r2") as check:
        check()


def test_a_process_id_that_was_given_to_another_process_is_no_owner(s3_uri):
    foreign(s3_uri, machine=lock._machine(), pid=os.getppid(), process_started="1")
    with lock.hold(s3_uri, "r2") as check:
        check()


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b'{"run_id": 7}', b"null"])
def test_a_lock_that_nobody_understands_is_respected_until_its_lease_ends(s3_uri, content, monkeypatch):
    storage.write_if_unchanged(s3_uri, content, None)
    if content not in (b"[]", b"null"):  # empty, as a released one
        with pytest.raises(OSError, match="unknown run"), lock.hold(s3_uri, "r2"):
            pytest.fail("both hold it")
    monkeypatch.setattr(lock, "LEASE_SECONDS", -1.0)
    with lock.hold(s3_uri, "r2"):
        pass


def test_a_holder_renews_its_lock_and_notices_when_it_is_taken(s3_uri, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with lock.hold(s3_uri, "r1") as check:
        _, first, _ = storage.read_with_age(s3_uri)
        deadline = time.monotonic() + 20
        while storage.read_with_age(s3_uri)[1] == first:
            assert time.monotonic() < deadline, "no beat"
            time.sleep(0.02)
        check()
        stolen = None
        while stolen is None:  # between two beats
            stolen = storage.write_if_unchanged(s3_uri, b'{"run_id": "r2"}', storage.read_with_age(s3_uri)[1])
        with pytest.raises(OSError, match="another audit took over"):
            _check_until(check, deadline)
    # What belongs to the other is left alone.
    assert storage.read_with_age(s3_uri)[0] == b'{"run_id": "r2"}'


def test_a_lock_that_a_cleaner_removed_is_written_again(s3_uri, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with lock.hold(s3_uri, "r1") as check:
        storage.remove(s3_uri)
        deadline = time.monotonic() + 20
        while not storage.exists(s3_uri):
            assert time.monotonic() < deadline, "no beat after the removal"
            time.sleep(0.02)
        check()


def test_a_beat_whose_answer_was_lost_takes_the_lock_from_nobody(s3_uri, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    write, lost = storage.write_if_unchanged, []

    def write_and_lose_one_answer(uri, data, etag):
        written = write(uri, data, etag)
        if not lost and b'"beat": 3' in data:
            lost.append(written)
            raise OSError("nothing answers")
        return written

    monkeypatch.setattr(storage, "write_if_unchanged", write_and_lose_one_answer)
    with lock.hold(s3_uri, "r1") as check:
        deadline = time.monotonic() + 20
        while not lost or storage.read_with_age(s3_uri)[1] == lost[0]:
            assert time.monotonic() < deadline, "no beat after the lost one"
            time.sleep(0.02)
        check()


def _check_until(check, deadline):
    while time.monotonic() < deadline:
        check()
        time.sleep(0.02)


def test_of_many_writers_under_a_condition_one_is_first(s3_uri):
    first = storage.write_if_unchanged(s3_uri, b"1", None)
    assert first is not None
    assert storage.write_if_unchanged(s3_uri, b"2", None) is None
    second = storage.write_if_unchanged(s3_uri, b"2", first)
    assert second not in (None, first)
    assert storage.write_if_unchanged(s3_uri, b"3", first) is None
    assert storage.read_bytes(s3_uri) == b"2"
    storage.remove(s3_uri)
    assert storage.write_if_unchanged(s3_uri, b"4", second) is None
