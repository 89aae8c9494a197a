"""Precision and recall by threshold, all pixels pooled: ``python -m benchmarks.curves``.

Of the shipped models and the peers' published maps, on BlurRaw's test photos; writes results/pr_curves.csv.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import bdnet
from bdnet.card import shipped_models
from benchmarks.data import PUBLISHED, data_folder
from benchmarks.marking import predict
from benchmarks.tables import write_csv
from pipeline.dataset import parse_grey, read_dataset, read_pair
from pipeline.scoring import resized

LEVELS = 256
PRINTED = range(0, LEVELS, 8)


def curve_rows(name: str, counts: np.ndarray) -> Iterator[dict[str, Any]]:
    """Precision and recall of blurred = map ≥ level; counts int64 [2, LEVELS]: sharp and blurred pixels."""
    above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    for level in PRINTED:
        wrong, right = above[:, level]
        yield {
            "method": name,
            "threshold": f"{level / (LEVELS - 1):.3f}",
            "precision": f"{right / max(1, right + wrong):.4f}",
            "recall": f"{right / counts[1].sum():.4f}",
        }


def main() -> int:
    """Count the pixels of every map by truth and level, and write results/pr_curves.csv."""
    data = data_folder()
    models = {name: bdnet.load(name) for name in shipped_models()}
    counts = {name: np.zeros((2, LEVELS), np.int64) for name in (*models, *PUBLISHED)}
    for photo in read_dataset(str(data / "blurraw"), "test"):
        pixels, mask = read_pair(photo)
        for name in counts:
            if name in models:
                soft, _ = predict(models[name], pixels)
            else:
                file = data / "peer_maps" / name / f"{photo.name}.png"
                given = parse_grey(file.read_bytes(), str(file)).astype(np.float32) / 255
                soft = resized(given, mask.shape)
            levels = np.rint(soft * (LEVELS - 1)).astype(np.int64)
            both = np.bincount(levels.ravel() + LEVELS * (mask > 0).ravel(), minlength=2 * LEVELS)
            counts[name] += both.reshape(2, LEVELS)
    write_csv("pr_curves", [row for name, its in counts.items() for row in curve_rows(name, its)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
