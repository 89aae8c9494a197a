"""The encoder is torchvision's ResNet cut into five taps, and says what an initialisation filled."""

import pytest
import torch
import torchvision

from bdnet.encoder import ENCODERS, ResNetEncoder, load_imagenet, load_state

BASIC = (64, 64, 128, 256, 512)
BOTTLENECK = (64, 256, 512, 1024, 2048)
STRIDES = (2, 4, 8, 16, 32)


def on_meta(name):
    """Shapes without numbers: quick at any depth."""
    with torch.device("meta"):
        return ResNetEncoder(name).eval()


def resnet18_state():
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return ResNetEncoder("resnet18").eval()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", BASIC),
        ("resnet34", BASIC),
        ("resnet50", BOTTLENECK),
        ("resnet101", BOTTLENECK),
        ("resnet152", BOTTLENECK),
    ],
)
def test_the_five_taps_have_the_published_strides_and_channels(name, channels):
    features = on_meta(name)(torch.empty(2, 3, 128, 224, device="meta"))
    assert [tuple(f.shape) for f in features] == [
        (2, c, 128 // s, 224 // s) for c, s in zip(channels, STRIDES, strict=True)
    ]
    assert ENCODERS[name] == channels


def test_odd_sides_are_rounded_up_at_every_stride():
    features = on_meta("resnet18")(torch.empty(1, 3, 1, 33, device="meta"))
    assert [tuple(f.shape[2:]) for f in features] == [(1, 17), (1, 9), (1, 5), (1, 3), (1, 2)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_it_computes_what_torchvision_computes(name):
    encoder, whole = ResNetEncoder(name).eval(), getattr(torchvision.models, name)(weights=None).eval()
    load_state(encoder, whole.state_dict(), "torchvision")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        deepest = encoder(images)[-1]
        assert torch.allclose(whole.fc(deepest.mean(dim=(2, 3))), whole(images), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_seed_gives_the_start_that_it_gives_torchvision(name):
    torch.manual_seed(0)
    ours = ResNetEncoder(name).state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert set(theirs) - set(ours) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_whole_file_leaves_only_the_classifier_unused(encoder):
    state = resnet18_state()
    report = load_state(encoder, state, "a file")
    assert report.not_in_source == ()
    assert report.not_used == ("fc.bias", "fc.weight")
    assert str(report) == f"encoder: {len(state) - 2} tensors from a file; not used: fc"
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_a_partial_file_fills_what_it_has_and_the_report_names_the_rest(encoder):
    partial = {k: v for k, v in resnet18_state().items() if not k.startswith("layer4")}
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    report = load_state(encoder, partial, "a file")

    after = encoder.state_dict()
    assert report.loaded == tuple(sorted(set(partial) - {"fc.weight", "fc.bias"}))
    assert all(torch.equal(after[key], partial[key]) for key in report.loaded)
    assert report.not_in_source == tuple(sorted(k for k in before if k.startswith("layer4")))
    assert all(torch.equal(after[key], before[key]) for key in report.not_in_source)
    assert str(report).endswith("from a file; from scratch: layer4; not used: fc")


def test_a_file_of_something_else_is_refused(encoder):
    with pytest.raises(ValueError, match=r"vgg\.safetensors holds no weights of .*conv1\.weight"):
        load_state(encoder, {"features.0.weight": torch.zeros(64, 3, 3, 3)}, "vgg.safetensors")


@pytest.mark.parametrize("depth", ["resnet50", "resnet34"])
def test_weights_of_a_deeper_network_are_refused_and_nothing_is_loaded(encoder, depth):
    # Every tensor of ResNet-18 is in ResNet-34 by name and shape; the blocks it lacks give it away.
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    state = getattr(torchvision.models, depth)(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"a file: .*layer1\..*same depth"):
        load_state(encoder, state, "a file")
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ENCODERS)
def test_imagenet_weights_are_torchvisions_of_the_same_depth_checked_by_hash(monkeypatch, name):
    asked = []

    def get_state_dict(weights, **options):
        asked.append((weights, options["check_hash"]))
        with torch.device("meta"):
            return getattr(torchvision.models, name)(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    report = load_imagenet(on_meta(name))

    (weights, checked), *others = asked
    assert not others
    assert checked
    assert weights in torchvision.models.get_model_weights(name)
    assert weights.name == "IMAGENET1K_V1"
    assert report.not_in_source == ()
    assert report.not_used == ("fc.bias", "fc.weight")
    assert report.source.startswith("torchvision ResNet")
