"""The tables in results/: one CSV each, with what every row was measured on."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

RESULTS = Path(__file__).parent / "results"
# Longer tables are for programs.
SHOWN_ROWS = 50


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
