"""Put a trained model among those that come with bdnet: ``python -m benchmarks.ship MODEL NAME …``.

MODEL is the ``model/`` folder of a ``jobs.train --all-photos``. Its card gets the out-of-fold scores that
``benchmarks.out_of_fold`` wrote under NAME, where folds were trained; its temperature, where they have held
out every training photo; and the scores on the test photos, taken here.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import bdnet
from bdnet.card import CARD_FILE, WEIGHTS_FILE, read_folder
from bdnet.metrics import SCORES
from benchmarks.command import run
from benchmarks.data import data_folder
from benchmarks.tables import read_csv

BLURRAW = "BlurRaw, 800 training photos (Shi, Xu, Jia: Discriminative Blur Detection Features, CVPR 2014)"


@dataclass(frozen=True)
class Settings:
    """Ship a model."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of the trained model."""
    name: Annotated[str, tyro.conf.Positional]
    """Name under which it is loaded, and its name in kfold.csv and calibration.csv."""
    choices: str
    """For the card: which photos chose network, recipe and epochs, and what was known of the test photos."""


def main() -> int:
    """Write bdnet/models/NAME."""
    settings = tyro.cli(Settings, description=__doc__)
    weights, card = read_folder(settings.model)
    folds = [row for row in read_csv("kfold") if (row["model"], row["fold"]) == (settings.name, "all")]
    calibration = [row for row in read_csv("calibration") if row["model"] == settings.name]
    scores: dict[str, Any] = {}
    temperatures: set[float] = set()
    if folds:
        photos = int(folds[0]["photos"])
        names = (*SCORES, "kind_balanced_accuracy")
        scores["out_of_fold"] = {"photos": photos, **{name: float(folds[0][name]) for name in names}}
        if photos == card.data["training_photos"]:
            temperatures = {float(row["temperature"]) for row in calibration} - {1.0}
    if not temperatures:
        print(f"{settings.name}: its folds haven't held out every photo: no temperature", file=sys.stderr)
    folder = Path(bdnet.__file__).parent / "models" / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    card = dataclasses.replace(
        card,
        temperature=temperatures.pop() if temperatures else 1.0,
        data={**card.data, "name": BLURRAW},
        training={**card.training, "choices": settings.choices},
        scores=scores,
    )
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / CARD_FILE).write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(data_folder() / "blurraw"), "--model", settings.name, "--out", out]
        result = run("jobs.evaluate", *arguments)
    test = {name: result[name] for name in ("photos", *SCORES, "mae", "mean_iou_interval")}
    card.scores["test"] = {
        "command": f"python -m jobs.evaluate BLURRAW --model {settings.name} --out OUT",
        **test,
    }
    (folder / CARD_FILE).write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n")
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
