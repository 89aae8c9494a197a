"""Write the report of an audit: ``python -m jobs.report AUDIT_URI --out DIR``."""

import json
import sys
from dataclasses import asdict, dataclass

import tyro
from botocore.exceptions import BotoCoreError
from deltalake.exceptions import DeltaError

from pipeline import storage
from pipeline.report import build_report


@dataclass(frozen=True)
class Settings:
    """Write the report of an audit as one self-contained HTML file."""

    audit_uri: tyro.conf.Positional[str]
    """The --out of an audit: a local folder, s3://… or any fsspec URI."""

    out: str
    """Folder or URI that receives report.html and result.json."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 when done, 1 when it failed. Bad usage exits with 2."""
    settings = tyro.cli(Settings, args=argv, prog="python -m jobs.report")
    destination = storage.join(settings.out, "report.html")
    print(f"reading the audit {settings.audit_uri}; writing {destination}", file=sys.stderr, flush=True)
    try:
        summary = build_report(settings.audit_uri, destination)
        result = json.dumps(asdict(summary))
        storage.write_bytes(storage.join(settings.out, "result.json"), f"{result}\n".encode())
    except (ValueError, OSError, DeltaError, BotoCoreError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{summary.photos:,} photos; open {summary.report}", file=sys.stderr)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
