"""Rows as they come, and what a stalled run says."""

import logging
import threading

import pyarrow as pa
import pytest

from pipeline import stream as module
from pipeline.stream import stream


class Operator:
    def __init__(self, name, tasks):
        self.name, self._tasks = name, tasks

    def num_active_tasks(self):
        return self._tasks


class State:
    def __init__(self, waiting):
        self._waiting = waiting

    def total_enqueued_input_blocks(self):
        return self._waiting


class Executor:
    def __init__(self):
        self.ended = threading.Event()
        self._topology = {
            Operator("MapBatches(read_and_decode)", 3): State(5),
            Operator("MapBatches(Detector)", 0): State(0),
        }

    def shutdown(self, force):
        self.ended.set()


class Dataset:
    """Hands over what a test gives it; Ray's own would take seconds to start."""

    def __init__(self, *blocks, then=None, hangs=False):
        self._blocks, self._then, self._hangs = blocks, then, hangs
        self._current_executor = Executor()

    def iter_batches(self, **_options):
        for block in self._blocks:
            yield pa.table({"n": block})
        if self._hangs:
            self._current_executor.ended.wait(60)
        if self._then:
            raise self._then


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)


def test_rows_come_block_by_block_to_the_end():
    assert [rows for rows in stream(Dataset([1, 2], [3])) if rows] == [[{"n": 1}, {"n": 2}], [{"n": 3}]]


def test_the_reader_hears_from_a_slow_dataset_all_the_time():
    rows = stream(Dataset([1], hangs=True))
    assert next(rows) == [{"n": 1}]
    assert [next(rows) for _ in range(3)] == [[], [], []]


def test_a_reader_that_goes_away_ends_the_execution():
    dataset = Dataset([1], hangs=True)
    rows = stream(dataset)
    next(rows)
    assert not dataset._current_executor.ended.is_set()
    rows.close()
    assert dataset._current_executor.ended.is_set()


def test_what_a_step_raises_reaches_the_reader_behind_the_rows_before_it():
    rows = stream(Dataset([1], then=PermissionError("denied")))
    assert next(rows) == [{"n": 1}]
    with pytest.raises(PermissionError, match="denied"):
        list(rows)


def test_a_stall_names_the_steps_that_have_work(monkeypatch, caplog):
    monkeypatch.setattr(module, "STALL_SAID_SECONDS", 0.05)
    caplog.set_level(logging.WARNING, "bdnet")
    rows = stream(Dataset([1], hangs=True))
    while not caplog.messages:
        next(rows)
    assert "no photo was finished for" in caplog.messages[0]
    assert "MapBatches(read_and_decode): 3 tasks running, 5 blocks waiting" in caplog.messages[0]
    assert "Detector" not in caplog.messages[0]


def test_a_stall_ends_the_run(monkeypatch):
    monkeypatch.setattr(module, "STALL_ENDS_SECONDS", 0.05)
    with pytest.raises(OSError, match=r"read_and_decode.*run the same command again"):
        list(stream(Dataset([1], hangs=True)))
