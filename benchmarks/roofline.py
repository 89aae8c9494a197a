"""What an audit reaches, beside what bounds it: ``python -m benchmarks.roofline``, from the others' tables.

Photos of 3 megapixels a second if this machine did nothing else than one step, at its floor and as it is
done: network.csv (the floor is the network at the rate of a matrix product), decode.csv (the floor is the
fastest decoder measured), throughput.csv. Writes results/roofline.csv and results/roofline.svg.
"""

import sys
from typing import Any

import altair as alt

from bdnet.card import DEFAULT_MODEL
from benchmarks.tables import RESULTS, cores_of, measured_on, read_csv, write_csv

MEGAPIXELS = "3"


def rows_of(table: str, **values: str) -> list[dict[str, str]]:
    """The rows of a table with these values. Exits where there are none."""
    rows = [row for row in read_csv(table) if all(row[key] == value for key, value in values.items())]
    return rows or sys.exit(f"{table}.csv has no row with {values}: run benchmarks.{table} first")


def main() -> int:
    """Write results/roofline.csv and its picture."""
    ways = {row["way"]: row for row in rows_of("network", model=DEFAULT_MODEL)}
    network = ways.get("fused bf16") or ways["fused fp32"]  # as audits ran there
    decoders = rows_of("decode", megapixels=MEGAPIXELS)
    fastest = min(decoders, key=lambda row: float(row["ms"]))
    [ours] = rows_of("decode", megapixels=MEGAPIXELS, decoder="bdnet")
    runs = {row["runner"]: row for row in rows_of("throughput", round="median")}
    cores = cores_of(ours)
    product_ms = 1000 * float(network["gflop"]) / float(network["matrix_product_gflop_per_s"])
    figures = {
        "network alone: at the rate of a matrix product": 1000 / product_ms,
        "network alone: as it runs": 1000 / float(network["ms"]),
        f"decoding alone: {fastest['decoder']}": 1000 * cores / float(fastest["ms"]),
        "decoding alone: as it runs": 1000 * cores / float(ours["ms"]),
        "both, at their floors": 1000 / (product_ms + float(fastest["ms"]) / cores),
        "both, as they run": 1000 / (float(network["ms"]) + float(ours["ms"]) / cores),
        "a plain loop over S3": float(runs["plain loop"]["photos_per_second"]),
        "jobs.audit over S3": float(runs["jobs.audit"]["photos_per_second"]),
    }
    behind = measured_on(network, fastest, ours, *runs.values())
    rows: list[dict[str, Any]] = [
        {"what": what, "photos_per_second": f"{rate:.1f}", **behind} for what, rate in figures.items()
    ]
    write_csv("roofline", rows)
    points = [{"what": what, "photos a second": rate} for what, rate in figures.items()]
    bars = alt.Chart(alt.Data(values=points)).encode(
        x="photos a second:Q",
        y=alt.Y("what:N", sort=list(figures), title=None, axis=alt.Axis(labelLimit=320)),
    )
    labels = bars.mark_text(align="left", dx=3).encode(text=alt.Text("photos a second:Q", format=".1f"))
    (bars.mark_bar() + labels).properties(width=480).save(RESULTS / "roofline.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
