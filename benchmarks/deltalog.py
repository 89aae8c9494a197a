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
    # When each commit was made, in seconds since 1970.
    commits: list[float] = field(default_factory=list)
    # The same times, each with the rows that the table had from then on.
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
            self.commits += [a["commitInfo"]["timestamp"] / 1000 for a in actions if "commitInfo" in a]
            for add in (action["add"] for action in actions if "add" in action):
                rows = json.loads(add["stats"])["numRecords"]
                self.files[add["path"]] = rows
                if add["dataChange"]:
                    self.rows += rows
                    self.added.append(add["path"])
            if self.commits:
                self.grown.append((self.commits[-1], self.rows))
