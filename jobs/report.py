"""Write the report of an audit: ``python -m jobs.report AUDIT_URI --out DIR``."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from jobs.command import run
from pipeline import storage
from pipeline.report import build_report


@dataclass(frozen=True)
class Settings:
    """Write the report of an audit as one self-contained HTML file."""

    audit_uri: tyro.conf.Positional[str]
    """The --out of an audit: a local folder, s3://… or any fsspec URI."""

    out: str
    """Folder or URI that receives report.html and result.json."""


def work(settings: Settings) -> dict[str, Any]:
    """Write the report and count what is in it."""
    audit = storage.normalize(settings.audit_uri)
    destination = storage.join(storage.normalize(settings.out), "report.html")
    print(f"reading the audit {audit}; writing {destination}", file=sys.stderr, flush=True)
    summary = build_report(audit, destination)
    print(f"{summary.photos:,} photos; open {summary.report}", file=sys.stderr)
    return asdict(summary)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run(Settings, work, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
