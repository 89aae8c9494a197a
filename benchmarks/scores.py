"""Score the shipped model and the peers' maps on BlurRaw's test photos: ``python -m benchmarks.scores``.

Every row comes from ``jobs.evaluate``; the model's row is the one figure that its card quotes.
"""

import sys
import tempfile

from benchmarks.command import data_folder, run, write_csv

METRICS = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou", "iou_blurred", "f_beta", "mae")
PEERS = ("EFPN", "EHS", "JNB")


def main() -> int:
    """Evaluate all and write results/scores.csv."""
    data = data_folder()
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for name in ("bdnet-resnet18", *PEERS):
            what = ["--maps", str(data / "peer_maps" / name)] if name in PEERS else ["--model", name]
            for threshold in ("0.5", "otsu"):
                arguments = [str(data / "blurraw"), *what, "--split", "test", "--threshold", threshold]
                result = run("jobs.evaluate", *arguments, "--out", f"{out}/{name}-{threshold}")
                low, high = result["mean_iou_interval"]
                rows.append(
                    {
                        "method": name,
                        "threshold": threshold,
                        "photos": result["photos"],
                        **{metric: f"{result[metric]:.5f}" for metric in METRICS},
                        "mean_iou_low": f"{low:.5f}",
                        "mean_iou_high": f"{high:.5f}",
                        "mean_iou_per_photo": f"{result['per_photo']['mean_iou']:.5f}",
                        "mean_iou_motion": f"{result['by_kind']['motion']['mean_iou']:.5f}",
                        "mean_iou_defocus": f"{result['by_kind']['defocus']['mean_iou']:.5f}",
                    }
                )
    write_csv("scores", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
