import pytest
import torch
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from bdnet.preprocess import MEAN, STD, normalize


def photos():
    return torch.randint(
        0, 256, (2, 17, 31, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_it_normalises_as_torchvision_does():
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    images = photos()
    assert torch.allclose(normalize(images), expected(images.permute(0, 3, 1, 2)), atol=1e-5)


def test_mean_and_deviation_are_those_of_the_encoders_weights():
    trained_with = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert list(MEAN) == trained_with.mean
    assert list(STD) == trained_with.std


def test_the_result_is_float32_in_channels_last_memory():
    images = normalize(photos())
    assert images.shape == (2, 3, 17, 31)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrong", [photos().float() / 255, photos().permute(0, 3, 1, 2)])
def test_pixels_scaled_before_or_with_channels_first_are_a_callers_mistake(wrong):
    with pytest.raises(AssertionError):
        normalize(wrong)
