"""The command lines are a contract: every option and its default, for all commands."""

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
