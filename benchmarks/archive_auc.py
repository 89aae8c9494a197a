"""Does ``blurred_fraction`` tell blurred photos from sharp ones? ``python -m benchmarks.archive_auc``.

Audits archive/ with ``jobs.audit``: each scene was taken sharp (_S), out of focus (_F) and shaken (_M). Then
compares with the usual script, the variance of the Laplacian at 640 pixels. What verdicts by each threshold
would be goes to archive_thresholds.csv.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from bdnet.card import shipped_models
from bdnet.photo import decode
from benchmarks.command import run
from benchmarks.data import data_folder
from benchmarks.out_of_fold import BLURRED_ABOVE
from benchmarks.tables import write_csv
from pipeline.delta import read_table, scan

KINDS = {"F": "defocus", "M": "motion"}


def label(uri: str) -> str:
    """S, F or M from the photo's name."""
    return Path(uri).stem.rsplit("_", 1)[1]


def variance_of_laplacian(photo: Path) -> float:
    """Higher = sharper; grey, long side 640."""
    pixels = decode(photo.read_bytes(), 640).pixels
    assert pixels is not None
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    return float(ndimage.laplace(grey).var())


def audited(model: str, archive: Path) -> list[dict[str, Any]]:
    """What an audit with ``model`` says of each photo of the archive."""
    with tempfile.TemporaryDirectory() as out:
        result = run("jobs.audit", str(archive), "--out", out, "--model", model)
        found = scan(read_table(result["table"]), "SELECT uri, blurred_fraction, blur_kind FROM delta")
        return [row for part in found for row in part.to_pylist()]


def auc_row(model: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """How well the share of blurred pixels, and the kind, fit the photos' names."""
    blurred = [label(row["uri"]) != "S" for row in rows]
    with_kind = [row for row in rows if label(row["uri"]) in KINDS]
    truth = [KINDS[label(row["uri"])] for row in with_kind]
    said = [row["blur_kind"] or "none" for row in with_kind]
    return {
        "method": f"{model} blurred_fraction",
        "photos": str(len(rows)),
        "auc": f"{roc_auc_score(blurred, [row['blurred_fraction'] for row in rows]):.4f}",
        "kind_balanced_accuracy": f"{balanced_accuracy_score(truth, said):.4f}",
    }


def threshold_rows(model: str, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """How many of the blurred and of the sharp photos have more blurred pixels than each threshold."""
    sharp = [row["blurred_fraction"] for row in rows if label(row["uri"]) == "S"]
    blurred = [row["blurred_fraction"] for row in rows if label(row["uri"]) != "S"]
    return [
        {
            "model": model,
            "blurred_above": f"{threshold:.2f}",
            "blurred": str(len(blurred)),
            "found": str(sum(share > threshold for share in blurred)),
            "sharp": str(len(sharp)),
            "wrongly_blurred": str(sum(share > threshold for share in sharp)),
        }
        for threshold in BLURRED_ABOVE
    ]


def main() -> int:
    """Audit, compute the AUCs and write results/archive_auc.csv and archive_thresholds.csv."""
    archive = data_folder() / "archive"
    said = {model: audited(model, archive) for model in shipped_models()}
    rows = [auc_row(model, of_photos) for model, of_photos in said.items()]
    photos = sorted(archive.glob("*.jpg"))
    sharpness = [variance_of_laplacian(photo) for photo in photos]
    rows.append(
        {
            "method": "variance of Laplacian at 640",
            "photos": str(len(photos)),
            "auc": f"{roc_auc_score([label(str(photo)) == 'S' for photo in photos], sharpness):.4f}",
            "kind_balanced_accuracy": "",
        }
    )
    write_csv("archive_auc", rows)
    write_csv("archive_thresholds", [row for model in said for row in threshold_rows(model, said[model])])
    return 0


if __name__ == "__main__":
    sys.exit(main())
