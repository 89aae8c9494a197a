"""Every definition of what is said of a photo, on masks made by hand, at its boundary."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from bdnet.detect import (
    Thresholds,
    focus,
    largest_sharp_fraction,
    mean_entropy,
    measure,
    subject_weights,
    verdict,
)

MOTION, DEFOCUS = np.array([0.7, 0.3], np.float32), np.array([0.1, 0.9], np.float32)


def rows_blurred(blurred, rows=100, columns=10):
    """The lowest rows blurred: so many hundredths of the photo."""
    probability = np.zeros((rows, columns), np.float32)
    probability[rows - blurred :] = 1.0
    return probability


def subject_blur(probability, area=None):
    detection = measure(probability, MOTION, area)
    return detection.subject_blurred_fraction, detection.subject_source


def test_a_pixel_is_blurred_from_probability_one_half_on():
    probability = np.array([[0.0, 0.49999997, 0.5, 1.0]], np.float32)
    detection = measure(probability, MOTION)
    assert detection.mask.dtype == np.bool_
    assert detection.mask.tolist() == [[False, False, True, True]]
    assert detection.blurred_fraction == 0.5
    assert detection.probability is probability


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, "sharp"),
        (0.0999, "sharp"),
        (0.10, "partly_blurred"),
        (0.90, "partly_blurred"),
        (0.9001, "blurred"),
        (1.0, "blurred"),
    ],
)
def test_verdict(fraction, expected):
    assert verdict(fraction) == expected


@pytest.mark.parametrize(
    ("blurred", "expected"),
    [(9, "sharp"), (10, "partly_blurred"), (90, "partly_blurred"), (91, "blurred")],
)
def test_the_verdict_is_that_of_the_blurred_fraction(blurred, expected):
    detection = measure(rows_blurred(blurred), MOTION)
    assert detection.blurred_fraction == blurred / 100
    assert detection.verdict == expected


@pytest.mark.parametrize(
    ("kinds", "kind", "confidence"), [(MOTION, "motion", 0.7), (DEFOCUS, "defocus", 0.9)]
)
def test_kind_is_the_likelier_one_with_its_probability(kinds, kind, confidence):
    detection = measure(rows_blurred(5), kinds)
    assert detection.blur_kind == kind
    assert detection.kind_confidence == pytest.approx(confidence)


def test_a_photo_with_less_than_a_twentieth_blurred_has_no_kind():
    detection = measure(rows_blurred(4), DEFOCUS)
    assert detection.blur_kind is None
    assert detection.kind_confidence is None


@pytest.mark.parametrize(
    ("said", "sharp_region", "subject", "expected"),
    [
        ("sharp", 0.0, 1.0, "all_sharp"),
        ("blurred", 0.0199, 0.0, "no_sharp_region"),
        ("blurred", 0.0199, 1.0, "no_sharp_region"),
        ("partly_blurred", 0.02, 0.8, "suspected_miss"),
        ("blurred", 0.02, 1.0, "suspected_miss"),
        ("partly_blurred", 0.02, 0.7999, "shallow_depth"),
        ("blurred", 0.05, 0.0, "shallow_depth"),
    ],
)
def test_focus(said, sharp_region, subject, expected):
    assert focus(said, sharp_region, subject) == expected


def test_exactly_two_hundredths_sharp_are_a_sharp_region():
    assert measure(rows_blurred(98), MOTION).focus != "no_sharp_region"
    assert measure(rows_blurred(99), MOTION).focus == "no_sharp_region"


@pytest.mark.parametrize("side", [10, 20, 50, 100])
def test_a_subject_blurred_to_exactly_eight_tenths_is_a_suspected_miss(side):
    probability = np.zeros((side, side), np.float32)
    probability[: side * 8 // 10] = 1.0
    detection = measure(probability, MOTION, (0.0, 0.0, 1.0, 1.0))
    assert detection.subject_blurred_fraction == 0.8
    assert detection.focus == "suspected_miss"


def test_other_thresholds_judge_the_same_measurements_anew():
    strict = Thresholds(
        sharp_below=0.5, blurred_above=0.55, kind_from=0.7, no_sharp_region_below=0.5, subject_missed_from=0.1
    )
    usual, judged = measure(rows_blurred(60), MOTION), measure(rows_blurred(60), MOTION, None, strict)
    assert (usual.verdict, usual.focus, usual.blur_kind) == ("partly_blurred", "shallow_depth", "motion")
    assert (judged.verdict, judged.focus, judged.blur_kind) == ("blurred", "no_sharp_region", None)
    assert judged.largest_sharp_fraction == usual.largest_sharp_fraction
    assert judged.subject_blurred_fraction == usual.subject_blurred_fraction


@pytest.mark.parametrize(
    ("picture", "fraction"),
    [
        (["####"], 0.0),
        (["...."], 1.0),
        (["..#."], 2 / 4),
        ([".#", "#."], 1 / 4),  # touching at a corner only is not connected
        (["..", "#."], 3 / 4),
        ([".#..", "##..", "..##"], 4 / 12),
        (["#.#", "...", "#.#"], 5 / 9),
        (["."], 1.0),
    ],
)
def test_largest_sharp_fraction_is_the_largest_4_connected_part(picture, fraction):
    mask = np.array([[pixel == "#" for pixel in row] for row in picture])
    assert largest_sharp_fraction(mask) == fraction
    assert largest_sharp_fraction(mask.T) == fraction


@pytest.mark.parametrize(
    ("probability", "bits"),
    [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.811278), (0.75, 0.811278)],
)
def test_uncertainty_is_the_mean_binary_entropy_in_bits(probability, bits):
    assert mean_entropy(np.full((3, 5), probability, np.float32)) == pytest.approx(bits, abs=1e-6)
    half_sure = np.array([[probability, 0.0]], np.float32)
    assert measure(half_sure, MOTION).uncertainty == pytest.approx(bits / 2, abs=1e-6)


def test_the_subject_is_where_the_camera_said():
    probability = np.zeros((40, 60), np.float32)
    probability[10:20, 30:45] = 1.0
    assert subject_blur(probability, (0.5, 0.25, 0.75, 0.5)) == (1.0, "exif")
    assert subject_blur(probability, (0.5, 0.25, 0.75, 0.75)) == (0.5, "exif")
    assert subject_blur(probability, (0.0, 0.0, 0.5, 1.0)) == (0.0, "exif")


@pytest.mark.parametrize(
    ("area", "row", "column"),
    [
        ((0.5, 0.5, 0.5, 0.5), 20, 30),  # a point
        ((1.0, 1.0, 1.0, 1.0), 39, 59),  # the last corner
        ((0.0, 0.0, 0.0, 0.0), 0, 0),
        ((0.5, 0.5, 0.501, 0.501), 20, 30),  # smaller than a pixel
        ((0.5, 0.5, 0.25, 0.25), 20, 30),  # ends before it starts
    ],
)
def test_a_degenerate_subject_area_is_the_pixel_that_was_focused_on(area, row, column):
    probability = np.zeros((40, 60), np.float32)
    assert subject_blur(probability, area) == (0.0, "exif")
    probability[row, column] = 1.0
    assert subject_blur(probability, area) == (1.0, "exif")


def test_without_an_area_the_subject_is_a_centred_gaussian_of_a_fifth_of_each_side():
    rows, columns, source = subject_weights((100, 200), None)
    assert source == "centre"
    weights = np.outer(rows, columns)
    weights /= weights.sum()
    y, x = (np.mgrid[:100, :200] + 0.5) / np.array([100, 200]).reshape(2, 1, 1)
    assert (weights * y).sum() == pytest.approx(0.5)
    assert (weights * x).sum() == pytest.approx(0.5)
    # One σ from the middle along either side the weight has fallen to e^(-1/2), two σ to e^(-2).
    middle = weights[49:51, 99:101].mean()
    for row, column in ((50, 140), (70, 100)):
        assert weights[row, column] / middle == pytest.approx(np.exp(-1 / 2), rel=0.03)
    for row, column in ((50, 180), (90, 100)):
        assert weights[row, column] / middle == pytest.approx(np.exp(-2), rel=0.06)


def test_blur_in_the_middle_weighs_more_than_blur_at_the_rim():
    centre = np.zeros((60, 90), np.float32)
    centre[20:40, 30:60] = 1.0
    inside, source = subject_blur(centre)
    assert source == "centre"
    # σ = 0.2 of a side: a third of each side around the middle holds erf((1/6) / (0.2 √2))² / the part of
    # the bell that lies within the photo.
    assert inside == pytest.approx((0.59535 / 0.98758) ** 2, abs=0.01)
    assert subject_blur(1 - centre)[0] == pytest.approx(1 - inside)


@pytest.mark.parametrize("area", [None, (0.2, 0.1, 0.9, 0.8)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 13), (17, 31), (480, 640)])
def test_all_blurred_is_exactly_1_however_the_pixels_weigh(shape, area):
    assert subject_blur(np.ones(shape, np.float32), area)[0] == 1.0
    assert subject_blur(np.zeros(shape, np.float32), area)[0] == 0.0


FRACTIONS = st.floats(0, 1, width=32)


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FRACTIONS),
    FRACTIONS,
    st.none() | st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS),
)
def test_whatever_the_network_says_the_measurements_are_fractions_and_agree(probability, motion, area):
    detection = measure(probability, np.array([motion, 1 - motion], np.float32), area)
    for field in fields(detection):
        if field.name.endswith(("_fraction", "_confidence")) and getattr(detection, field.name) is not None:
            assert 0 <= getattr(detection, field.name) <= 1, field.name
    assert -1e-9 <= detection.uncertainty <= 1 + 1e-9
    assert detection.largest_sharp_fraction <= 1 - detection.blurred_fraction + 1e-9
    assert (detection.blur_kind is None) == (detection.kind_confidence is None)
    assert detection.subject_source == ("exif" if area else "centre")
    # Both can be said again later from what was stored.
    assert detection.verdict == verdict(detection.blurred_fraction)
    assert detection.focus == focus(
        detection.verdict, detection.largest_sharp_fraction, detection.subject_blurred_fraction
    )
