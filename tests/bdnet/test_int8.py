"""The network in int8 says nearly what the network says, and never what its numbers can't hold."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bdnet import Model
from bdnet.card import Card
from bdnet.int8 import Int8Conv, has_fast_int8, measure_ranges, quantize, quantized, rounded
from bdnet.metrics import confusion, scores
from bdnet.model import read_network
from bdnet.preprocess import normalize
from tests.bdnet.test_engine import lively

SLIM = "bdnet-topdown-slim"
on_such_a_cpu = pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no VNNI")


def photos(height: int, width: int, seed: int = 1) -> Tensor:
    """Smooth ones, two, uint8 2×height×width×3."""
    coarse = torch.rand((2, 3, 4, 4), generator=torch.Generator().manual_seed(seed)) * 255
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def margin(net: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = net(images).logits.float()
    return logits[:, 1] - logits[:, 0]


@on_such_a_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["bdnet-topdown", SLIM])
def test_it_says_nearly_what_the_network_says(arch: str, dtype: torch.dtype) -> None:
    net = lively(arch)
    # Sides that are no multiple of 32, as portrait and as landscape: nothing is bound to a shape.
    shapes = [photos(165, 97), photos(97, 165)]
    fast = quantize(net, measure_ranges(net, shapes), dtype)
    for images in shapes:
        expected, got = margin(net, normalize(images)), margin(fast, images.permute(0, 3, 1, 2))
        assert (got - expected).square().mean().sqrt() < 0.1 * expected.std()


@on_such_a_cpu
@pytest.mark.parametrize("side", [1, 2, 3, 33])
def test_a_photo_may_be_as_small_as_a_pixel(side: int) -> None:
    net = lively(SLIM)
    fast = quantize(net, measure_ranges(net, [photos(97, 97)]), torch.bfloat16)
    got = margin(fast, photos(side, side).permute(0, 3, 1, 2))
    assert got.shape == (2, side, side)
    assert got.isfinite().all()


@on_such_a_cpu
def test_a_photo_is_marked_the_same_alone_and_in_a_batch() -> None:
    net = lively(SLIM)
    images = photos(97, 65)
    model = Model(net, Card(SLIM, "", ranges=measure_ranges(net, [images])), "cpu")
    assert model.int8
    together, _ = model.predict(images.numpy())
    alone, _ = model.predict(images.numpy()[1:])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-3)


def test_ranges_are_of_every_convolution_and_measuring_leaves_the_network_as_it_was() -> None:
    net = lively(SLIM)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ranges = measure_ranges(net, [photos(97, 65), photos(65, 97)])
    assert all(largest > 0 for largest in ranges.values())
    assert len(ranges) > 25
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert ranges == pytest.approx(measure_ranges(net, [photos(65, 97), photos(97, 65)]))


def test_ranges_of_another_network_are_refused() -> None:
    ranges = measure_ranges(lively(SLIM), [photos(65, 65)])
    with pytest.raises(ValueError, match="not those of its network; train it again"):
        quantize(lively("bdnet-topdown"), ranges, torch.float32)


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), -1.0])
def test_a_range_that_is_none_is_refused(largest: float) -> None:
    net = lively(SLIM)
    ranges = measure_ranges(net, [photos(65, 65)])
    with pytest.raises(ValueError, match="not those of its network"):
        quantize(net, {**ranges, "deep.0.0": largest}, torch.float32)


@on_such_a_cpu
def test_a_convolution_that_only_ever_saw_zeros_is_no_fault() -> None:
    net = lively(SLIM)
    ranges = measure_ranges(net, [photos(65, 65)])
    fast = quantize(net, {**ranges, "smooths.1.0.0": 0.0}, torch.bfloat16)
    assert margin(fast, photos(65, 65).permute(0, 3, 1, 2)).isfinite().all()


def test_values_beyond_the_range_become_the_largest_and_do_not_wrap() -> None:
    values = torch.tensor([0.0, 0.24, 0.26, 127.5, 128.0, 1e6])
    assert quantized(values, 0.5).tolist() == [0, 0, 1, 255, 255, 255]
    assert quantized(values.bfloat16(), 0.5).tolist() == [0, 0, 1, 255, 255, 255]


def test_each_output_has_a_scale_of_its_own_and_one_without_weights_stays_zero() -> None:
    weight = torch.tensor([[1.27, -0.5], [127.0, 1.0], [0.0, 0.0]])[:, :, None, None]
    integers, scales = rounded(weight)
    assert integers.flatten(1).tolist() == [[127, -50], [127, 1], [0, 0]]
    assert scales.flatten().tolist() == pytest.approx([0.01, 1.0, 0.0], abs=1e-6)


def test_a_cpu_without_fast_int8_computes_as_without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    net = lively(SLIM)
    images = photos(65, 97)
    card = Card(SLIM, "", ranges=measure_ranges(net, [images]))
    monkeypatch.setattr("bdnet.model.has_fast_int8", lambda: False)
    slow = Model(net, card, "cpu")
    assert not slow.int8
    expected, _ = Model(net, replace(card, ranges={}), "cpu").predict(images.numpy())
    np.testing.assert_array_equal(slow.predict(images.numpy())[0], expected)


@pytest.mark.data
@on_such_a_cpu
def test_the_shipped_fast_model_marks_photos_as_its_network_does(data_dir: Path) -> None:
    # Photos that it learned from: this compares arithmetic and says nothing of accuracy.
    net, card = read_network("bdnet-fast")
    fast, slow = Model(net, card, "cpu"), Model(net, replace(card, ranges={}), "cpu")
    assert sum(isinstance(module, Int8Conv) for module in fast.net.modules()) > 25
    rows = csv.DictReader((data_dir / "blurraw/index.csv").open())
    names = [row["name"] for row in rows if row["split"] == "train"][::20]
    matrices, differences = np.zeros((2, 2, 2), np.int64), []
    for name in names:
        with Image.open(data_dir / f"blurraw/images/{name}.jpg") as image:
            image.thumbnail((card.working_size, card.working_size))
            photo = np.array(image.convert("RGB"))
        with Image.open(data_dir / f"blurraw/masks/{name}.png") as image:
            mask = np.array(image.resize(photo.shape[1::-1])) > 0
        marked = [model.probability(photo) >= 0.5 for model in (slow, fast)]
        matrices += np.stack([confusion(m, mask) for m in marked])
        differences.append(abs(float(marked[0].mean() - marked[1].mean())))
    exact, got = (scores(matrix)["mean_iou"] for matrix in matrices)
    assert abs(exact - got) < 0.002
    assert np.mean(differences) < 0.005
    assert max(differences) < 0.05
