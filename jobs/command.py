"""What every command shares: typed options in, one JSON line out, and an exit code."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
from botocore.exceptions import BotoCoreError, ClientError
from deltalake.exceptions import DeltaError
from ray.exceptions import RayError, RayTaskError

from pipeline import storage

Settings = TypeVar("Settings")

EXPECTED = (ValueError, OSError, RayError, DeltaError, BotoCoreError, ClientError)


class UsageError(ValueError):
    """Options that don't go together; the command exits with 2."""


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
        0 done, 1 failed (the reason in one line on stderr), 2 for a UsageError, or what ``exit_code`` says;
        tyro itself leaves with 2 for options that it can't parse.
    """
    prog = f"python -m jobs.{Path(inspect.getfile(settings_type)).stem}"
    settings = tyro.cli(settings_type, args=argv, prog=prog, description=description)
    try:
        result = work(settings)
        uri = result_uri(settings, result)
        if uri is not None:
            storage.write_bytes(uri, json.dumps(result, indent=2).encode())
    except UsageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped; run the same command again to go on", file=sys.stderr)
        return 1
    except Exception as error:
        # By module: to import ray.train for its errors would take every command a second.
        if not isinstance(error, EXPECTED) and not type(error).__module__.startswith("ray.train"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(result), flush=True)
    return exit_code(settings, result)


def one_line(error: BaseException) -> str:
    """The error's own words without line breaks; a Ray task's error speaks with the words of its cause.

    A cause that no command expects is a bug of ours and keeps its type's name before its words.
    """
    while isinstance(error, RayTaskError):
        error = error.cause
    # Ray Train keeps each worker's traceback; its last line is the error itself.
    for failure in getattr(error, "worker_failures", {}).values():
        return str(failure).strip().splitlines()[-1]
    text, name = " ".join(str(error).split()), type(error).__name__
    if not text:
        return name
    return text if isinstance(error, EXPECTED) else f"{name}: {text}"
