"""What an audit found, as a short table in the terminal: ``python -m infra.demo_summary OUT``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import tyro

from pipeline import storage
from pipeline.layout import AuditLayout
from pipeline.storage_errors import visible
from pipeline.view import PHOTOS, View, current_view, first

MAX_ROWS = 40
MAX_NAME = 48
HEADER = ("photo", "status", "verdict", "blurred", "kind", "focus")


@dataclass(frozen=True)
class Settings:
    """Print what an audit found, one line per photo, and where its report is."""

    out: tyro.conf.Positional[str]
    """The --out of the audit: a local folder, s3://… or any fsspec URI."""
    save_report: str | None = None
    """Copy the report to this file, for an audit whose storage goes away."""


def table(view: View) -> list[str]:
    """Lines of the table: a header and the first 40 photos by name, and how many were left out."""
    photos, count = PHOTOS.empty_table(), 0
    for more in view.tables():
        photos = first(pa.concat_tables([photos, more]), MAX_ROWS, "uri", "ascending")
        count += more.num_rows
    rows = [HEADER, *(_row(photo, view.name(photo["uri"])) for photo in photos.to_pylist())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    left_out = count - MAX_ROWS
    return [line.rstrip() for line in lines] + ([f"… and {left_out:,} more"] if left_out > 0 else [])


def _row(photo: dict[str, Any], name: str) -> tuple[str, ...]:
    # A name may hold what would move the cursor or recolour the terminal.
    name = visible(name)
    name = name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"
    fraction = photo["blurred_fraction"]
    blurred = "–" if fraction is None else f"{fraction:7.1%}"
    return (
        name,
        photo["status"],
        photo["verdict"] or "–",
        blurred,
        photo["blur_kind"] or "–",
        photo["focus"] or "–",
    )


def summarize(settings: Settings) -> list[str]:
    """The table and the place of the report, as lines; copies the report where that was asked for.

    Raises:
        ValueError: there is no audit at ``settings.out``.
        OSError: the audit or its report cannot be read.
    """
    layout = AuditLayout(storage.normalize(settings.out))
    view = current_view(layout)
    report = layout.run(view.run.run_id).report
    html = storage.read_bytes(report)
    if settings.save_report is not None:
        report = storage.normalize(settings.save_report)
        storage.write_bytes(report, html)
    return [*table(view), "", f"report: {report}"]


def main(arguments: Sequence[str]) -> int:
    """Print the summary; 1 with one line on stderr where there is none."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m infra.demo_summary")
    try:
        lines = summarize(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
