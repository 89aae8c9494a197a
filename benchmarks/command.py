"""Run a bdnet command as a user would, and write tables of what it said."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

RESULTS = Path(__file__).parent / "results"
# Published maps of BlurRaw's test photos, in BDNET_DATA's peer_maps/.
PUBLISHED = ("EFPN", "EHS", "JNB")
# By split the photos of BlurRaw whose masks mark what is sharp as blurred: seen by eye, among those of which
# every network that didn't learn them has at most a sixth of the pixels right.
INVERTED_MASKS = {"test": ("motion0281",), "train": ("motion0142", "out_of_focus0508", "out_of_focus0509")}
# Longer tables are for programs.
SHOWN_ROWS = 50


def data_folder() -> Path:
    """The folder that BDNET_DATA names. Exits with a remedy where it isn't set."""
    folder = os.environ.get("BDNET_DATA")
    if not folder:
        sys.exit("set BDNET_DATA to the folder that holds blurraw/, archive/ and peer_maps/")
    return Path(folder)


def run(*arguments: str) -> dict[str, Any]:
    """Run ``python -m arguments...`` and return the JSON of its last line; its progress goes to stderr."""
    finished = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"python -m {' '.join(arguments)} failed with {finished.returncode}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def read_csv(name: str) -> list[dict[str, str]]:
    """Rows of results/NAME.csv; none where it isn't made yet."""
    where = RESULTS / f"{name}.csv"
    return list(csv.DictReader(io.StringIO(where.read_text()))) if where.exists() else []


def measured_on(*rows: dict[str, str]) -> dict[str, str]:
    """Hardware and versions behind rows that are computed from these."""
    return {key: "; ".join(sorted({row[key] for row in rows})) for key in ("hardware", "versions")}


def cores_of(row: dict[str, str]) -> int:
    """Cores of the machine that a row was measured on; see ``environment.describe``."""
    found = re.search(r"(\d+) cores", row["hardware"])
    assert found, row["hardware"]
    return int(found[1])


def write_csv(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows with hardware and versions to results/NAME.csv and print them, unless they are many."""
    where = RESULTS / f"{name}.csv"
    here = describe()
    # Rows of an earlier run keep what they were measured on.
    rows = [{**row, **{key: value for key, value in here.items() if key not in row}} for row in rows]
    # Rows of before a column was added lack it.
    columns = dict.fromkeys(column for row in rows for column in row if column not in here)
    with where.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *here], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where}: {len(rows)} rows")
    for row in rows if len(rows) <= SHOWN_ROWS else []:
        print("  " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in here))


def replace_rows(table: str, rows: list[dict[str, Any]], *same: str) -> None:
    """Write rows into a table instead of those with the same values in the columns ``same``."""
    new = {tuple(str(row[column]) for column in same) for row in rows}
    kept = [row for row in read_csv(table) if tuple(row[column] for column in same) not in new]
    write_csv(table, [*kept, *rows])
