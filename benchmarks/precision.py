"""Does the arithmetic change the score? ``python -m benchmarks.precision``.

Scores the shipped model on BlurRaw's test photos in bf16, where the processor has it, and in fp32.
"""

import sys

import numpy as np

from bdnet import load, model
from bdnet.metrics import confusion, scores
from benchmarks.command import data_folder, write_csv
from pipeline.dataset import read_dataset, read_pair


def main() -> int:
    """Score both and write results/precision.csv."""
    photos = read_dataset(str(data_folder() / "blurraw"), "test")
    in_hardware = model.has_fast_bfloat16(load().device)
    rows = []
    for name in (["bf16"] if in_hardware else []) + ["fp32"]:
        model.has_fast_bfloat16 = lambda _device, fast=name == "bf16": fast
        network = load()
        matrix = np.zeros((2, 2), np.int64)
        for photo in photos:
            pixels, mask = read_pair(photo)
            matrix += confusion(network.probability(pixels) >= 0.5, mask > 0)
        rows.append(
            {"arithmetic": name, "photos": len(photos), "mean_iou": f"{scores(matrix)['mean_iou']:.5f}"}
        )
    write_csv("precision", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
