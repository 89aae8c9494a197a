"""Every network by name: the published sizes, shapes at odd sizes, and that each can learn."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bdnet import model as models
from bdnet.decoder import enlarge
from bdnet.dss import DSS, SIDES, TESTED
from bdnet.encoder import load_state
from bdnet.fcn import FCN
from bdnet.losses import bdnet_loss
from bdnet.networks import ARCHITECTURES, build
from bdnet.preprocess import normalize
from bdnet.segnet import SegNet

COMPARED = (*(f"fcn{stride}s-vgg16" for stride in (32, 16, 8, 4, 2)), "unet", "segnet", "dss")
STEPS = 80
ON_RESNET18 = ("fcn2s-resnet18", "unet-resnet18", "dss-resnet18")


@functools.cache
def on_meta(arch):
    """Shapes without numbers: quick at any size. Shared: tests leave it as it is."""
    with torch.device("meta"):
        return build(arch).eval()


def macs(net, height=224, width=224):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("arch", "millions", "billions"),
    [
        ("bdnet-resnet18", 11.2, 1.8),
        # 59.6 with FCN's padding by 100, most of it spent there. The scores of skips are too small to show.
        *((f"fcn{stride}s-vgg16", 134.3, None) for stride in (32, 16, 8, 4, 2)),
        ("unet", 31.0, 36.9),
        ("segnet", 29.4, 30.7),
        ("dss", 62.2, 48.1),
    ],
)
def test_parameters_and_multiplications_at_224_are_as_many_as_published(arch, millions, billions):
    net = on_meta(arch)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    if billions is not None:
        assert round(macs(net), 1) == billions


def test_the_default_network_costs_no_more_than_30_gflop_at_working_size():
    assert 2 * macs(on_meta("bdnet-topdown"), 448, 640) < 30


def test_the_slim_network_costs_half_of_the_default_one():
    assert macs(on_meta("bdnet-topdown-slim"), 448, 640) < macs(on_meta("bdnet-topdown"), 448, 640) / 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_map_has_the_photos_size_however_odd(arch):
    for size in ((1, 1), (33, 65), (96, 131)):
        output = on_meta(arch)(torch.empty(2, 3, *size, device="meta"))
        assert output.logits.shape == (2, 2, *size)
        assert output.sides == ()
        assert output.kind_logits is None or output.kind_logits.shape == (2, 2)


@pytest.mark.parametrize("times", [2, 3])
def test_features_that_grow_again_lie_where_they_lay_whatever_the_photos_size(times):
    for side in range(24, 31):
        ramp = torch.arange(side, dtype=torch.float32).expand(1, 1, side, side)
        coarse = functional.max_pool2d(ramp, times, ceil_mode=True)
        fine = enlarge(coarse, times, ramp)
        assert fine.shape == ramp.shape
        # A cell's maximum is its last pixel: half a cell after its middle.
        inside = slice(times, -times)
        expected = ramp[..., inside] + (times - 1) / 2
        # The last cell is cut where the side is no multiple.
        assert torch.allclose(fine[..., inside][..., : -2 * times], expected[..., : -2 * times])


@pytest.mark.parametrize("stride", [32, 16, 8, 4, 2])
def test_fcn_scores_the_features_down_to_its_stride_and_no_finer(stride):
    net = on_meta(f"fcn{stride}s-vgg16")
    assert isinstance(net, FCN)
    channels = [score.in_channels for score in net.scores]
    assert channels == [64, 128, 256, 512, 4096][int(math.log2(stride)) - 1 :]
    features = net.encoder(torch.empty(1, 3, 96, 128, device="meta"))
    assert [tuple(f.shape[-2:]) for f in features] == [(96 // s, 128 // s) for s in (2, 4, 8, 16, 32)]


def test_fcn_starts_from_torchvisions_fully_connected_layers():
    with torch.device("meta"):
        import torchvision

        state = torchvision.models.vgg16(weights=None).state_dict()
    encoder = on_meta("fcn8s-vgg16").encoder
    adapted = encoder.adapted(state)
    own = {name: value.shape for name, value in encoder.state_dict().items()}
    assert {name: value.shape for name, value in adapted.items() if name in own} == own
    # The 1000 classes are of no use here.
    assert set(adapted) - set(own) == {"classifier.6.weight", "classifier.6.bias"}


def test_segnet_puts_values_back_where_pooling_found_them():
    # An encoder that only pools and a decoder that only unpools leave the maxima where they were.
    with torch.device("meta"):
        net = SegNet()
    net.encoder.features = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, ceil_mode=True))
    net.decoder = nn.ModuleList([nn.MaxUnpool2d(2, stride=2), nn.MaxUnpool2d(2, stride=2)])
    net.score = nn.Identity()
    image = torch.zeros(1, 3, 7, 9)
    image[..., 5, 6] = 3.0
    image[..., 2, 8] = 2.0
    assert torch.equal(net(image).logits, image)


def test_dss_has_six_sides_of_the_published_shape_and_supervises_them_in_training_only():
    net = on_meta("dss")
    assert isinstance(net, DSS)
    found = [(head[0].out_channels, head[0].kernel_size[0]) for head in net.heads]
    assert found == list(SIDES) == [(128, 3), (128, 3), (256, 5), (256, 5), (512, 5), (512, 7)]
    assert [join.in_channels for join in net.joins] == [5, 5, 3, 3]
    features = net.encoder(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(f.shape[-2:]) for f in features] == [(64 // s, 96 // s) for s in (1, 2, 4, 8, 16, 32)]
    with torch.device("meta"):
        sides = build("dss")(torch.empty(1, 3, 64, 96)).sides
    assert [tuple(side.shape) for side in sides] == [(1, 2, 64, 96)] * 6


def test_dss_pools_as_its_authors_do():
    net = on_meta("dss")
    assert isinstance(net, DSS)
    pools = [layer for layer in net.encoder.features if isinstance(layer, nn.MaxPool2d)]
    shapes = [(pool.kernel_size, pool.stride, pool.padding) for pool in pools]
    assert shapes == [(2, 2, 0)] * 3 + [(3, 2, 1)] * 2
    assert isinstance(net.pool, nn.AvgPool2d)
    assert (net.pool.kernel_size, net.pool.stride, net.pool.padding) == (3, 1, 1)


def test_dss_answers_with_the_mean_of_three_sides_and_the_fusion():
    torch.manual_seed(0)
    net = build("dss-resnet18").train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()  # the same features in both modes
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        trained = net(images)
        expected = torch.stack(
            [torch.softmax(trained.sides[i], 1)[:, 1] for i in TESTED]
            + [torch.softmax(trained.logits, 1)[:, 1]]
        ).mean(0)
        answer = torch.softmax(net.eval()(images).logits, 1)[:, 1]
    assert torch.allclose(answer, expected, atol=1e-5)


def test_a_typed_network_adds_its_kinds_up_to_the_blur():
    torch.manual_seed(0)
    net = build("bdnet-typed-resnet18").eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        output = net(images)
        scores = net.decoder(net.encoder(images), (64, 64))
    blurred = torch.softmax(scores, 1)[:, 1:].sum(1)
    assert torch.allclose(torch.softmax(output.logits, 1)[:, 1], blurred, atol=1e-5)
    share = torch.softmax(scores, 1)[:, 1:].mean((2, 3))
    assert torch.allclose(torch.softmax(output.kind_logits, 1), share / share.sum(1, keepdim=True), atol=1e-3)


def test_the_default_network_reads_the_kind_from_what_is_blurred():
    torch.manual_seed(0)
    net = build("bdnet-topdown").eval()
    level, context = torch.randn(1, 256, 4, 4), torch.randn(1, 64, 4, 4)
    scores = torch.zeros(1, 2, 16, 16)
    scores[:, 1] = -40.0
    scores[:, 1, :8] = 40.0  # the upper half is blurred
    changed = level.clone()
    changed[..., 2:, :] += 5.0  # what is sharp looks different
    with torch.no_grad():
        same = torch.allclose(
            net._kind(scores, level, context), net._kind(scores, changed, context), atol=0.1
        )
        other = torch.allclose(
            net._kind(-scores, level, context), net._kind(-scores, changed, context), atol=0.1
        )
    assert (same, other) == (True, False)


def test_an_encoder_takes_the_stages_it_has_and_says_what_it_left():
    donor = build("bdnet-resnet18").encoder
    report = load_state(build("bdnet-topdown").encoder, donor.state_dict(), "whole")
    assert report.not_in_source == ()
    assert {name.split(".")[0] for name in report.not_used} == {"layer4"}


def four_photos(side=64):
    """Noise whose right half is smoothed: uint8 4×S×S×3 and its mask."""
    torch.manual_seed(0)
    sharp = torch.randint(0, 256, (4, 3, side, side)).float()
    smooth = nn.functional.avg_pool2d(sharp, 9, stride=1, padding=4)
    images = torch.where(torch.arange(side) < side // 2, sharp, smooth)
    mask = (torch.arange(side) >= side // 2).long().expand(4, side, side)
    return images.byte().permute(0, 2, 3, 1).contiguous(), mask.contiguous()


LEARNERS = [
    *("bdnet-topdown", "bdnet-resnet18"),
    *(
        pytest.param(arch, marks=pytest.mark.long)
        for arch in (
            *("bdnet-topdown-slim", "bdnet-typed-resnet18"),
            *(*COMPARED, *ON_RESNET18),
        )
    ),
]


@pytest.mark.parametrize("arch", LEARNERS)
def test_four_photos_are_learned_by_heart_and_survive_saving(arch, tmp_path):
    images, mask = four_photos()
    kind = torch.tensor([0, 0, 1, 1])
    torch.manual_seed(0)
    net = build(arch).train()
    last: list[float] = []
    rate = 3e-4 if arch.endswith("vgg16") else {"dss": 1e-4, "dss-resnet18": 2e-4}.get(arch, 2e-3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, fused=True)
    for _ in range(STEPS):
        # In fp32: oneDNN's bf16 gradient of DSS's 7×7 kernel is not finite on a map of one pixel.
        output = net(normalize(images))
        loss = bdnet_loss(output, mask, kind, 0.2, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # The normalisations' running averages need some steps to follow.
        last = [*last[-29:], (output.logits.argmax(1) == mask).float().mean().item()]
        if len(last) == 30 and min(last[-5:]) > 0.97:
            break
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    models.save(net, str(tmp_path), {"arch": arch})
    probability, _ = models.load(str(tmp_path), "cpu").predict(images.numpy())
    right = (torch.from_numpy(probability) >= 0.5) == (mask == 1)
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("name", ["resnet18", "bdnet-resnet19", ""])
def test_an_unknown_architecture_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="unknown architecture") as refusal:
        build(name)
    assert all(known in str(refusal.value) for known in ARCHITECTURES)
