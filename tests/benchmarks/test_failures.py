"""Where a map is wrong: near the mask's border, in flat regions, elsewhere."""

import numpy as np

from benchmarks.failures import NEAR, REGIONS, Failure, region_rows, regions_of, worst

SIDE = 100


def half_flat():
    """Noise on the left, one grey on the right; blurred in the lower half."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    pixels[:, SIDE // 2 :] = 128
    truth = np.zeros((SIDE, SIDE), bool)
    truth[SIDE // 2 :] = True
    return pixels, truth


def region(regions, row, column):
    return REGIONS[regions[row, column]]


def test_a_pixel_lies_near_the_border_or_in_a_flat_region_or_elsewhere():
    regions = regions_of(*half_flat())
    middle = SIDE // 2
    assert region(regions, 10, 10) == "rest"
    assert region(regions, 10, 90) == "flat"
    # A border goes before flat, on both of its sides.
    assert {region(regions, middle + step, 90) for step in (-NEAR, NEAR - 1)} == {"border"}
    assert {region(regions, middle + step, 90) for step in (-NEAR - 1, NEAR)} == {"flat"}


def test_a_photo_blurred_all_over_has_no_border():
    pixels, truth = half_flat()
    for everywhere in (np.ones_like(truth), np.zeros_like(truth)):
        assert "border" not in {REGIONS[i] for i in np.unique(regions_of(pixels, everywhere))}


def failure(name, wrong, refined=(0, 0, 0), pixels=(2000, 3000, 5000)):
    map_ = np.zeros((SIDE, SIDE), np.float32)
    counts = np.array(pixels)
    return Failure(name, map_ > 1, map_, map_, counts, np.array(wrong), np.array(refined))


def test_shares_are_of_all_photos_pixels():
    rows = region_rows([failure("a", (100, 300, 0), (100, 600, 0)), failure("b", (300, 0, 100))])
    by_region = {row["region"]: row for row in rows}
    assert by_region["flat"] == {
        "region": "flat",
        "share_of_pixels": "0.3000",
        "share_of_wrong": "0.3750",
        "wrong": "0.0500",
        "wrong_after_crf": "0.1000",
    }


def test_the_worst_of_a_region_have_the_largest_share_of_it_wrong_unless_it_is_small():
    failures = [
        failure("much", (300, 700, 0), pixels=(5000, 5000, 0)),
        failure("flat", (0, 900, 0)),
        failure("border", (500, 0, 0)),
        failure("both", (400, 800, 0)),
        failure("small", (400, 400, 0), pixels=(400, 400, 9200)),
    ]
    assert [one.name for one in worst(failures, "flat")] == ["flat", "both"]
    assert [one.name for one in worst(failures, "border")] == ["border", "both"]
