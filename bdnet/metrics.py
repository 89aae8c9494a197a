"""How well a blur mask agrees with the truth: scores of 2×2 confusion matrices.

A matrix is int64 [2, 2], rows truth, columns prediction, class 1 = blurred. Photos are kept as one matrix
each, because pooling, splitting by kind and resampling are then sums. torchmetrics computes the same scores
but only from pixels, so it can't resample photos; the tests hold these formulas to torchmetrics' own.
"""

from collections.abc import Callable

import numpy as np

# The blur and saliency literature weighs precision above recall.
BETA_SQUARED = 0.3
BOOTSTRAP_SAMPLES = 2000
# A confusion matrix as columns, by truth and prediction.
CELLS = ("tn", "fp", "fn", "tp")
SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou", "iou_blurred", "f_beta")


def confusion(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Count the pixels of two boolean masks of one shape: int64 [2, 2]."""
    assert prediction.dtype == truth.dtype == np.bool_
    assert prediction.shape == truth.shape
    cells = truth.ravel().astype(np.uint8) * 2 + prediction.ravel()
    return np.bincount(cells, minlength=4).astype(np.int64).reshape(2, 2)


def score_stack(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Score every matrix of an int64 [..., 2, 2] stack by itself: one float64 [...] array per name in SCORES.

    Means go over the classes present in the mask or in the prediction, so a photo that is sharp and called
    sharp scores 1. ``iou_blurred`` and ``f_beta`` are NaN where blur is in neither.
    """
    c = confusions.astype(np.float64)
    hits = np.diagonal(c, axis1=-2, axis2=-1)
    true, called, total = c.sum(-1), c.sum(-2), c.sum((-2, -1))
    assert (total > 0).all()
    union = true + called - hits
    classes = (union > 0).sum(-1)
    iou = hits / np.maximum(union, 1)
    accuracy = hits / np.maximum(true, 1)
    tp, fn, fp = c[..., 1, 1], c[..., 1, 0], c[..., 0, 1]
    blur = np.where(union[..., 1] > 0, 1.0, np.nan)
    weighted = (1 + BETA_SQUARED) * tp
    return {
        "pixel_accuracy": hits.sum(-1) / total,
        "mean_accuracy": accuracy.sum(-1) / classes,
        "mean_iou": iou.sum(-1) / classes,
        "fw_iou": (true * iou).sum(-1) / total,
        "iou_blurred": blur * iou[..., 1],
        "f_beta": blur * weighted / np.maximum(weighted + BETA_SQUARED * fn + fp, BETA_SQUARED),
    }


def scores(confusion: np.ndarray) -> dict[str, float | None]:
    """Score one int64 [2, 2] matrix; None where ``score_stack`` has NaN."""
    return {name: _number(value) for name, value in score_stack(confusion).items()}


def scores_per_photo(confusions: np.ndarray) -> dict[str, float | None]:
    """Score each photo of an int64 [photos, 2, 2] stack, then average over the photos that have the score."""
    stack = score_stack(confusions)
    defined = {name: values[~np.isnan(values)] for name, values in stack.items()}
    return {name: float(values.mean()) if values.size else None for name, values in defined.items()}


def otsu(values: np.ndarray) -> int:
    """Otsu's threshold of a uint8 map: blurred = value > threshold.

    It makes the between-class variance over 256 bins largest, and is the lowest of several such. A map of
    one value has no two classes; it gets 127, the fixed threshold.
    """
    assert values.dtype == np.uint8
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    if (counts > 0).sum() < 2:
        return 127
    moment = np.cumsum(counts * np.arange(256))
    # Over the product of the class sizes, only where both classes have pixels.
    spread = np.square(moment[-1] * below - moment * below[-1])
    variance = np.divide(spread, below * above, out=np.zeros(256), where=(below > 0) & (above > 0))
    return int(variance.argmax())


def bootstrap_interval(
    counted: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, float]:
    """95 % interval of a score when the photos are drawn again with replacement.

    Args:
        counted: what each photo adds to a sum, [photos, …]: int64 [photos, …, 2, 2] for confusion matrices.
            Two methods beside each other in such a stack are drawn together: the interval of a paired
            difference.
        statistic: maps the sums of drawn photos, [samples, …], to a score each, [samples].
    """
    photos, *rest = counted.shape
    assert photos > 0
    draw = np.random.default_rng(0)
    flat = counted.reshape(photos, -1)
    # How often each photo was drawn, one sample at a time: memory stays at one row whatever the photos.
    pooled = [
        np.bincount(draw.integers(photos, size=photos), minlength=photos) @ flat
        for _ in range(BOOTSTRAP_SAMPLES)
    ]
    values = statistic(np.stack(pooled).reshape(BOOTSTRAP_SAMPLES, *rest))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)
