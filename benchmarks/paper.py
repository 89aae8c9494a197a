"""Write docs/paper.md and its pictures from the tables in results/: ``python -m benchmarks.paper``.

The words are in templates/paper.md.j2. A table that isn't there yet is named with the command that makes it.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import altair as alt
import jinja2
import vl_convert

from bdnet.card import DEFAULT_MODEL, shipped_models
from benchmarks.ablation import ALL_SEEDS, ON_BLURDB2, VARIANTS
from benchmarks.comparison import SYSTEMS
from benchmarks.data import INVERTED_MASKS
from benchmarks.experiments import RATES, START
from benchmarks.tables import read_csv

DOCS = Path(__file__).parent.parent / "docs"
TEMPLATES = Path(__file__).parent / "templates"
TABLES = (
    *("scores", "comparison", "ablation", "ablation_blurdb2", "kfold", "training_curves"),
    *("pr_curves", "calibration", "verdict_thresholds", "archive_auc", "archive_thresholds"),
    *("failures", "network", "probes"),
)
FOLDS = 3
# What is shipped and made by today's recipes, and the paper's network with a short one.
FOLDED = (DEFAULT_MODEL, "bdnet-fast", "bdnet-resnet18, equal budget")
Row = dict[str, str]
# A column's title to a field's name, or to a function of the row.
Columns = dict[str, str | Callable[[Row], str]]


def interval(row: Row) -> str:
    """Mean IoU with its interval over photos."""
    score, low, high = (float(row[name]) for name in ("mean_iou", "mean_iou_low", "mean_iou_high"))
    return f"{score:.3f} ({low:.3f}–{high:.3f})"


def difference(row: Row) -> str:
    """Points of mean IoU beside the baseline, with the paired interval."""
    # No -0.0.
    values = [
        round(100 * float(row[name]), 1) + 0.0 for name in ("minus_baseline", "minus_low", "minus_high")
    ]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*values)


def rounded(name: str) -> Callable[[Row], str]:
    """A score with three decimals: the intervals over photos are some hundredths wide."""
    return lambda row: f"{float(row[name]):.3f}" if row[name] else ""


def percent(name: str) -> Callable[[Row], str]:
    """A share as per cent."""
    return lambda row: f"{100 * float(row[name]):.1f} %"


BY_KIND: Columns = {"motion": rounded("mean_iou_motion"), "defocus": rounded("mean_iou_defocus")}
COLUMNS: dict[str, Columns] = {
    "scores": {
        "method": "method",
        **{name: name for name in ("GMAC", "ms a photo")},
        "mean IoU": interval,
        "minus bdnet-resnet18": difference,
        "by photo": rounded("mean_iou_by_photo"),
        "on BlurDB2": rounded("mean_iou_blurdb2"),
        "pixel accuracy": rounded("pixel_accuracy"),
        "mean accuracy": rounded("mean_accuracy"),
        **BY_KIND,
        "blur's IoU, defocus": rounded("iou_blurred_defocus"),
        "kind, balanced accuracy": rounded("kind_balanced_accuracy"),
    },
    "comparison": {
        **{name: name for name in ("system", "start", "crops")},
        "M parameters": "parameters_m",
        "GMAC": "gmacs",
        "ms a photo": "ms",
        "mean IoU": interval,
        "minus BDNet": difference,
        "by photo": rounded("mean_iou_by_photo"),
        **BY_KIND,
        "F": rounded("f_beta"),
        "MAE": rounded("mae"),
        "AUC on archive/": rounded("archive_auc"),
    },
    "probes": {
        "system": "system",
        **{f"{rate:g}": f"{rate:g}" for rate in RATES},
        "chooses": "chosen",
        "rate in the table": "used",
    },
    "ablation": {
        **{name: name for name in ("changed", "to")},
        "mean IoU": interval,
        "minus the first row": difference,
        **BY_KIND,
    },
    "ablation_blurdb2": {
        "network": "network",
        "mean IoU": interval,
        "minus BDNet of the seed": difference,
        **BY_KIND,
    },
    "kfold": {
        **{name: name for name in ("model", "fold", "photos")},
        "mean IoU": interval,
        "kinds alike": rounded("mean_iou_kinds_alike"),
        **BY_KIND,
        "kind, balanced accuracy": rounded("kind_balanced_accuracy"),
    },
    "archive_auc": {
        **{name: name for name in ("method", "photos")},
        "AUC": rounded("auc"),
        "kind, balanced accuracy": rounded("kind_balanced_accuracy"),
    },
    "failures": {
        "where": "region",
        "of all pixels": percent("share_of_pixels"),
        "of all wrong pixels": percent("share_of_wrong"),
        "wrong there": percent("wrong"),
        "wrong after the CRF": percent("wrong_after_crf"),
    },
    "calibration": {
        **{name: name for name in ("model", "temperature")},
        "calibration error": rounded("calibration_error"),
        "log loss": rounded("log_loss"),
        "Brier score": rounded("brier"),
    },
    "verdict_thresholds": {
        "model": "model",
        'verdict "blurred" above': "blurred_above",
        **{name: rounded(name) for name in ("recall", "precision")},
        "wrongly blurred": rounded("wrongly_blurred"),
        "photos": lambda row: f"{row['photos_wrongly_blurred']} of {row['photos']}",
        "of archive/'s blurred": "archive_found",
        "of its sharp": "archive_wrongly",
    },
}


def markdown(rows: list[Row], columns: Columns) -> str:
    """A table, or nothing where there are no rows."""
    if not rows:
        return ""

    def cell(row: Row, of: str | Callable[[Row], str]) -> str:
        return row[of] if isinstance(of, str) else of(row)

    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row, of) for of in columns.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def waiting(results: dict[str, list[Row]]) -> dict[str, list[str]]:
    """By table the rows that no training has filled yet; these tables take hours and grow row by row."""
    systems = {row["system"] for row in results["comparison"]}
    variants = {(row["changed"], row["to"]) for row in results["ablation"]}
    pairs = {row["network"] for row in results["ablation_blurdb2"]}
    folds = {(row["model"], row["fold"]) for row in results["kfold"]}
    probed = {row["system"] for row in by_rate(results) if row["chosen"]}
    return {
        "kfold": [
            f"{model}, fold {fold}"
            for model in FOLDED
            for fold in range(FOLDS)
            if (model, str(fold)) not in folds
        ],
        "comparison": [system.name for system in SYSTEMS if system.name not in systems],
        "probes": [system.name for system in SYSTEMS if system.recipe == START and system.name not in probed],
        "ablation": [
            f"{changed}: {variant.name}"
            for changed, variant in VARIANTS
            if (changed, variant.name) not in variants
        ],
        "ablation_blurdb2": [
            name for name in (*(pair.name for pair in ON_BLURDB2), *ALL_SEEDS) if name not in pairs
        ],
    }


def everywhere(failures: list[Row], name: str) -> str:
    """A share of wrong pixels in all regions together."""
    wrong = sum(float(row["share_of_pixels"]) * float(row[name]) for row in failures)
    return f"{100 * wrong:.1f} %"


def answers(results: dict[str, list[Row]]) -> dict[str, defaultdict[str, str]]:
    """What the tables say to the paper's claims: by table and row a mean IoU or a difference, or a share."""
    scores, failures = results["scores"], results["failures"]
    found = {
        "models": {row["method"]: interval(row) for row in scores},
        "by_photo": {row["method"]: rounded("mean_iou_by_photo")(row) for row in scores},
        "accuracies": {
            row["method"]: f"{rounded('pixel_accuracy')(row)} and {rounded('mean_accuracy')(row)}"
            for row in scores
        },
        "variants": {row["to"]: difference(row) for row in results["ablation"]},
        "pairs": {row["network"]: difference(row) for row in results["ablation_blurdb2"]},
        "systems": {row["system"]: difference(row) for row in results["comparison"]},
        "system_scores": {row["system"]: interval(row) for row in results["comparison"]},
        "systems_by_photo": {
            row["system"]: rounded("mean_iou_by_photo")(row) for row in results["comparison"]
        },
        "folds": {f"{row['model']}, fold {row['fold']}": interval(row) for row in results["kfold"]},
        "failures": {row["region"]: percent("wrong")(row) for row in failures},
        "everywhere": {name: everywhere(failures, name) for name in ("wrong", "wrong_after_crf")},
    }
    return {name: defaultdict(lambda: "not measured yet", said) for name, said in found.items()}


def reliability(rows: list[Row]) -> alt.Chart:
    """Share of blurred pixels by probability, before and after the temperature."""
    line = alt.Chart(alt.Data(values=of_shipped(rows)), width=260, height=260).mark_line(point=True)
    return line.encode(
        x=alt.X("probability:Q", title="probability of blurred"),
        y=alt.Y("blurred:Q", title="share that is blurred"),
        color=alt.Color("temperature:N"),
        column=alt.Column("model:N", title=None),
    )


def precision_recall(rows: list[Row]) -> alt.Chart:
    """One curve a method."""
    shown = [row for row in rows if float(row["threshold"]) > 0]
    return (
        alt.Chart(alt.Data(values=shown), width=380, height=320)
        .mark_line()
        .encode(
            x=alt.X("recall:Q", scale=alt.Scale(domain=[0.4, 1], clamp=True)),
            y=alt.Y("precision:Q", scale=alt.Scale(domain=[0.6, 1])),
            color=alt.Color("method:N", scale=alt.Scale(scheme="dark2")),
            order=alt.Order("threshold:Q"),
        )
    )


def training(rows: list[Row]) -> alt.HConcatChart:
    """Loss and validation score of each run by epoch."""
    base = alt.Chart(alt.Data(values=of_shipped(rows)), width=320, height=200)
    common = {"x": alt.X("epoch:Q"), "color": alt.Color("run:N")}
    loss = base.mark_line().encode(y=alt.Y("loss:Q", scale=alt.Scale(zero=False)), **common)
    score = alt.Y("val_mean_iou:Q", title="validation mean IoU", scale=alt.Scale(zero=False))
    measured = base.transform_filter("datum.val_mean_iou != ''").mark_line(point=True)
    return alt.hconcat(loss, measured.encode(y=score, **common))


def of_shipped(rows: list[Row]) -> list[Row]:
    """Those of models that come with bdnet, the default first: nobody chooses a threshold for the others."""
    shipped = sorted(shipped_models(), key=lambda name: name != DEFAULT_MODEL)
    return [row for name in shipped for row in rows if row["model"] == name]


def with_costs(results: dict[str, list[Row]]) -> list[Row]:
    """The models' scores, with what a photo of 640×448 costs each on the machine of network.csv."""
    rows = []
    for row in results["scores"]:
        ways = {its["way"]: its for its in results["network"] if its["model"] == row["method"]}
        # The fastest of them that needs no other photo beside it.
        its = next((ways[way] for way in ("int8", "fused bf16", "fused fp32") if way in ways), None)
        costs = {"GMAC": "", "ms a photo": ""}
        if its:
            costs = {"GMAC": f"{float(its['gflop']) / 2:.1f}", "ms a photo": its["ms"]}
        rows.append(row | costs)
    return rows


def by_rate(results: dict[str, list[Row]]) -> list[Row]:
    """The probe's losses, a row for each system, with the rate of its row in the comparison."""
    used = {row["system"]: row["rate"] for row in results["comparison"]}
    losses: dict[str, Row] = defaultdict(dict)
    for row in results["probes"]:
        losses[row["system"]][row["rate"]] = row["loss"]
    return [
        {
            **dict.fromkeys(map("{:g}".format, RATES), ""),
            **its,
            "system": system,
            "chosen": min(its, key=lambda rate: float(its[rate])) if len(its) == len(RATES) else "",
            "used": used.get(system, ""),
        }
        for system, its in losses.items()
    ]


def with_archive(results: dict[str, list[Row]]) -> list[Row]:
    """The thresholds of the verdict, with what each says of archive/ where that was audited."""
    archive = {
        (row["model"], row["blurred_above"]): {
            "archive_found": f"{row['found']} of {row['blurred']}",
            "archive_wrongly": f"{row['wrongly_blurred']} of {row['sharp']}",
        }
        for row in results["archive_thresholds"]
    }
    unknown = {"archive_found": "", "archive_wrongly": ""}
    return [
        row | archive.get((row["model"], row["blurred_above"]), unknown)
        for row in of_shipped(results["verdict_thresholds"])
    ]


def picture(name: str) -> str:
    """Where a table's picture lies, beside paper.md."""
    return f"images/{name}.svg"


PICTURES = {"calibration": reliability, "pr_curves": precision_recall, "training_curves": training}


def page(results: dict[str, list[Row]]) -> str:
    """The text of docs/paper.md, whatever tables are there."""
    shown = results | {
        "scores": with_costs(results),
        "probes": by_rate(results),
        # Networks that others have added come last.
        "kfold": sorted(results["kfold"], key=lambda row: [*FOLDED, row["model"]].index(row["model"])),
        # One line of the calibration's bins is enough: the error is that of all.
        "calibration": [row for row in of_shipped(results["calibration"]) if row["from"] == "0.00"],
        "verdict_thresholds": with_archive(results),
    }
    tables = {name: markdown(shown[name], columns) for name, columns in COLUMNS.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = lambda text: f"`{text}`"
    return environment.get_template("paper.md.j2").render(
        results=results,
        tables=tables,
        pictures={name: picture(name) for name in PICTURES},
        waiting=waiting(results),
        answers=answers(results),
        default=DEFAULT_MODEL,
        inverted=INVERTED_MASKS,
        folds=FOLDS,
    )


def main() -> int:
    """Write docs/paper.md and docs/images/*.svg."""
    results = {name: read_csv(name) for name in TABLES}
    for name, draw in PICTURES.items():
        if results[name]:
            (DOCS / picture(name)).write_text(vl_convert.vegalite_to_svg(draw(results[name]).to_dict()))
    (DOCS / "paper.md").write_text(page(results))
    print("docs/paper.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
