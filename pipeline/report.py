"""The audit's report: one self-contained HTML file that people look at each morning.

The photos stream by: counts and the few photos that the report shows are all that stays of them. Masks and
pixels are read for the photos of the galleries alone.
"""

import base64
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, get_args

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
from bdnet.detect import DEFAULT_THRESHOLDS, Focus, Verdict
from pipeline import storage
from pipeline.delta import query, quoted, read_table
from pipeline.layout import AuditLayout
from pipeline.schema import AUDIT_TABLE, FINAL_STATUSES, RETRYABLE_STATUSES
from pipeline.storage_errors import classify, visible
from pipeline.view import NOT_AUDITED, PHOTOS, View, current_view, first, moment

# Photos of each gallery.
MOST_BLURRED, MISSED, SHARPEST = 24, 9, 3
THUMBNAIL_SIZE = 320
MAX_PROBLEMS = 500
VERDICTS, FOCUSES = get_args(Verdict), get_args(Focus)
STATUSES = (*FINAL_STATUSES, *RETRYABLE_STATUSES, NOT_AUDITED)

# What one card of a gallery is read for.
WIDE = (
    *("uri", "etag", "format", "width", "height", "captured_at", "camera", "lens", "iso"),
    *("exposure_s", "f_number", "focal_mm", "blurred_fraction", "blur_kind", "kind_confidence"),
    *("focus", "mask", "audit_digest"),
)
# The engine skips files by their names only where a list is as short as this.
NAMES_PER_QUERY = 20
# What is said of a kind of blur in the histogram.
KINDS = {"motion": "motion", "defocus": "defocus", None: "kind not told"}
HISTOGRAM_BINS = 20

# Magenta is rare in photographs and keeps its contrast on dark and bright ones.
MASK_COLOUR = np.array([236, 0, 140], np.float32)
MASK_OPACITY = 0.35


@dataclass(frozen=True)
class Card:
    """One photo of a gallery. Images are data: URIs; ``problem`` says why there are none."""

    name: str
    blurred_fraction: float
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


@dataclass
class Found:
    """What the report keeps of all photos: counts, and the first few rows (``view.PHOTOS``) of each kind."""

    photos: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_verdict: Counter[str] = field(default_factory=Counter)
    by_focus: Counter[str] = field(default_factory=Counter)
    # Photos per bin of blurred_fraction, by kind of blur.
    histogram: dict[str | None, np.ndarray] = field(
        default_factory=lambda: {kind: np.zeros(HISTOGRAM_BINS, np.int64) for kind in KINDS}
    )
    most_blurred: pa.Table = field(default_factory=PHOTOS.empty_table)
    missed: pa.Table = field(default_factory=PHOTOS.empty_table)
    sharpest: pa.Table = field(default_factory=PHOTOS.empty_table)
    problems: pa.Table = field(default_factory=PHOTOS.empty_table)


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


def build_report(audit_uri: str, destination: str) -> ReportSummary:
    """Write the report of the audit under ``audit_uri`` as one HTML file at the URI ``destination``.

    Raises:
        ValueError: ``audit_uri`` holds no audit, or its settings are not those of one.
        OSError: the audit cannot be read or the report cannot be written.
    """
    view = current_view(AuditLayout(storage.normalize(audit_uri)))
    found = find(view.tables())
    summary = ReportSummary(
        report=storage.normalize(destination),
        run_id=view.run.run_id,
        photos=found.photos,
        by_status=_ordered(found.by_status, STATUSES),
        by_verdict=_ordered(found.by_verdict, VERDICTS),
        by_focus=_ordered(found.by_focus, FOCUSES),
    )
    html = render(view, summary, found, galleries(view, found))
    storage.write_bytes(summary.report, html.encode())
    return summary


def find(tables: Iterable[pa.Table]) -> Found:
    """Count the photos of ``view.PHOTOS`` tables and keep those that the report shows."""
    found = Found()
    for photos in tables:
        found.photos += photos.num_rows
        for counter, column in [
            (found.by_status, "status"),
            (found.by_verdict, "verdict"),
            (found.by_focus, "focus"),
        ]:
            counts = pc.value_counts(photos[column].drop_null())
            counter.update({str(item["values"]): int(item["counts"]) for item in counts.to_pylist()})
        for kind, bins in found.histogram.items():
            chosen = pc.is_null(photos["blur_kind"]) if kind is None else pc.equal(photos["blur_kind"], kind)
            fractions = photos.filter(chosen)["blurred_fraction"].drop_null().to_numpy()
            bins += np.histogram(fractions, bins=HISTOGRAM_BINS, range=(0, 1))[0]
        blurred = photos.filter(pc.is_in(photos["verdict"], pa.array(["blurred", "partly_blurred"])))
        missed = blurred.filter(pc.equal(blurred["focus"], "suspected_miss"))
        sharp = photos.filter(pc.equal(photos["verdict"], "sharp"))
        problems = photos.filter(pc.invert(pc.is_in(photos["status"], pa.array(["ok", NOT_AUDITED]))))
        found.most_blurred = _best(
            found.most_blurred, blurred, MOST_BLURRED, "blurred_fraction", "descending"
        )
        # Those that are among the most blurred will be left out: as many more.
        spare = MOST_BLURRED + MISSED
        found.missed = _best(found.missed, missed, spare, "subject_blurred_fraction", "descending")
        found.sharpest = _best(found.sharpest, sharp, SHARPEST, "blurred_fraction", "ascending")
        found.problems = _best(found.problems, problems, MAX_PROBLEMS, "status", "ascending")
    return found


def galleries(view: View, found: Found) -> list[Gallery]:
    """The most blurred photos, the suspected misses that are not among them, and a few sharp ones."""
    most = found.most_blurred
    missed = found.missed.filter(pc.invert(pc.is_in(found.missed["uri"], most["uri"].combine_chunks())))
    missed = missed.slice(0, MISSED)
    titled = [
        ("Most blurred", "The largest blurred share first. Blurred pixels are tinted and outlined.", most),
        ("Suspected missed focus", "Something is sharp here, but not where the subject should be.", missed),
        ("Sharpest, for comparison", "The photos with the smallest blurred share.", found.sharpest),
    ]
    cards = _cards(view, [key for *_, chosen in titled for key in _keys(chosen)])
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


def render(view: View, summary: ReportSummary, found: Found, shown: list[Gallery]) -> str:
    """Return the HTML. Everything that came with the photos is escaped, names first of all."""
    skipped: Counter[str] = Counter()
    for run in view.outermost:
        skipped.update(run.skipped_by_suffix)
    unmeasured = summary.photos - summary.by_status.get("ok", 0) - summary.by_status.get(NOT_AUDITED, 0)
    return _template().render(
        runs=[replace(run, source=visible(run.source)) for run in view.runs],
        title=", ".join(visible(run.source) for run in view.outermost),
        summary=summary,
        working_sizes=sorted({run.working_size for run in view.runs}),
        written_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        retryable=RETRYABLE_STATUSES,
        verdicts=VERDICTS,
        thresholds=DEFAULT_THRESHOLDS,
        focuses=FOCUSES,
        statuses=STATUSES,
        not_audited=sum(summary.by_status.get(status, 0) for status in (*RETRYABLE_STATUSES, NOT_AUDITED)),
        histogram=_histogram(found.histogram),
        galleries=shown,
        problems=[{**row, "name": visible(view.name(row["uri"]))} for row in found.problems.to_pylist()],
        more_problems=unmeasured - found.problems.num_rows,
        skipped=sorted(skipped.items(), key=lambda item: (-item[1], item[0])),
    )


def _ordered(counts: Counter[str], words: Sequence[str]) -> dict[str, int]:
    return {word: counts[word] for word in (*words, *sorted(counts.keys() - set(words))) if word in counts}


def _best(kept: pa.Table, more: pa.Table, count: int, column: str, order: str) -> pa.Table:
    return first(pa.concat_tables([kept, more]), count, column, order)


def _keys(photos: pa.Table) -> list[tuple[str, str, str]]:
    columns = (photos[name].to_pylist() for name in ("uri", "etag", "audit_digest"))
    return list(zip(*columns, strict=True))


def _cards(view: View, keys: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], Card]:
    uris = sorted({uri for uri, *_ in keys})
    rows: list[dict[str, Any]] = []
    table = read_table(view.layout.table)
    for start in range(0, len(uris), NAMES_PER_QUERY):
        names = ", ".join(quoted(uri) for uri in uris[start : start + NAMES_PER_QUERY])
        rows += query(
            table,
            f"SELECT {', '.join(WIDE)} FROM delta WHERE uri IN ({names})",
            pa.schema([AUDIT_TABLE.field(name) for name in WIDE]),
        ).to_pylist()
    of_key = {(row["uri"], row["etag"], row["audit_digest"]): row for row in rows}
    wanted = {key: of_key[key] for key in keys}
    # A few at a time: each holds one whole file in memory.
    with ThreadPoolExecutor(4) as pool:
        cards = pool.map(functools.partial(_card, shorten=view.name), wanted.values())
        return dict(zip(wanted, cards, strict=True))


def _card(row: dict[str, Any], shorten: Callable[[str], str]) -> Card:
    images: dict[str, str] = {}
    try:
        pixels = _read_again(row["uri"], row["etag"])
        images["photo"] = _jpeg_uri(pixels)
        if row["mask"] is None:
            images["problem"] = "The table holds no mask of it."
        else:
            mask = Image.open(io.BytesIO(row["mask"]), formats=("PNG",)).convert("L")
            resized = mask.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
            images["overlay"] = _jpeg_uri(overlay(pixels, np.asarray(resized) > 127))
    except _GoneError as gone:
        images["problem"] = str(gone)
    except Exception as error:  # Pillow raises what it likes; one damaged mask is not the report's end
        images["problem"] = f"Its mask in the table can't be read ({type(error).__name__})."
    return Card(
        name=visible(shorten(row["uri"])),
        blurred_fraction=row["blurred_fraction"],
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
        data = storage.read_version(uri, etag, photo.Limits().max_bytes)
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


def _facts(row: dict[str, Any]) -> list[str]:
    """What the camera wrote, shortest useful form; absent facts are left out."""
    exposure = row["exposure_s"] or 0
    shutter = f"1/{1 / exposure:.0f} s" if 1e-9 <= exposure < 0.4 else f"{exposure:g} s"
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


def _histogram(bins: dict[str | None, np.ndarray]) -> Markup | None:
    """Inline SVG of the blurred fraction in bins, stacked by kind of blur; None without any photo."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    values = [
        {"from": float(low), "to": float(high), "kind": KINDS[kind], "photos": int(count)}
        for kind, counts in bins.items()
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
                scale=alt.Scale(domain=list(KINDS.values()), range=["#d97706", "#2f7fd1", "#8a929c"]),
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
    environment.filters["utc"] = lambda text: f"{moment(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    environment.filters["percent"] = lambda share: f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
    return environment.get_template("report.html.j2")
