"""From the network's probabilities to what is said of a photo. Pure functions with documented definitions."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from bdnet.output import BLUR_KINDS

Verdict = Literal["sharp", "partly_blurred", "blurred"]
Focus = Literal["all_sharp", "shallow_depth", "suspected_miss", "no_sharp_region"]

BLURRED_PROBABILITY = 0.5  # a pixel is blurred from here on
SUBJECT_SIGMA = 0.2  # of each side: where a subject is expected when the camera didn't say


@dataclass(frozen=True)
class Thresholds:
    """Where verdicts begin. None of them changes a stored measurement."""

    sharp_below: float = 0.10
    blurred_above: float = 0.90
    kind_from: float = 0.05
    no_sharp_region_below: float = 0.02
    subject_missed_from: float = 0.8


DEFAULT_THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Detection:
    """What BDNet says of one photo, at working size."""

    mask: np.ndarray  # bool H×W, True = blurred
    probability: np.ndarray  # float32 H×W
    blurred_fraction: float
    largest_sharp_fraction: float
    subject_blurred_fraction: float
    subject_source: str  # "exif" or "centre"
    uncertainty: float  # bits, 0 to 1
    blur_kind: str | None  # "motion", "defocus", None where hardly anything is blurred or no branch says
    kind_confidence: float | None
    verdict: Verdict
    focus: Focus


def measure(
    probability: np.ndarray,
    kinds: np.ndarray | None,
    subject_area: tuple[float, float, float, float] | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> Detection:
    """Measure one photo.

    Args:
        probability: float32 H×W, probability that a pixel is blurred.
        kinds: float32 2, probability of motion and of defocus; None where the network doesn't say.
        subject_area: x0, y0, x1, y1 as fractions of the upright photo, from EXIF.
    """
    mask = probability >= BLURRED_PROBABILITY
    blurred_fraction = float(mask.mean())
    sharp_fraction = largest_sharp_fraction(mask)
    rows, columns, source = subject_weights(mask.shape, subject_area)
    blurred, sharp = (float(rows @ part.astype(np.float64) @ columns) for part in (mask, ~mask))
    subject = blurred / (blurred + sharp)
    kind = int(kinds.argmax()) if kinds is not None and blurred_fraction >= thresholds.kind_from else None
    said = verdict(blurred_fraction, thresholds)
    return Detection(
        mask=mask,
        probability=probability,
        blurred_fraction=blurred_fraction,
        largest_sharp_fraction=sharp_fraction,
        subject_blurred_fraction=subject,
        subject_source=source,
        uncertainty=mean_entropy(probability),
        blur_kind=None if kind is None else BLUR_KINDS[kind],
        kind_confidence=None if kinds is None or kind is None else float(kinds[kind]),
        verdict=said,
        focus=focus(said, sharp_fraction, subject, thresholds),
    )


def verdict(blurred_fraction: float, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> Verdict:
    """Say how much of a photo is blurred, in a word."""
    if blurred_fraction < thresholds.sharp_below:
        return "sharp"
    return "blurred" if blurred_fraction > thresholds.blurred_above else "partly_blurred"


def focus(
    verdict: Verdict,
    largest_sharp_fraction: float,
    subject_blurred_fraction: float,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> Focus:
    """Say whether the focus is where it was wanted: blur beside a sharp subject is a style, not a fault."""
    if verdict == "sharp":
        return "all_sharp"
    if largest_sharp_fraction < thresholds.no_sharp_region_below:
        return "no_sharp_region"
    return "suspected_miss" if subject_blurred_fraction >= thresholds.subject_missed_from else "shallow_depth"


def largest_sharp_fraction(mask: np.ndarray) -> float:
    """Largest 4-connected component of sharp pixels over all pixels; mask bool H×W, True = blurred."""
    labels, count = ndimage.label(~mask)
    return float(np.bincount(labels.ravel())[1:].max() / mask.size) if count else 0.0


def mean_entropy(probability: np.ndarray) -> float:
    """Mean binary entropy of the pixels, in bits: 0 = sure everywhere, 1 = knows nothing."""
    # In float32: far cheaper than in float64, and the same to six digits.
    bits = np.zeros_like(probability)
    for p in (probability, 1 - probability):
        bits -= p * np.log2(np.maximum(p, np.float32(1e-30)))
    return float(bits.mean(dtype=np.float64))


def subject_weights(
    shape: tuple[int, ...], subject_area: tuple[float, float, float, float] | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Where the subject is: relative weights of rows and of columns, and their source, "exif" or "centre".

    Returns:
        float64 H and float64 W, a pixel's weight being their product, and the source.
    """
    height, width = shape
    if subject_area is not None:
        x0, y0, x1, y1 = subject_area
        rows, columns = np.zeros(height), np.zeros(width)
        # At least the pixel that the camera focused on.
        top, left = min(int(y0 * height), height - 1), min(int(x0 * width), width - 1)
        rows[top : max(top + 1, round(y1 * height))] = 1.0
        columns[left : max(left + 1, round(x1 * width))] = 1.0
        return rows, columns, "exif"
    y = (np.arange(height) + 0.5) / height - 0.5
    x = (np.arange(width) + 0.5) / width - 0.5
    return np.exp(-(y**2) / (2 * SUBJECT_SIGMA**2)), np.exp(-(x**2) / (2 * SUBJECT_SIGMA**2)), "centre"
