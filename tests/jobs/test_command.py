"""What every command does alike: exit codes, one line of error, one line of result."""

import json
import pickle
from dataclasses import dataclass

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import NoCredentialsError
from deltalake.exceptions import CommitFailedError, DeltaError
from ray.data._internal.util import _annotate_exception_with_retry_context
from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.train import WorkerGroupError

from jobs.command import UsageError, one_line, run


@dataclass(frozen=True)
class Settings:
    """Options of a command made up here."""

    out: str
    """Where the result goes."""
    count: int = 1
    """How many."""


def execute(out, work, *more, exit_code=lambda settings, result: 0):
    """Run a command whose work is ``work``; return its exit code."""
    arguments = ["--out", str(out), *more]
    return run(Settings, work, arguments, "A command.", exit_code=exit_code)


def failing(error):
    def work(settings):
        raise error

    return work


def task_error(cause):
    """An error as it comes back from a task on the cluster, of the cause's type and with its traceback."""
    text = f'ray::work() (pid=1)\n  File "work.py", line 3, in work\n{type(cause).__name__}: {cause}'
    return RayTaskError(
        "work", text, cause, proctitle="ray::work", pid=1, ip="127.0.0.1"
    ).as_instanceof_cause()


def with_advice_of_ray_data(error):
    """The error as it comes back from a step of a dataset."""
    known = {"attempts": 1, "max_attempts": 1, "total_backoff_s": 0.0, "exception_str": str(error)}
    said = _annotate_exception_with_retry_context(error, description="apply UDF transform", **known)
    return pickle.loads(pickle.dumps(said))


def test_the_result_is_written_and_is_the_last_line_on_stdout(tmp_path, capsys):
    def work(settings):
        print("said on the way")
        return {"count": settings.count, "by_status": {"ok": 2}}

    assert execute(tmp_path, work, "--count", "3") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"count": 3, "by_status": {"ok": 2}}
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(last)


def test_a_command_without_a_place_for_its_result_prints_it_only(tmp_path, capsys):
    code = run(Settings, lambda _: {"n": 1}, ["--out", str(tmp_path)], "", lambda settings, result: None)
    assert (code, json.loads(capsys.readouterr().out)) == (0, {"n": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_command_may_end_with_a_code_of_its_own_after_its_result(tmp_path, capsys):
    assert (
        execute(tmp_path, lambda _: {"failed": 2}, exit_code=lambda s, result: 3 if result["failed"] else 0)
        == 3
    )
    assert json.loads(capsys.readouterr().out) == {"failed": 2}


EXPECTED = [
    (ValueError("no photos at /x;\n  check the path"), "no photos at /x; check the path"),
    (FileNotFoundError(2, "No such file or directory", "/x"), "[Errno 2] No such file or directory: '/x'"),
    (PermissionError("Access Denied"), "Access Denied"),
    (TimeoutError(), "TimeoutError"),
    (NoCredentialsError(), "Unable to locate credentials"),
    (CommitFailedError("another writer was first"), "another writer was first"),
    (WorkerCrashedError(), str(WorkerCrashedError())),
    (task_error(ValueError("a.png: the mask\nis grey")), "a.png: the mask is grey"),
    (task_error(OSError(28, "No space left on device")), "[Errno 28] No space left on device"),
    (with_advice_of_ray_data(OSError("s3://out/x: nothing answers")), "s3://out/x: nothing answers"),
    (with_advice_of_ray_data(OSError(28, "No space left")), "[Errno 28] No space left"),
    (task_error(task_error(ValueError("of a task's task"))), "of a task's task"),
    (ClientPayloadError("the connection broke"), "the connection broke"),
    (
        DeltaError("\x1b[31mGET http://127.0.0.1:1/t?X-Amz-Signature=SEKRET\x1b[0m failed"),
        "GET http://127.0.0.1:1/t failed",
    ),
    (OSError("<AWSAccessKeyId>SEKRET</AWSAccessKeyId> no such key"), "no such key"),
    # Ours to mend, and found by its type.
    (task_error(KeyError("mask")), "KeyError: 'mask'"),
    (
        WorkerGroupError("rank 0 …", {0: RuntimeError("Traceback:\n  line 1\nValueError: diverged")}),
        "ValueError: diverged",
    ),
]


@pytest.mark.parametrize(
    ("error", "said"), EXPECTED, ids=[f"{n}-{said[:20]}" for n, (_, said) in enumerate(EXPECTED)]
)
def test_a_failure_exits_1_with_the_reason_in_one_line_and_no_result(tmp_path, capsys, error, said):
    assert execute(tmp_path, failing(error)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {said}\n")
    assert not (tmp_path / "result.json").exists()


def test_a_result_that_cannot_be_written_is_a_failure(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert execute(tmp_path / "file", lambda _: {"n": 1}) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")


def test_ctrl_c_exits_1_and_says_how_to_go_on(tmp_path, capsys):
    assert execute(tmp_path, failing(KeyboardInterrupt())) == 1
    assert "run the same command again" in capsys.readouterr().err


def test_a_bug_of_ours_in_the_driver_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError):
        execute(tmp_path, failing(KeyError("mask")))


def test_options_that_do_not_go_together_exit_2(tmp_path, capsys):
    assert execute(tmp_path, failing(UsageError("--a and --b exclude each other"))) == 2
    assert capsys.readouterr().err == "error: --a and --b exclude each other\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--out"], ["--out", "o", "--count", "x"], ["--out", "o", "--nonsense"]]
)
def test_options_that_cannot_be_parsed_exit_2_before_any_work(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(Settings, failing(AssertionError("it worked")), arguments, "", lambda settings, result: None)
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_one_line_of_an_error_without_words_is_its_name():
    assert one_line(ConnectionResetError()) == "ConnectionResetError"
