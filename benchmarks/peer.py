"""One way to look for blur, for ``benchmarks.peers``: ``python -m benchmarks.peer WAY FOLDER``."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

CORES = os.cpu_count() or 1


def cleanvision(folder: Path) -> None:
    """CleanVision's check for blur alone, with a process a core."""
    from cleanvision import Imagelab

    Imagelab(data_path=str(folder)).find_issues({"blurry": {}}, n_jobs=CORES, verbose=False)


def laplacian(folder: Path) -> None:
    """The script that tutorials give: variance of the Laplacian of the grey photo, with a process a core."""
    with ProcessPoolExecutor(CORES) as pool:
        print(sum(pool.map(_laplacian, sorted(folder.iterdir()), chunksize=8)))


def _laplacian(path: Path) -> float:
    import cv2

    cv2.setNumThreads(1)
    return float(cv2.Laplacian(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), cv2.CV_64F).var())


def authors(folder: Path) -> None:
    """BDNet on ResNet-152 in fp32, eager, one photo after the other."""
    import torch
    from PIL import Image

    from bdnet.networks import build
    from bdnet.preprocess import normalize

    net = build("bdnet-resnet152").eval()
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.thumbnail((640, 640))
            pixels = np.array(image.convert("RGB"))
        with torch.no_grad():
            print(net(normalize(torch.from_numpy(pixels)[None])).logits.argmax(1).float().mean().item())


class Predictor:
    """The callable class of Ray's guide, with the default network."""

    def __init__(self) -> None:
        import torch

        from bdnet.card import DEFAULT_MODEL, read_card
        from bdnet.networks import build

        torch.set_num_threads(CORES)
        self.net = build(read_card(DEFAULT_MODEL).arch).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from bdnet.preprocess import normalize

        with torch.inference_mode():
            logits = self.net(normalize(torch.from_numpy(np.ascontiguousarray(batch["image"])))).logits
        return {"mask": (logits[:, 1] > logits[:, 0]).numpy()}


def ray_recipe(folder: Path) -> None:
    """Ray Data's guide to offline batch inference: read_images at one size, a pool of actors, Parquet."""
    import ray

    ray.init(num_cpus=max(4, CORES), include_dashboard=False, log_to_driver=False)
    photos = ray.data.read_images(str(folder), mode="RGB", size=(480, 640))
    masks = photos.map_batches(
        Predictor, batch_size=16, num_cpus=2, compute=ray.data.ActorPoolStrategy(size=1)
    )
    masks.write_parquet(str(folder.parent / "masks"))


if __name__ == "__main__":
    way, photos = sys.argv[1:]
    {"cleanvision": cleanvision, "laplacian": laplacian, "authors": authors, "ray_recipe": ray_recipe}[way](
        Path(photos)
    )
