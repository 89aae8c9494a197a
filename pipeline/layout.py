"""Where everything of an audit lies under ``--out``; the only place that builds these paths.

OUT/table/  OUT/failures/  OUT/masks/  OUT/lock.json
OUT/runs/RUN_ID/{settings.json,listing/,to_do/,result.json,log.txt,report.html}
"""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

_BEGAN = "%Y%m%dT%H%M%S"


def new_run_id(now: datetime | None = None) -> str:
    """A name for a run that sorts by the time when it began, now if not given."""
    return f"{now or datetime.now(UTC):{_BEGAN}}-{uuid.uuid4().hex[:6]}"


def began(run_id: str) -> datetime | None:
    """When a run began, by its name; None where the name is no run's."""
    try:
        return datetime.strptime(run_id.partition("-")[0], _BEGAN).replace(tzinfo=UTC)
    except ValueError:
        return None


def new_part(run_id: str, suffix: str) -> str:
    """A name of its own for a file of rows or masks that a run writes."""
    return f"part-{run_id}-{uuid.uuid4().hex}{suffix}"


def run_of_part(name: str) -> str:
    """What begins with the id of the run that wrote a file, for ``began``; anything for another file."""
    return name.removeprefix("part-")


@dataclass(frozen=True)
class AuditLayout:
    """Paths of one audit. ``out`` is a local folder or any fsspec URI."""

    out: str

    def _under(self, *parts: str) -> str:
        return "/".join([self.out.rstrip("/"), *parts])

    @property
    def table(self) -> str:
        """The Delta table: one row per photo version and audit digest."""
        return self._under("table")

    @property
    def failures(self) -> str:
        """The Delta table of retryable failures."""
        return self._under("failures")

    @property
    def masks(self) -> str:
        """Tar shards of PNG masks."""
        return self._under("masks")

    @property
    def lock(self) -> str:
        """Held by the one audit that writes."""
        return self._under("lock.json")

    @property
    def runs(self) -> str:
        """The folder of runs."""
        return self._under("runs")

    def run(self, run_id: str) -> "RunLayout":
        """Paths of the run ``run_id``."""
        return RunLayout(self._under("runs", run_id))


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run."""

    root: str

    @property
    def settings(self) -> str:
        """What the run was asked to do."""
        return f"{self.root}/settings.json"

    @property
    def listing(self) -> str:
        """The folder of the run's listing shards."""
        return f"{self.root}/listing"

    @property
    def to_do(self) -> str:
        """The folder of the listing's photo versions that the table doesn't know; gone after the run."""
        return f"{self.root}/to_do"

    @property
    def result(self) -> str:
        """What the run did."""
        return f"{self.root}/result.json"

    @property
    def log(self) -> str:
        """What the run said."""
        return f"{self.root}/log.txt"

    @property
    def report(self) -> str:
        """The run's report."""
        return f"{self.root}/report.html"
