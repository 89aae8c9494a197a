"""Post-processing of a soft blur map with the photo's colours: a dense CRF, or votes of superpixels.

Both need the extra ``refine``.
"""

from typing import Literal

import numpy as np

from bdnet.detect import BLURRED_PROBABILITY

Refinement = Literal["none", "crf", "superpixels"]

# Krähenbühl, Koltun: "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011;
# values of its public examples: how far and how strongly pixels agree by place, and by place and colour.
CRF_STEPS = 5
SMOOTHNESS = {"sxy": 3, "compat": 3}
APPEARANCE = {"sxy": 80, "srgb": 13, "compat": 10}

SUPERPIXELS = 400
COMPACTNESS = 10.0


def refine(pixels: np.ndarray, probability: np.ndarray, how: Refinement) -> np.ndarray:
    """Refine one photo's map.

    Args:
        pixels: uint8 RGB H×W×3.
        probability: float32 H×W, probability that a pixel is blurred.
        how: "none" gives the map back.

    Returns:
        float32 H×W.

    Raises:
        ValueError: the extra is not installed.
    """
    if how == "none":
        return probability
    try:
        return crf(pixels, probability) if how == "crf" else superpixel_votes(pixels, probability)
    except ImportError as error:
        raise ValueError(
            f"--refine {how} needs {error.name}: pip install '.[refine]' in the checkout"
        ) from error


def crf(pixels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Mean-field probabilities of a fully connected CRF over place and colour."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    height, width = probability.shape
    field = DenseCRF2D(width, height, 2)
    # Without this bound a sure pixel could never be talked out of it.
    blurred = probability.clip(0.01, 0.99).astype(np.float32)
    field.setUnaryEnergy(unary_from_softmax(np.stack([1 - blurred, blurred])))
    field.addPairwiseGaussian(**SMOOTHNESS)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(pixels), **APPEARANCE)
    return np.asarray(field.inference(CRF_STEPS), np.float32).reshape(2, height, width)[1]


def superpixel_votes(pixels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Every superpixel takes the share of its pixels that are called blurred.

    Achanta et al.: "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", IEEE TPAMI 34, 2012.
    """
    from skimage.segmentation import slic

    labels = slic(pixels, n_segments=SUPERPIXELS, compactness=COMPACTNESS, start_label=0)
    votes = np.bincount(labels.ravel(), weights=(probability >= BLURRED_PROBABILITY).ravel())
    return (votes / np.bincount(labels.ravel()))[labels].astype(np.float32)
