import sys

import numpy as np
import pytest

from bdnet.refine import refine


def two_fields(height=192, width=256):
    """A photo of two colours whose map finds the border four pixels too late, and a speck."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 40, 40)
    pixels[:, width // 2 :] = (40, 40, 200)
    pixels = pixels + np.random.default_rng(0).integers(0, 8, pixels.shape, np.uint8)
    truth = np.zeros((height, width), bool)
    truth[:, width // 2 :] = True
    probability = np.full((height, width), 0.2, np.float32)
    probability[:, width // 2 + 4 :] = 0.8
    probability[10:13, 5:8] = 0.9
    return pixels, probability, truth


@pytest.mark.parametrize("how", ["crf", "superpixels"])
def test_a_map_is_drawn_to_the_photos_own_borders(how):
    pixels, probability, truth = two_fields()
    refined = refine(pixels, probability, how)
    assert refined.dtype == np.float32
    assert refined.shape == truth.shape
    assert 0 <= refined.min() <= refined.max() <= 1
    before = ((probability >= 0.5) != truth).sum()
    after = ((refined >= 0.5) != truth).sum()
    assert after < before / 4
    assert not (refined[10:13, 5:8] >= 0.5).any()  # the speck is gone


def test_nothing_is_done_unless_asked():
    pixels, probability, _ = two_fields()
    assert refine(pixels, probability, "none") is probability


@pytest.mark.parametrize(("how", "package"), [("crf", "pydensecrf"), ("superpixels", "skimage")])
def test_a_missing_extra_is_named(how, package, monkeypatch):
    for module in (package, "pydensecrf.densecrf", "skimage.segmentation"):
        monkeypatch.setitem(sys.modules, module, None)
    pixels, probability, _ = two_fields()
    with pytest.raises(ValueError, match=r"pip install '.\[refine\]'"):
        refine(pixels, probability, how)
