"""What every command shares: typed options in, one JSON line out, and an exit code."""

import inspect
import json
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import tyro
from botocore.exceptions import BotoCoreError, ClientError
from deltalake.exceptions import DeltaError
from ray.exceptions import RayError, RayTaskError

from pipeline import storage
from pipeline.storage_errors import redacted

Settings = TypeVar("Settings")

# The last three: what a manifest that stands open on S3 raises while it is read.
EXPECTED = (ValueError, OSError, RayError, DeltaError, BotoCoreError, ClientError, aiohttp.ClientError)

# Ray Data adds to the words of an error, or as its file name, how Ray is told to try again.
_RAY_DATA_ADVICE = re.compile(
    r"(?:\n|: ['\"])Failed to .*? after \d+/\d+ attempts \(total backoff.*", re.DOTALL
)


class UsageError(ValueError):
    """Options that don't go together; the command exits with 2."""


def _in_out(settings: Any, result: dict[str, Any]) -> str:
    """Where a command's result lies, but an audit's."""
    return storage.join(storage.normalize(settings.out), "result.json")


def run(
    settings_type: type[Settings],
    work: Callable[[Settings], dict[str, Any]],
    argv: list[str] | None,
    description: str,
    result_uri: Callable[[Settings, dict[str, Any]], str | None] = _in_out,
    exit_code: Callable[[Settings, dict[str, Any]], int] = lambda settings, result: 0,
) -> int:
    """Parse ``argv``, do ``work``, write and print its result as JSON, the last line on stdout.

    Returns:
        0 done, 1 failed (the reason in one line on stderr), 2 for a UsageError, or what ``exit_code`` says;
        tyro itself leaves with 2 for options that it can't parse.
    """
    prog = f"python -m jobs.{Path(inspect.getfile(settings_type)).stem}"
    settings = tyro.cli(settings_type, args=argv, prog=prog, description=description)
    if threading.current_thread() is threading.main_thread():
        # What ends a job in a container or on a spot node; a step that has more to save takes it over.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    """The error's own words in one line and without credentials; a Ray task's error has those of its cause.

    A cause that no command expects is a bug of ours and keeps its type's name before its words.
    """
    while isinstance(error, RayTaskError):
        error = error.cause
    # Ray Train keeps each worker's traceback; its last line is the error itself.
    for failure in getattr(error, "worker_failures", {}).values():
        return redacted(str(failure).strip().splitlines()[-1])
    text, name = redacted(_RAY_DATA_ADVICE.sub("", str(error))), type(error).__name__
    if not text:
        return name
    return text if isinstance(error, EXPECTED) else f"{name}: {text}"
