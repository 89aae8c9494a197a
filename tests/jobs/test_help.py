"""The command lines are a contract: every option, its default, and what is wrong usage, for all commands."""

import pytest

from jobs import audit, evaluate, prepare, report, train

# Options of each command and the default that its help shows; None where there is no default.
COMMANDS = {
    audit: {
        "--out": None,
        "--model": "bdnet-topdown",
        "--working-size": "None",
        "--masks": "table",
        "--limit": "None",
        "--dry-run": "False",
        "--workers": "None",
        "--max-denied": "0.5",
        "--max-lost": "0.2",
        "--fail-on-errors": "False",
    },
    report: {"--out": None},
    prepare: {"--cut": None, "--out": None, "--seed": "0", "--split": "train"},
    train: {
        "--out": None,
        "--arch": None,
        "--recipe": "default",
        "--init": "imagenet",
        "--workers": "1",
        "--epochs": "None",
        "--folds": "None",
        "--all-photos": "False",
        "--seed": "0",
        "--terms": "'not stated'",
    },
    evaluate: {
        "--out": None,
        "--model": "None",
        "--maps": "None",
        "--split": "test",
        "--threshold": "0.5",
        "--refine": "none",
        "--workers": "None",
    },
}
EVERY = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)


def help_of(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def options(text):
    """What the help says of each option, by its name."""
    said = {}
    name = None
    for line in text.splitlines():
        words = line.strip("│| ")
        if words[:2] == "--" and words[2:3].isalpha():
            name = words.split()[0].rstrip(",")
        if name:
            said[name] = f"{said.get(name, '')} {words}"
    return said


@EVERY
def test_help_shows_every_option_with_its_default(command, capsys, monkeypatch):
    said = options(help_of(command, capsys, monkeypatch))
    assert set(said) == set(COMMANDS[command])
    for option, default in COMMANDS[command].items():
        assert ("(required)" if default is None else f"(default: {default})") in said[option]


@EVERY
def test_help_says_what_the_command_is_and_how_it_is_called(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    assert text.startswith(f"usage: python -m {command.__name__} ")
    assert command.__doc__.strip() in " ".join(text.split())


@EVERY
@pytest.mark.parametrize("arguments", [["somewhere", "--out", "x", "--no-such-option"], ["somewhere"], []])
def test_wrong_usage_exits_2_and_prints_no_result(command, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_threshold_that_is_no_choice_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["data", "--out", "o", "--threshold", "0.7"])
    assert stopped.value.code == 2
    assert "--threshold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (audit, ["--limit", "0"], "--limit must be at least 1"),
        (audit, ["--workers", "0"], "--workers must be at least 1"),
        (audit, ["--working-size", "-1"], "--working-size must be at least 1"),
        (audit, ["--max-lost", "2"], "--max-lost is a share between 0 and 1"),
        (audit, ["--max-denied", "-0.1"], "--max-denied is a share between 0 and 1"),
        (evaluate, ["--model", "m", "--maps", "d"], "--model and --maps exclude each other"),
        (evaluate, ["--maps", "d", "--refine", "crf"], "--refine works on a model's maps"),
        (evaluate, ["--workers", "0"], "--workers must be at least 1"),
        (train, ["--arch", "bdnet-topdown", "--workers", "0"], "--workers and --epochs must be at least 1"),
        (train, ["--arch", "bdnet-topdown", "--epochs", "0"], "--workers and --epochs must be at least 1"),
        (train, ["--arch", "bdnet-topdown", "--seed", "-1"], "--seed must be at least 0"),
        (prepare, ["--cut", "photos", "--seed", "-1"], "--seed must be at least 0"),
        (train, ["--arch", "bdnet-topdown", "--folds", "1"], "--folds must be at least 2"),
        (train, ["--arch", "bdnet-topdown", "--folds", "3", "--all-photos"], "give one of them"),
        (train, ["--arch", "bdnet-topdown", "--recipe", "fast", "--epochs", "3"], "choose a multiple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_values_that_make_no_sense_are_wrong_usage_and_nothing_is_written(
    command, arguments, said, tmp_path, capsys
):
    assert command.main([str(tmp_path / "no"), "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_training_into_the_patch_dataset_is_wrong_usage_and_its_result_stays(tmp_path, capsys):
    (tmp_path / "result.json").write_text("of jobs.prepare")
    assert train.main([str(tmp_path), "--out", f"{tmp_path}/", "--arch", "bdnet-topdown"]) == 2
    assert "--out is the patch dataset itself" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_text() == "of jobs.prepare"
