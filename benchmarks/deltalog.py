"""The log of a Delta table as it grows, read without the code under test: who added which file, when."""

import json
from dataclasses import dataclass, field

from fsspec import AbstractFileSystem


@dataclass
class DeltaLog:
    """The log of the table at ``path``, read as far as ``version``; ``read_new`` goes on from there."""

    fs: AbstractFileSystem
    path: str
    version: int = -1
    # Rows of every file that was ever added, also by rewriting others.
    files: dict[str, int] = field(default_factory=dict)
    # Rows that came with files of new data; rewriting files doesn't count.
    rows: int = 0
    # Files of new data in the order of their commits.
    added: list[str] = field(default_factory=list)
    # When each commit was made, in seconds since 1970, and the rows that the table had from then on.
    grown: list[tuple[float, int]] = field(default_factory=list)

    def read_new(self) -> int:
        """Read the commits that came since; return how many."""
        before = self.version
        while True:
            name = f"{self.path}/_delta_log/{self.version + 1:020d}.json"
            try:
                actions = [json.loads(line) for line in self.fs.cat_file(name).splitlines() if line.strip()]
            except FileNotFoundError:
                return self.version - before
            self.version += 1
            for add in (action["add"] for action in actions if "add" in action):
                rows = json.loads(add["stats"])["numRecords"]
                self.files[add["path"]] = rows
                if add["dataChange"]:
                    self.rows += rows
                    self.added.append(add["path"])
            made = (a["commitInfo"]["timestamp"] / 1000 for a in actions if "commitInfo" in a)
            self.grown += [(at, self.rows) for at in made]


def rows_by_time(fs: AbstractFileSystem, path: str) -> list[tuple[float, int]]:
    """When how many rows were in the table at ``path``, from its first ones on."""
    log = DeltaLog(fs, path)
    log.read_new()
    return [(at, rows) for at, rows in log.grown if rows]


def steady_rate(grown: list[tuple[float, int]]) -> float:
    """Rows a second from an eighth to a half of all rows.

    Some rows were under way when the first ones were written. An audit decodes some hundred photos ahead,
    most of them while its detectors start: of few photos, or of the last ones, nothing is left to decode.
    """
    first, last = (
        next(point for point in grown if point[1] >= share * grown[-1][1]) for share in (0.125, 0.5)
    )
    return (last[1] - first[1]) / (last[0] - first[0])
