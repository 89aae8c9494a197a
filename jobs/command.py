"""What every command shares: typed options in, one JSON line out, and an exit code."""

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
from botocore.exceptions import BotoCoreError, ClientError
from deltalake.exceptions import DeltaError
from ray.exceptions import RayError

from pipeline import storage

Settings = TypeVar("Settings")


def run(
    settings_type: type[Settings],
    work: Callable[[Settings], dict[str, Any]],
    argv: list[str] | None,
    description: str,
    result_uri: Callable[[Settings, dict[str, Any]], str | None],
    exit_code: Callable[[Settings, dict[str, Any]], int] = lambda settings, result: 0,
) -> int:
    """Parse ``argv``, do ``work``, write and print its result as JSON, the last line on stdout.

    Returns:
        0 done, 1 failed (the reason in one line on stderr), or what ``exit_code`` says; wrong usage leaves
        with 2 through tyro.
    """
    settings = tyro.cli(settings_type, args=argv, description=description)
    try:
        result = work(settings)
        uri = result_uri(settings, result)
        if uri is not None:
            storage.write_bytes(uri, json.dumps(result, indent=2).encode())
    except (ValueError, OSError, RayError, DeltaError, BotoCoreError, ClientError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped; run the same command again to go on", file=sys.stderr)
        return 1
    print(json.dumps(result), flush=True)
    return exit_code(settings, result)


def one_line(error: BaseException) -> str:
    """The error's own words without line breaks; a Ray task's error speaks with the words of its cause."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error) or type(error).__name__
    return " ".join(text.split())
