"""What people read on stderr while a job runs."""

import pytest

from pipeline import progress
from pipeline.progress import Progress, duration


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def on_terminal(monkeypatch, is_terminal):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: is_terminal)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3600, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_a_log_gets_a_line_each_ten_seconds_with_rate_and_time_left(clock, monkeypatch, capsys):
    on_terminal(monkeypatch, False)
    counter = Progress("photos", 4_000)
    clock.now += 9
    counter.add(900)
    assert capsys.readouterr().err == ""
    clock.now += 1
    counter.add(100)
    counter.add(1)
    assert capsys.readouterr().err == "photos: 1,000 of 4,000, 100.0/s, 30 s left\n"


def test_what_failed_is_said_beside_what_is_done(clock, monkeypatch, capsys):
    on_terminal(monkeypatch, False)
    counter = Progress("photos", 4_000)
    counter.add(900)
    clock.now += 10
    counter.add(1_100, failed=True)
    assert capsys.readouterr().err == "photos: 2,000 of 4,000 (1,100 failed), 110.0/s, 18 s left\n"


def test_a_terminal_gets_one_line_that_is_written_over(clock, monkeypatch, capsys):
    on_terminal(monkeypatch, True)
    counter = Progress("photos", 20)
    for _ in range(2):
        clock.now += 1
        counter.add(10)
    counter.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("\n")
    assert [line.removesuffix("\033[K") for line in said.strip().split("\r")] == [
        "photos: 10 of 20",
        "photos: 20 of 20, 10.0/s, 0 s left",
    ]


@pytest.mark.parametrize(
    ("total", "said"),
    [
        pytest.param(3, "photos: 3 of 3, 6.0/s, 0 s left\n", id="of a known total they are said"),
        pytest.param(None, "", id="without one they are not worth it"),
    ],
)
def test_the_last_figures_of_a_quick_job(clock, monkeypatch, capsys, total, said):
    on_terminal(monkeypatch, False)
    counter = Progress("photos", total)
    clock.now += 0.5
    counter.add(3)
    counter.close()
    assert capsys.readouterr().err == said


def test_the_time_until_the_first_item_is_not_taken_for_the_rate(clock, monkeypatch, capsys):
    on_terminal(monkeypatch, False)
    counter = Progress("photos", 1_000)
    clock.now += 100  # the cluster starts
    counter.add(10)
    assert capsys.readouterr().err == "photos: 10 of 1,000\n"
    clock.now += 10
    counter.add(200)
    assert capsys.readouterr().err == "photos: 210 of 1,000, 20.0/s, 40 s left\n"


def test_nothing_done_yet_has_no_rate_and_no_time_left(monkeypatch, capsys):
    on_terminal(monkeypatch, False)
    Progress("photos", 3).close()
    assert capsys.readouterr().err == "photos: 0 of 3\n"


def test_where_nobody_knows_the_total_the_count_and_its_rate_are_said(clock, monkeypatch, capsys):
    on_terminal(monkeypatch, False)
    counter = Progress("files", None)
    clock.now += 10
    counter.add(5_000)
    counter.close()
    assert capsys.readouterr().err == "files: 5,000, 500.0/s\n"


def test_nothing_goes_to_stdout(capsys):
    counter = Progress("photos", 1)
    counter.add(1)
    counter.close()
    assert capsys.readouterr().out == ""
