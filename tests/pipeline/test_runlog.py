"""The log that a run leaves beside its result."""

import logging

import pytest

from pipeline.runlog import saved_log

log = logging.getLogger("bdnet")


@pytest.fixture(autouse=True)
def info():
    before = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(before)


def fail_after_listing(uri, error):
    with saved_log(str(uri)):
        log.info("listing")
        raise error


def test_what_a_run_says_is_kept_with_the_time(tmp_path):
    uri = tmp_path / "runs/r1/log.txt"
    with saved_log(str(uri)):
        log.info("%s photos listed", 3)
        logging.getLogger("bdnet.detail").warning("slow")
        logging.getLogger("other").warning("not of this run")
    log.info("after the run")
    lines = uri.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["3 photos listed", "slow"]
    assert lines[0].startswith("20")


def test_a_name_that_is_no_utf8_costs_no_log(tmp_path, monkeypatch):
    # pytest's own log would carry the name to where it can't be encoded.
    monkeypatch.setattr(log, "propagate", False)
    uri = tmp_path / "log.txt"
    with saved_log(str(uri)):
        log.info("listing %s", "/photos/caf\udce9")
    assert uri.read_text().rstrip().endswith("listing /photos/caf\\udce9")


def test_a_run_that_fails_leaves_its_log_with_the_reason_in_one_line(tmp_path):
    uri = tmp_path / "log.txt"
    with pytest.raises(ValueError, match="nothing"):
        fail_after_listing(uri, ValueError("nothing is\nthere"))
    assert uri.read_text().splitlines()[-1] == "failed: nothing is there"


def test_a_run_that_was_refused_at_once_leaves_nothing(tmp_path):
    # An --out inside the archive is refused: the archive must stay as it was.
    with pytest.raises(ValueError, match="lie in each other"), saved_log(str(tmp_path / "runs/r1/log.txt")):
        raise ValueError("they lie in each other")
    assert not (tmp_path / "runs").exists()


def test_a_log_that_cannot_be_written_does_not_hide_why_the_run_failed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the disk is full"):
        fail_after_listing(tmp_path / "file/log.txt", OSError("the disk is full"))


def test_the_logger_keeps_no_handler(tmp_path):
    before = list(log.handlers)
    with saved_log(str(tmp_path / "log.txt")):
        assert len(log.handlers) == len(before) + 1
    assert log.handlers == before
