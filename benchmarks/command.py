"""Run a bdnet command as a user would."""

import json
import subprocess
import sys
from typing import Any


def run(*arguments: str) -> dict[str, Any]:
    """Run ``python -m arguments...`` and return the JSON of its last line; its progress goes to stderr."""
    finished = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"python -m {' '.join(arguments)} failed with {finished.returncode}")
    return json.loads(finished.stdout.strip().splitlines()[-1])
