import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.filters import threshold_otsu
from torchmetrics.classification import BinaryFBetaScore, MulticlassAccuracy, MulticlassJaccardIndex

from bdnet import metrics

ALL_SHARP = np.array([[50, 0], [0, 0]])
HALF_RIGHT = np.array([[20, 10], [5, 15]])


def two_masks(seed, agree=0.8):
    draw = np.random.default_rng(seed)
    truth = draw.random((40, 30)) < 0.3
    return np.where(draw.random(truth.shape) < agree, truth, ~truth), truth


def test_confusion_has_truth_in_rows_and_prediction_in_columns():
    truth = np.array([[True, True, True, False]])
    prediction = np.array([[True, False, False, False]])
    assert metrics.confusion(prediction, truth).tolist() == [[1, 0], [2, 1]]


@given(st.data())
def test_confusion_counts_every_pixel_once(data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=8))
    prediction, truth = (data.draw(arrays(np.bool_, shape)) for _ in range(2))
    matrix = metrics.confusion(prediction, truth)
    assert matrix.dtype == np.int64
    assert matrix[1].sum() == truth.sum()
    assert matrix[:, 1].sum() == prediction.sum()
    assert matrix.sum() == truth.size


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("pixel_accuracy", MulticlassAccuracy(num_classes=2, average="micro")),
        ("mean_accuracy", MulticlassAccuracy(num_classes=2, average="macro")),
        ("mean_iou", MulticlassJaccardIndex(num_classes=2, average="macro")),
        ("fw_iou", MulticlassJaccardIndex(num_classes=2, average="weighted")),
        ("f_beta", BinaryFBetaScore(beta=0.3**0.5)),
    ],
)
def test_scores_are_those_of_torchmetrics(name, reference, seed):
    prediction, truth = two_masks(seed)
    reference.reset()
    expected = reference(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long())
    assert metrics.scores(metrics.confusion(prediction, truth))[name] == pytest.approx(
        float(expected), abs=1e-6
    )


def test_iou_blurred_is_that_of_torchmetrics_class_1():
    prediction, truth = two_masks(7)
    reference = MulticlassJaccardIndex(num_classes=2, average="none")
    expected = reference(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long())[1]
    assert metrics.scores(metrics.confusion(prediction, truth))["iou_blurred"] == pytest.approx(
        float(expected)
    )


def test_a_sharp_photo_called_sharp_is_perfect_and_has_no_blur_to_score():
    assert metrics.scores(ALL_SHARP) == {
        "pixel_accuracy": 1.0,
        "mean_accuracy": 1.0,
        "mean_iou": 1.0,
        "fw_iou": 1.0,
        "iou_blurred": None,
        "f_beta": None,
    }


def test_blur_found_in_a_sharp_photo_counts_as_a_class_with_iou_0():
    scored = metrics.scores(np.array([[75, 25], [0, 0]]))
    assert scored["mean_iou"] == pytest.approx((0.75 + 0) / 2)
    assert scored["mean_accuracy"] == pytest.approx((0.75 + 0) / 2)
    assert scored["iou_blurred"] == scored["f_beta"] == 0.0


def test_per_photo_scores_average_over_the_photos_that_have_them():
    scored = metrics.scores_per_photo(np.stack([ALL_SHARP, HALF_RIGHT]))
    assert scored["iou_blurred"] == pytest.approx(15 / 30)
    assert scored["mean_iou"] == pytest.approx((1 + (20 / 35 + 15 / 30) / 2) / 2)
    assert metrics.scores_per_photo(ALL_SHARP[None])["f_beta"] is None


@pytest.mark.parametrize("seed", range(5))
def test_otsu_splits_as_scikit_image_does(seed):
    draw = np.random.default_rng(seed)
    values = (
        np.concatenate([draw.normal(60, 20, 900), draw.normal(170, 30, 600)]).clip(0, 255).astype(np.uint8)
    )
    assert np.array_equal(values > metrics.otsu(values), values > threshold_otsu(values))


def test_otsu_of_two_values_separates_them():
    values = np.array([[10, 200], [10, 200]], np.uint8)
    assert (values > metrics.otsu(values)).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(("value", "blurred"), [(0, False), (127, False), (128, True), (255, True)])
def test_otsu_of_a_map_of_one_value_is_the_fixed_threshold(value, blurred):
    values = np.full((3, 3), value, np.uint8)
    assert (values > metrics.otsu(values)).all() == blurred


def mean_iou(pooled):
    return metrics.score_stack(pooled)["mean_iou"]


def test_bootstrap_interval_holds_the_pooled_score_and_repeats():
    matrices = np.stack([metrics.confusion(*two_masks(seed, agree=0.6 + 0.01 * seed)) for seed in range(30)])
    low, high = metrics.bootstrap_interval(matrices, mean_iou)
    assert low < mean_iou(matrices.sum(0)) < high
    assert (low, high) == metrics.bootstrap_interval(matrices, mean_iou)


def test_bootstrap_interval_has_the_width_of_the_normal_approximation():
    # The pixel accuracy of equally large photos is a mean, whose standard error is known.
    draw = np.random.default_rng(0)
    right = draw.integers(400, 900, 200)
    matrices = np.zeros((200, 2, 2), np.int64)
    matrices[:, 1, 1], matrices[:, 1, 0] = right, 1000 - right
    low, high = metrics.bootstrap_interval(
        matrices, lambda pooled: metrics.score_stack(pooled)["pixel_accuracy"]
    )
    assert high - low == pytest.approx(2 * 1.96 * (right / 1000).std() / 200**0.5, rel=0.08)


def test_a_method_beside_itself_differs_by_nothing_however_photos_are_drawn():
    rng = np.random.default_rng(0)
    one, other = rng.integers(1, 1000, (2, 30, 2, 2))

    def difference(stack):
        return mean_iou(stack[:, 0]) - mean_iou(stack[:, 1])

    assert metrics.bootstrap_interval(np.stack([one, one], axis=1), difference) == (0, 0)
    low, high = metrics.bootstrap_interval(np.stack([one, other], axis=1), difference)
    assert low < difference(np.stack([one.sum(0), other.sum(0)])[None])[0] < high


def test_bootstrap_interval_of_equal_photos_has_no_width():
    low, high = metrics.bootstrap_interval(np.stack([HALF_RIGHT] * 5), mean_iou)
    assert low == pytest.approx(high)
