"""Mark a photo as audits do, for figures that need the map itself."""

import numpy as np
from PIL import Image

from bdnet.model import Model
from bdnet.photo import size_at
from pipeline.scoring import resized


def predict(model: Model, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Mark a photo at the model's working size; the map has the photo's own size again.

    Args:
        model: the network.
        pixels: uint8 [H, W, 3].

    Returns:
        the probability of blurred, float32 [H, W]; and of each kind, float32 [2], of a network with kinds.
    """
    height, width, _ = pixels.shape
    size = size_at(width, height, model.card.working_size)
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    probabilities, kinds = model.predict(pixels.copy()[None])
    return resized(probabilities[0], (height, width)), None if kinds is None else kinds[0]
