"""Random crops: reproducible, image and mask always together, masks always black and white."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdnet.augment import Augmentation, disk_kernel, motion_kernel, random_crop
from bdnet.output import BLUR_KINDS
from bdnet.recipes import RECIPES

PLAIN = Augmentation(crop=64)
EVERYTHING = Augmentation(
    crop=64, scale=(0.8, 1.25), flip_vertical=0.5, colour=1, whole_frame_blur=0.5, noise=1, jpeg=1
)


def encoding(height=120, width=150):
    """A picture that says of every pixel its mask (red), its column (green) and its row (blue)."""
    y, x = np.mgrid[:height, :width]
    mask = np.where((x // 10 + y // 15) % 3 == 0, 255, 0).astype(np.uint8)
    return np.stack([mask, x, y], axis=-1).astype(np.uint8), mask


def crop(settings, seed=0, image=None, mask=None, kind="motion"):
    if image is None:
        image, mask = encoding()
    return random_crop(image, mask, kind, settings, np.random.default_rng(seed))


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING])
def test_the_same_seed_gives_the_same_crop_and_another_seed_another(settings):
    first, again, other = crop(settings, 5), crop(settings, 5), crop(settings, 6)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipes_crops_are_uint8_with_masks_of_0_and_255(recipe):
    settings = replace(RECIPES[recipe]().augmentation, crop=96)
    for seed in range(25):
        image, mask, kind = crop(settings, seed)
        assert image.shape == (96, 96, 3)
        assert mask.shape == (96, 96)
        assert image.dtype == mask.dtype == np.uint8
        assert image.flags["C_CONTIGUOUS"]
        assert mask.flags["C_CONTIGUOUS"]
        assert set(np.unique(mask)) <= {0, 255}
        assert kind in BLUR_KINDS


def test_the_photo_itself_is_left_as_it_was():
    image, mask = encoding()
    before = image.copy(), mask.copy()
    for seed in range(5):
        crop(EVERYTHING, seed, image, mask)
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])


def test_flips_move_image_and_mask_together_and_happen_in_all_four_ways():
    seen = set()
    for seed in range(40):
        image, mask, kind = crop(replace(PLAIN, flip_vertical=0.5), seed)
        assert np.array_equal(image[..., 0], mask)
        assert kind == "motion"
        columns, rows = image[0, :, 1].astype(int), image[:, 0, 2].astype(int)
        steps = set(np.diff(columns)), set(np.diff(rows))
        assert steps[0] in ({1}, {-1})
        assert steps[1] in ({1}, {-1})
        seen.add((*steps[0], *steps[1]))
    assert len(seen) == 4


def test_without_flip_vertical_nothing_is_upside_down():
    for seed in range(20):
        rows = crop(PLAIN, seed)[0][:, 0, 2].astype(int)
        assert set(np.diff(rows)) == {1}


def test_crops_come_from_everywhere_up_to_both_borders():
    image, mask = encoding(150, 150)
    corners = {
        tuple(crop(replace(PLAIN, crop=148), seed, image, mask)[0][..., 1:].min(axis=(0, 1)))
        for seed in range(80)
    }
    assert corners == {(x, y) for x in range(3) for y in range(3)}


@pytest.mark.parametrize(("scale", "side"), [(0.5, 32), (1.25, 80)])
def test_the_window_is_scaled_to_the_crop_with_its_mask(scale, side):
    image, mask, _ = crop(replace(PLAIN, scale=(scale, scale)))
    seen = np.ptp(image[..., 2].astype(int)) + 1
    assert seen == pytest.approx(side, abs=2)
    assert ((image[..., 0] > 127) == (mask > 127)).mean() > 0.95


def test_a_window_larger_than_the_photo_shrinks_to_the_photo():
    image, mask = encoding(70, 200)
    cut, _, _ = crop(replace(PLAIN, scale=(1.25, 1.25)), 0, image, mask)
    assert cut[0, 0, 2] <= 1
    assert cut[-1, 0, 2] >= 68  # all 70 rows in 64: no padding where the photo is large enough for the crop


@pytest.mark.parametrize("size", [(1, 1), (20, 300), (300, 20), (63, 63)])
def test_a_photo_smaller_than_the_crop_is_mirrored_at_its_border(size):
    image, mask = encoding(*size)
    image[..., 1:] |= 1  # no pixel is black
    cut, cut_mask, _ = crop(PLAIN, 0, image, mask)
    assert cut.shape == (64, 64, 3)
    assert np.array_equal(cut[..., 0], cut_mask)
    assert cut[..., 1:].min() > 0
    assert {tuple(p) for p in cut.reshape(-1, 3)} <= {tuple(p) for p in image.reshape(-1, 3)}


def test_whole_frame_blur_marks_every_pixel_names_its_kind_and_removes_detail():
    # Every pixel of its own: the most detail there can be.
    photo = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    sharp = np.zeros((100, 100), np.uint8)
    kinds = set()
    for seed in range(12):
        before, _, kept = crop(PLAIN, seed, photo, sharp, kind="defocus")
        after, mask, kind = crop(replace(PLAIN, whole_frame_blur=1), seed, photo, sharp, kind="defocus")
        assert kept == "defocus"
        assert (mask == 255).all()
        # The same place, since the same numbers are drawn before the blur.
        detail = [np.abs(np.diff(p.astype(int), axis=a)).mean() for p in (before, after) for a in (0, 1)]
        assert detail[2] + detail[3] < 0.5 * (detail[0] + detail[1])
        kinds.add(kind)
    assert kinds == set(BLUR_KINDS)


def test_blurring_a_flat_picture_changes_nothing():
    flat, mask = np.full((80, 80, 3), (200, 90, 3), np.uint8), np.zeros((80, 80), np.uint8)
    for seed in range(6):
        image, _, _ = crop(replace(PLAIN, whole_frame_blur=1), seed, flat, mask)
        assert np.abs(image.astype(int) - flat[:64, :64]).max() <= 1


@pytest.mark.parametrize("change", ["colour", "noise", "jpeg"])
def test_changes_of_the_pixels_leave_the_mask(change):
    plain, mask, _ = crop(PLAIN, 3)
    image, same_mask, kind = crop(replace(PLAIN, **{change: 1.0}), 3)
    assert not np.array_equal(image, plain)
    assert np.array_equal(same_mask, mask)
    assert kind == "motion"


def test_noise_makes_a_grey_picture_neither_darker_nor_brighter():
    grey, mask = np.full((80, 80, 3), 100, np.uint8), np.zeros((80, 80), np.uint8)
    noisy = [crop(replace(PLAIN, noise=1.0), seed, grey, mask)[0] for seed in range(20)]
    assert np.mean(noisy) == pytest.approx(100, abs=0.1)


@given(st.floats(0.5, 12))
def test_a_disk_kernel_sums_to_1_and_is_as_wide_as_its_radius(radius):
    kernel = disk_kernel(radius)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.min() >= 0
    assert np.array_equal(kernel, kernel.T)
    assert np.allclose(kernel, kernel[::-1, ::-1])
    # Second moment of a disk: r²/2 (the anti-aliased rim adds a little).
    reach = kernel.shape[0] // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    assert (kernel * (x**2 + y**2)).sum() == pytest.approx(radius**2 / 2, rel=0.05, abs=0.5)


@given(st.floats(1, 40), st.floats(0, np.pi))
def test_a_motion_kernel_sums_to_1_and_is_a_line_of_its_length_and_angle(length, angle):
    kernel = motion_kernel(length, angle)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.min() >= 0
    assert np.allclose(kernel, kernel[::-1, ::-1])
    reach = kernel.shape[0] // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along = x * np.cos(angle) + y * np.sin(angle)
    across = x * np.sin(angle) - y * np.cos(angle)
    # Second moments of a line: length²/12 along it, hardly anything across.
    assert (kernel * along**2).sum() == pytest.approx(length**2 / 12, rel=0.1, abs=0.5)
    assert (kernel * across**2).sum() < 0.5


def test_level_and_upright_motion_stay_on_their_axis():
    level = motion_kernel(9, 0.0)
    assert np.flatnonzero(level.sum(axis=1)).tolist() == [level.shape[0] // 2]
    assert np.count_nonzero(level) == 9
    assert np.allclose(motion_kernel(9, np.pi / 2), level.T, atol=1e-6)
