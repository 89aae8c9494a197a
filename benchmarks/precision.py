"""Does the arithmetic change what a model says? ``python -m benchmarks.precision``.

The default and ``bdnet-fast`` mark BlurRaw's test photos in each arithmetic that this CPU has in hardware:
the score, and how far a photo's ``blurred_fraction`` lies from the one in fp32. Writes results/precision.csv.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from bdnet import Model
from bdnet.card import DEFAULT_MODEL
from bdnet.detect import BLURRED_PROBABILITY
from bdnet.metrics import confusion, scores
from bdnet.model import read_network
from benchmarks.data import data_folder
from benchmarks.marking import predict
from benchmarks.tables import write_csv
from pipeline.dataset import read_dataset, read_pair


def arithmetics(name: str) -> Iterator[tuple[str, Model]]:
    """The model in fp32, and in what else this machine has for it."""
    net, card = read_network(name)
    exact = replace(card, ranges={})
    with patch("bdnet.model.has_fast_bfloat16", return_value=False):
        yield "fp32", Model(net, exact, "cpu")
    if (quick := Model(net, exact, "cpu")).dtype.itemsize == 2:
        yield "bf16", quick
    if (quickest := Model(net, card, "cpu")).int8:
        yield "int8", quickest


def main() -> int:
    """Score all and write results/precision.csv."""
    photos = read_dataset(str(data_folder() / "blurraw"), "test")
    rows = []
    for name in (DEFAULT_MODEL, "bdnet-fast"):
        models = dict(arithmetics(name))
        matrices = dict.fromkeys(models, np.zeros((2, 2), np.int64))
        fractions: dict[str, list[float]] = {arithmetic: [] for arithmetic in models}
        for photo in photos:
            pixels, mask = read_pair(photo)
            for arithmetic, network in models.items():
                blurred = predict(network, pixels)[0] >= BLURRED_PROBABILITY
                matrices[arithmetic] = matrices[arithmetic] + confusion(blurred, mask > 0)
                fractions[arithmetic].append(float(blurred.mean()))
        for arithmetic, matrix in matrices.items():
            difference = np.abs(np.subtract(fractions[arithmetic], fractions["fp32"]))
            row = {"model": name, "arithmetic": arithmetic, "photos": len(photos)}
            row["mean_iou"] = f"{scores(matrix)['mean_iou']:.5f}"
            row["blurred_fraction_differs"] = f"{difference.mean():.4f}"
            rows.append({**row, "at_most": f"{difference.max():.4f}"})
    write_csv("precision", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
