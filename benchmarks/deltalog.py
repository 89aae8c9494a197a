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


def steady_rate(grown: list[tuple[float, int]]) -> float:
    """Rows a second in the middle half: some rows were under way when the first ones were written, and in
    the end not every worker has something to do."""
    quarter, rest = (
        next(point for point in grown if point[1] >= share * grown[-1][1]) for share in (0.25, 0.75)
    )
    return (rest[1] - quarter[1]) / (rest[0] - quarter[0])
