"""Score the shipped models and the peers' maps on BlurRaw's test photos: ``python -m benchmarks.scores``.

Every row comes from ``jobs.evaluate``. Models are scored on the paper's BlurDB2, windows of 256² of these
photos, too. Taken here are the balanced accuracy of the kind of blur and the differences from the paper's
network, paired by photo.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from sklearn.metrics import balanced_accuracy_score

from bdnet.card import shipped_models
from bdnet.model import load
from bdnet.output import BLUR_KINDS
from benchmarks.command import run
from benchmarks.data import PUBLISHED, data_folder
from benchmarks.experiments import read_scored, score_columns
from benchmarks.marking import predict
from benchmarks.tables import write_csv
from pipeline.dataset import read_dataset, read_pair

# The paper's network among the shipped models.
PAPERS = "bdnet-resnet18"


def kind_balanced_accuracy(name: str) -> float:
    """Of the kind that a model says of each test photo, whatever part of it is blurred."""
    model = load(name)
    photos = read_dataset(str(data_folder() / "blurraw"), "test")
    said = []
    for photo in photos:
        kinds = predict(model, read_pair(photo)[0])[1]
        assert kinds is not None
        said.append(BLUR_KINDS[int(kinds.argmax())])
    return float(balanced_accuracy_score([photo.kind for photo in photos], said))


def mean_iou_of_patches(name: str, patches: str, out: str) -> float:
    """Mean IoU of a patch dataset's test photos, by one confusion matrix."""
    result = run(
        "jobs.evaluate", patches, "--model", name, "--split", "test", "--out", f"{out}/{name}-patches"
    )
    return result["mean_iou"]


def main() -> int:
    """Evaluate all and write results/scores.csv."""
    data = data_folder()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out:
        blurdb2 = f"{out}/blurdb2"
        run("jobs.prepare", str(data / "blurraw"), "--cut", "blurdb2", "--split", "test", "--out", blurdb2)
        methods = (*shipped_models(), *PUBLISHED)
        for name in methods:
            what = ["--maps", str(data / "peer_maps" / name)] if name in PUBLISHED else ["--model", name]
            run("jobs.evaluate", str(data / "blurraw"), *what, "--split", "test", "--out", f"{out}/{name}")
        paper = read_scored(Path(out, PAPERS))
        baseline = dict(zip(paper.photos, paper.confusions, strict=True))
        for name in methods:
            scored = read_scored(Path(out, name))
            row = {"method": name, "photos": scored.result["photos"], **score_columns(scored, baseline)}
            row |= {"mean_iou_blurdb2": "", "kind_balanced_accuracy": ""}
            if name not in PUBLISHED:
                row["mean_iou_blurdb2"] = f"{mean_iou_of_patches(name, blurdb2, out):.5f}"
                row["kind_balanced_accuracy"] = f"{kind_balanced_accuracy(name):.4f}"
            rows.append(row)
    write_csv("scores", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
