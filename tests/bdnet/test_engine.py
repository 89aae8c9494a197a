"""The network made fast gives what the network gives."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as read_weights
from torch import nn

import bdnet
from bdnet.card import DEFAULT_MODEL, read_folder
from bdnet.engine import FusedConv, optimize
from bdnet.metrics import confusion, scores
from bdnet.model import has_fast_bfloat16
from bdnet.networks import ARCHITECTURES, build
from bdnet.preprocess import normalize


def lively(arch: str) -> nn.Module:
    """Untrained, with statistics and factors that an error in folding would show."""
    torch.manual_seed(0)
    net = build(arch)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        elif isinstance(module, nn.Conv2d) and not module.weight.any():  # FCN's scores start at zero
            nn.init.xavier_uniform_(module.weight)
    return net.eval()


def photos(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)


# Of networks that differ in where they end, or in how often a block stands in them, one is enough.
LARGE = ("bdnet-resnet34", "bdnet-resnet101", "bdnet-resnet152", "dss", "fcn2s-vgg16")
LARGE += tuple(f"bdnet-resnet18-{part}" for part in ("32s", "16s", "8s", "4s", "nodropout"))
SMALL = [arch for arch in ARCHITECTURES if "vgg16" not in arch and arch not in LARGE]


@pytest.mark.parametrize("arch", [*SMALL, *(pytest.param(arch, marks=pytest.mark.long) for arch in LARGE)])
def test_every_network_gives_the_same_in_fp32(arch: str) -> None:
    net = lively(arch)
    fast = optimize(net, torch.float32)
    with torch.inference_mode():
        # Sides that are no multiple of 32, as portrait and as landscape: nothing is bound to a shape.
        for images in (photos(65, 97), photos(97, 65)):
            expected, got = net(normalize(images)), fast(normalize(images))
            scale = expected.logits.std()
            torch.testing.assert_close(got.logits / scale, expected.logits / scale, atol=1e-4, rtol=1e-3)
            if expected.kind_logits is not None:
                torch.testing.assert_close(got.kind_logits, expected.kind_logits, atol=1e-3, rtol=1e-3)


def test_no_normalisation_is_left_in_the_default_model() -> None:
    fast = optimize(lively("bdnet-topdown"), torch.float32)
    left = [name for name, module in fast.named_modules() if isinstance(module, nn.BatchNorm2d | nn.Conv2d)]
    assert left == []
    assert sum(isinstance(module, FusedConv) for module in fast.modules()) > 30


def test_the_network_itself_stays_as_it_was() -> None:
    net = lively("bdnet-topdown").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimize(net, torch.float32)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.data
@pytest.mark.skipif(not has_fast_bfloat16(torch.device("cpu")), reason="computes in fp32 here")
def test_in_bf16_photos_are_marked_as_by_the_network_in_fp32(data_dir: Path) -> None:
    # Photos that it learned from: this compares arithmetic and says nothing of accuracy.
    weights, card = read_folder(DEFAULT_MODEL)
    net = build(card.arch).eval()
    net.load_state_dict({k: v.float() for k, v in read_weights(weights).items()}, strict=False)
    model = bdnet.load()
    rows = csv.DictReader((data_dir / "blurraw/index.csv").open())
    names = [row["name"] for row in rows if row["split"] == "train"][::20]
    slow, fast = np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64)
    for name in names:
        photo = np.array(Image.open(data_dir / f"blurraw/images/{name}.jpg").convert("RGB"))
        mask = np.array(Image.open(data_dir / f"blurraw/masks/{name}.png")) > 0
        with torch.inference_mode():
            logits = net(normalize(torch.from_numpy(photo)[None])).logits[0]
        expected, got = (logits[1] >= logits[0]).numpy(), model.probability(photo) >= 0.5
        assert abs(expected.mean() - got.mean()) < 0.01, name
        slow, fast = slow + confusion(expected, mask), fast + confusion(got, mask)
    assert abs(scores(slow)["mean_iou"] - scores(fast)["mean_iou"]) < 0.002
