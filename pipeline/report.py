"""The audit's report: one self-contained HTML file that people look at each morning.

Masks and pixels are read for the photos of the galleries alone.
"""

import base64
import functools
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from scipy import ndimage

from bdnet import photo
from pipeline import storage
from pipeline.fetch import classify
from pipeline.layout import AuditLayout
from pipeline.ledger import query, quoted
from pipeline.schema import AUDIT_TABLE, FINAL_STATUSES, RETRYABLE_STATUSES
from pipeline.view import NOT_AUDITED, Run, View, current_view, moment

GALLERY_SIZE = 24
THUMBNAIL_SIZE = 320
MAX_PROBLEMS = 500
VERDICTS = ("sharp", "partly_blurred", "blurred")
FOCUSES = ("all_sharp", "shallow_depth", "suspected_miss", "no_sharp_region")
STATUSES = (*FINAL_STATUSES, *RETRYABLE_STATUSES, NOT_AUDITED)

# What one card of a gallery is read for.
WIDE = (
    *("uri", "etag", "size_bytes", "format", "width", "height", "captured_at", "camera", "lens", "iso"),
    *("exposure_s", "f_number", "focal_mm", "blurred_fraction", "blur_kind", "kind_confidence"),
    *("verdict", "focus", "mask"),
)

# Magenta is rare in photographs and keeps its contrast on dark and bright ones.
MASK_COLOUR = np.array([236, 0, 140], np.float32)
MASK_OPACITY = 0.35


@dataclass(frozen=True)
class Card:
    """One photo of a gallery. Images are data: URIs; ``problem`` says why there are none."""

    name: str
    blurred_fraction: float
    verdict: str
    focus: str
    kind: str | None
    kind_confidence: float | None
    facts: list[str]
    photo: str | None = None
    overlay: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Gallery:
    """A titled row of cards."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True)
class ReportSummary:
    """What the report counted. The values of ``by_status`` add up to ``photos``; words without photos are
    left out.
    """

    report: str
    run_id: str
    photos: int
    by_status: dict[str, int]
    by_verdict: dict[str, int]
    by_focus: dict[str, int]


def build_report(audit_uri: str, destination: str, gallery_size: int = GALLERY_SIZE) -> ReportSummary:
    """Write the report of the audit under ``audit_uri`` as one HTML file at the URI ``destination``.

    Raises:
        ValueError: ``audit_uri`` holds no audit, or its settings are not those of one.
        OSError: the audit cannot be read or the report cannot be written.
    """
    layout = AuditLayout(storage.normalize(audit_uri))
    view = current_view(layout)
    summary = ReportSummary(
        report=storage.normalize(destination),
        run_id=view.run.run_id,
        photos=view.photos.num_rows,
        by_status=_counts(view.photos["status"], STATUSES),
        by_verdict=_counts(view.photos["verdict"], VERDICTS),
        by_focus=_counts(view.photos["focus"], FOCUSES),
    )
    html = render(view, summary, galleries(layout, view, gallery_size))
    storage.write_bytes(summary.report, html.encode())
    return summary


def galleries(layout: AuditLayout, view: View, size: int) -> list[Gallery]:
    """The most blurred photos, the suspected misses that are not among them, and a few sharp ones."""
    photos = view.photos
    blurred = photos.filter(pc.is_in(photos["verdict"], pa.array(["blurred", "partly_blurred"])))
    most = _first(blurred, size, "blurred_fraction", "descending")
    rest = blurred.filter(pc.invert(pc.is_in(blurred["uri"], most["uri"].combine_chunks())))
    missed = rest.filter(pc.equal(rest["focus"], "suspected_miss"))
    missed = _first(missed, 3 * size // 8, "subject_blurred_fraction", "descending")
    sharp = photos.filter(pc.equal(photos["verdict"], "sharp"))
    sharpest = _first(sharp, size // 8, "blurred_fraction", "ascending")
    titled = [
        ("Most blurred", "The largest blurred share first. Blurred pixels are tinted and outlined.", most),
        ("Suspected missed focus", "Something is sharp here, but not where the subject should be.", missed),
        ("Sharpest, for comparison", "The photos with the smallest blurred share.", sharpest),
    ]
    cards = _cards(layout, view.run, [key for *_, chosen in titled for key in _keys(chosen)])
    return [
        Gallery(title, note, [cards[key] for key in _keys(chosen)])
        for title, note, chosen in titled
        if chosen.num_rows or chosen is most
    ]


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw a mask over a photo: a translucent tint and a solid outline.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        mask: bool (H, W), true where blurred.

    Returns:
        uint8 (H, W, 3), a new array.
    """
    assert pixels.shape == (*mask.shape, 3)
    assert mask.dtype == bool
    tinted = pixels * (1 - MASK_OPACITY) + MASK_COLOUR * MASK_OPACITY
    drawn = np.where(mask[..., None], tinted.round().astype(np.uint8), pixels)
    thickness = max(1, round(max(mask.shape) / 320))
    # The frame of the photo is no edge of the blur.
    inside = ndimage.binary_erosion(mask, iterations=thickness, border_value=1)
    drawn[mask & ~inside] = MASK_COLOUR.astype(np.uint8)
    return drawn


def render(view: View, summary: ReportSummary, shown: list[Gallery]) -> str:
    """Return the HTML. Everything that came with the photos is escaped, names first of all."""
    photos = view.photos
    problems = photos.filter(pc.invert(pc.is_in(photos["status"], pa.array(["ok", NOT_AUDITED]))))
    listed = _first(
        problems.select(["uri", "status", "error", "size_bytes"]), MAX_PROBLEMS, "status", "ascending"
    )
    name = functools.partial(_display_name, source=view.run.source)
    return _template().render(
        run=view.run,
        summary=summary,
        written_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        started_at=f"{moment(view.run.started_at).astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        retryable=RETRYABLE_STATUSES,
        verdicts=VERDICTS,
        focuses=FOCUSES,
        statuses=STATUSES,
        not_audited=sum(summary.by_status.get(status, 0) for status in (*RETRYABLE_STATUSES, NOT_AUDITED)),
        histogram=_histogram(photos),
        galleries=shown,
        problems=[{**row, "name": name(row["uri"])} for row in listed.to_pylist()],
        more_problems=problems.num_rows - listed.num_rows,
        skipped=sorted(view.run.skipped_by_suffix.items(), key=lambda item: (-item[1], item[0])),
    )


def _counts(column: pa.ChunkedArray, words: Sequence[str]) -> dict[str, int]:
    found = {str(item["values"]): int(item["counts"]) for item in pc.value_counts(column).to_pylist()}
    found.pop("None", None)
    ordered = [*(word for word in words if word in found), *sorted(found.keys() - set(words))]
    return {word: found[word] for word in ordered}


def _first(table: pa.Table, count: int, column: str, order: str) -> pa.Table:
    """The first ``count`` rows by ``column``, then by name: the same ones each time."""
    keys = [(column, order), ("uri", "ascending")]
    return table.take(pc.select_k_unstable(table, min(count, table.num_rows), sort_keys=keys))


def _keys(photos: pa.Table) -> list[tuple[str, str]]:
    return list(zip(photos["uri"].to_pylist(), photos["etag"].to_pylist(), strict=True))


def _cards(layout: AuditLayout, run: Run, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Card]:
    if not keys:
        return {}
    rows = query(
        layout.table,
        f"SELECT {', '.join(WIDE)} FROM delta WHERE audit_digest = {quoted(run.audit_digest)}"
        f" AND uri IN ({', '.join(quoted(uri) for uri, _ in keys)})",
        pa.schema([AUDIT_TABLE.field(name) for name in WIDE]),
    ).to_pylist()
    wanted = [row for row in rows if (row["uri"], row["etag"]) in set(keys)]
    # A few at a time: each holds one whole file in memory.
    with ThreadPoolExecutor(4) as pool:
        cards = pool.map(functools.partial(_card, source=run.source), wanted)
        return {(row["uri"], row["etag"]): card for row, card in zip(wanted, cards, strict=True)}


def _card(row: dict[str, Any], source: str) -> Card:
    images: dict[str, str] = {}
    try:
        pixels = _read_again(row["uri"], row["etag"])
        images["photo"] = _jpeg_uri(pixels)
        if row["mask"] is None:
            images["problem"] = "The table holds no mask of it."
        else:
            mask = Image.open(io.BytesIO(row["mask"])).convert("L")
            resized = mask.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
            images["overlay"] = _jpeg_uri(overlay(pixels, np.asarray(resized) > 127))
    except _GoneError as gone:
        images["problem"] = str(gone)
    return Card(
        name=_display_name(row["uri"], source),
        blurred_fraction=row["blurred_fraction"],
        verdict=row["verdict"],
        focus=row["focus"],
        kind=row["blur_kind"],
        kind_confidence=row["kind_confidence"],
        facts=_facts(row),
        **images,
    )


class _GoneError(Exception):
    """The photo can't be shown as it was audited."""


def _read_again(uri: str, etag: str) -> np.ndarray:
    try:
        data = storage.read_version(uri, etag)
    except FileNotFoundError as error:
        raise _GoneError("The photo is no longer there.") from error
    except Exception as error:  # Each kind of storage has its own errors; the card names this one.
        if classify(error) == "changed":
            raise _GoneError("The photo has changed since it was audited.") from error
        raise _GoneError(f"The photo can't be read now: {type(error).__name__}.") from error
    again = photo.decode(data, THUMBNAIL_SIZE)
    if again.pixels is None:
        raise _GoneError(f"The photo has changed since it was audited: it is {again.status} now.")
    return again.pixels


def _jpeg_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _display_name(uri: str, source: str) -> str:
    """``uri`` below ``source``; what would not be seen, or would reorder the line, is spelled out."""
    name = uri.removeprefix(source.rstrip("/") + "/")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _facts(row: dict[str, Any]) -> list[str]:
    """What the camera wrote, shortest useful form; absent facts are left out."""
    exposure = row["exposure_s"] or 0
    shutter = f"1/{round(1 / exposure)} s" if 0 < exposure < 0.4 else f"{exposure:g} s"
    facts = [
        f"{row['width']}×{row['height']} {row['format'] or ''}".strip() if row["width"] else None,
        f"{row['captured_at']:%Y-%m-%d %H:%M}" if row["captured_at"] else None,
        row["camera"],
        row["lens"],
        shutter if exposure else None,
        f"f/{row['f_number']:g}" if row["f_number"] else None,
        f"ISO {row['iso']}" if row["iso"] else None,
        f"{row['focal_mm']:g} mm" if row["focal_mm"] else None,
    ]
    return [fact for fact in facts if fact]


def _histogram(photos: pa.Table) -> Markup | None:
    """Inline SVG of the blurred fraction in 20 bins, stacked by kind of blur; None without any photo."""
    names = {"motion": "motion", "defocus": "defocus", None: "too little to tell"}
    values = []
    for kind, name in names.items():
        chosen = pc.is_null(photos["blur_kind"]) if kind is None else pc.equal(photos["blur_kind"], kind)
        fractions = photos.filter(chosen)["blurred_fraction"].drop_null().to_numpy()
        counts, edges = np.histogram(fractions, bins=20, range=(0, 1))
        values += [
            {"from": float(low), "to": float(high), "kind": name, "photos": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    if not any(value["photos"] for value in values):
        return None
    chart = (
        alt.Chart(alt.Data(values=values), width=680, height=200, background="transparent")
        .mark_bar(binSpacing=2)
        .encode(
            x=alt.X("from:Q", bin="binned", axis=alt.Axis(format="%", tickCount=10), title="Blurred share"),
            x2="to:Q",
            y=alt.Y("photos:Q", stack=True, axis=alt.Axis(tickMinStep=1, tickCount=5), title="Photos"),
            color=alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=list(names.values()), range=["#d97706", "#2f7fd1", "#8a929c"]),
                legend=alt.Legend(orient="top", title="Blur"),
            ),
        )
        .configure(font="system-ui, sans-serif")
        # currentColor follows the page, dark or light.
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            gridColor="currentColor",
            gridOpacity=0.15,
            titleFontWeight=500,
        )
        .configure_legend(labelColor="currentColor", titleColor="currentColor", titleFontWeight=500)
        .configure_view(stroke=None)
    )
    return Markup(vl_convert.vegalite_to_svg(chart.to_dict(), allowed_base_urls=[]))


@functools.cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda text: str(text).replace("_", " ")
    environment.filters["percent"] = lambda share: f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
    return environment.get_template("report.html.j2")
