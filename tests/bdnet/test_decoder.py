"""The FCN-2s decoder: how its parts start, and that the map is the sum of five upsampled scores."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdnet.decoder import FCN2sDecoder, bilinear_upsampling

CHANNELS = (4, 6, 8, 10, 12)


def features(height=64, width=96, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, math.ceil(height / s), math.ceil(width / s), generator=generator)
        for c, s in zip(CHANNELS, (2, 4, 8, 16, 32), strict=True)
    ]


def decoder(top="light", **options):
    torch.manual_seed(0)
    return FCN2sDecoder(CHANNELS, top, **options)


def class_scores(net):
    """The five 1×1 convolutions to two classes, finest first."""
    return [*(skip[-1] for skip in net.skips), net.top[-1]]


def test_deconvolution_starts_as_bilinear_interpolation_of_each_channel():
    maps = torch.randn(2, 3, 9, 13)
    expected = functional.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
    doubled = bilinear_upsampling(3)(maps)
    assert doubled.shape == expected.shape
    # At the rim the deconvolution sees zeros where interpolation repeats the edge.
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(doubled[inside], expected[inside], atol=1e-6)


def test_every_deconvolution_of_the_decoder_is_learned_and_starts_bilinear():
    net = decoder()
    assert len(net.ups) == 5
    for up in net.ups:
        assert up.weight.requires_grad
        assert torch.equal(up.weight, bilinear_upsampling(2).weight)


def test_a_skip_is_a_normalisation_and_a_score_without_relu():
    for skip, channels in zip(decoder().skips, CHANNELS, strict=False):
        normalisation, score = skip
        assert isinstance(normalisation, nn.BatchNorm2d)
        assert normalisation.num_features == channels
        assert isinstance(score, nn.Conv2d)
        assert (score.in_channels, score.out_channels, score.kernel_size) == (channels, 2, (1, 1))


@pytest.mark.parametrize("top", ["light", "full"])
def test_scores_start_within_xaviers_bounds_with_bias_a_tenth(top):
    for channels in (512, 2048):
        net = FCN2sDecoder((channels,) * 5, top)
        for score in class_scores(net):
            bound = math.sqrt(2) * math.sqrt(6 / (score.in_channels + 2))
            assert 0.95 * bound < score.weight.abs().max() <= bound
            assert torch.equal(score.bias, torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize(
    ("top", "layers"),
    [
        ("light", [nn.Dropout2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]),
        ("full", [nn.Conv2d, nn.ReLU, nn.Dropout2d, nn.Conv2d, nn.ReLU, nn.Dropout2d, nn.Conv2d]),
    ],
)
def test_top_heads_are_the_papers(top, layers):
    head = decoder(top).top
    assert [type(layer) for layer in head] == layers
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout2d)} == {0.5}


def test_padding_the_3x3_by_one_gives_the_papers_values():
    # The paper pads by 3, which scores two more rows and columns on each side, and crops them away later.
    ours = decoder("full").eval().top
    papers = decoder("full").eval().top
    papers[0].padding = (3, 3)
    coarse = features()[-1]
    padded = papers(coarse)
    assert padded.shape[2:] == (coarse.shape[2] + 4, coarse.shape[3] + 4)
    assert torch.allclose(ours(coarse), padded[..., 2:-2, 2:-2], atol=1e-6)


@pytest.mark.parametrize("top", ["light", "full"])
def test_dropout_is_at_work_in_training_only(top):
    maps = features()
    net = decoder(top)
    assert not torch.equal(net(maps, (64, 96)), net(maps, (64, 96)))
    net.eval()
    assert torch.equal(net(maps, (64, 96)), net(maps, (64, 96)))
    without = decoder(top, dropout=0.0)
    assert torch.equal(without(maps, (64, 96)), without(maps, (64, 96)))


def test_the_map_is_the_sum_of_five_scores_each_brought_to_full_size():
    net = decoder().eval()
    with torch.no_grad():
        for power, score in enumerate(class_scores(net)):
            score.weight.zero_()
            score.bias.copy_(torch.tensor([10.0**power, -(10.0**power)]))
        # Away from the rim, which the coarsest map's zero padding reaches.
        middle = net(features(512, 512, batch=1), (512, 512))[..., 128:-128, 128:-128]
    assert torch.allclose(middle[:, 0], torch.tensor(11111.0))
    assert torch.allclose(middle[:, 1], torch.tensor(-11111.0))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 31), (33, 65), (63, 64), (64, 64)])
def test_the_map_has_the_inputs_size(size):
    assert decoder().eval()(features(*size), size).shape == (2, 2, *size)


@pytest.mark.parametrize("top", ["light", "full"])
def test_every_parameter_learns(top):
    net = decoder(top)
    net(features(), (64, 96)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
