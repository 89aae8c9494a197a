"""A random training crop of one photo and its mask. Everything random comes from the generator given."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from bdnet.output import BLUR_KINDS


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a crop. Probabilities are per crop."""

    crop: int = 256
    # Side of the window relative to the crop's: the window is resized to the crop. Blur changes size with it.
    scale: tuple[float, float] = (1.0, 1.0)
    flip_vertical: float = 0.0
    colour: float = 0.0
    whole_frame_blur: float = 0.0
    noise: float = 0.0
    jpeg: float = 0.0


def random_crop(
    image: np.ndarray, mask: np.ndarray, kind: str, settings: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """Cut and vary one crop.

    Args:
        image: uint8 H×W×3; mirrored at its border where it is smaller than the crop.
        mask: uint8 H×W, 255 = blurred.
        kind: the photo's kind of blur.

    Returns:
        image uint8 C×C×3, mask uint8 C×C, and the kind, which a whole-frame blur may have changed.
    """
    image, mask = _window(image, mask, settings, rng)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < settings.flip_vertical:
        image, mask = image[::-1], mask[::-1]
    if rng.random() < settings.whole_frame_blur:
        image, kind = whole_frame_blur(image, rng)
        mask = np.full_like(mask, 255)
    if rng.random() < settings.colour:
        image = _colour(image, rng)
    if rng.random() < settings.noise:
        sigma = rng.uniform(1, 8)
        noisy = image + rng.standard_normal(image.shape, dtype=np.float32) * sigma
        image = (noisy.clip(0, 255) + 0.5).astype(np.uint8)
    if rng.random() < settings.jpeg:
        image = _jpeg(image, quality=int(rng.integers(60, 96)))
    return np.ascontiguousarray(image), np.ascontiguousarray(mask), kind


def _window(
    image: np.ndarray, mask: np.ndarray, settings: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    crop = settings.crop
    side = round(crop * rng.uniform(*settings.scale))
    height, width = mask.shape
    if side > min(height, width):
        # A window as large as the photo allows keeps the blur's scale nearest to the one asked for.
        side = max(min(height, width), min(side, crop))
    pad_bottom, pad_right = max(0, side - height), max(0, side - width)
    if pad_bottom or pad_right:
        image = np.pad(image, ((0, pad_bottom), (0, pad_right), (0, 0)), mode="symmetric")
        mask = np.pad(mask, ((0, pad_bottom), (0, pad_right)), mode="symmetric")
        height, width = mask.shape
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    image, mask = image[top : top + side, left : left + side], mask[top : top + side, left : left + side]
    if side != crop:
        image = np.asarray(Image.fromarray(image).resize((crop, crop), Image.Resampling.BICUBIC))
        mask = np.asarray(Image.fromarray(mask).resize((crop, crop), Image.Resampling.NEAREST))
    return image, mask


def whole_frame_blur(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Blur all of an image, uint8 H×W×3, in (roughly) linear light, as a lens or a shaken camera does.

    Returns:
        the image and which of ``BLUR_KINDS`` was drawn.
    """
    kind = BLUR_KINDS[int(rng.integers(len(BLUR_KINDS)))]
    if kind == "motion":
        kernel = motion_kernel(rng.uniform(8, 30), rng.uniform(0, np.pi))
    else:
        kernel = disk_kernel(rng.uniform(2.0, 8.0))
    linear = (image.astype(np.float32) / 255) ** 2.2
    blurred = np.stack([ndimage.convolve(linear[..., c], kernel, mode="mirror") for c in range(3)], axis=-1)
    return (blurred.clip(0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8), kind


def disk_kernel(radius: float) -> np.ndarray:
    """Defocus: a disk with an anti-aliased rim, float32, sum 1."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (radius + 0.5 - np.hypot(x, y)).clip(0, 1).astype(np.float32)
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> np.ndarray:
    """Linear motion: an anti-aliased line of ``length`` pixels at ``angle`` radians, float32, sum 1."""
    reach = int(np.ceil(length / 2))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along = np.abs(x * np.cos(angle) + y * np.sin(angle))
    across = np.abs(x * np.sin(angle) - y * np.cos(angle))
    kernel = ((length / 2 + 0.5 - along).clip(0, 1) * (1 - across).clip(0, 1)).astype(np.float32)
    return kernel / kernel.sum()


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, gamma, saturation; sometimes grey."""
    pixels = image.astype(np.float32) / 255
    pixels = pixels ** rng.uniform(0.8, 1.25)
    grey = pixels.mean(axis=2, keepdims=True)
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.4)
    pixels = grey + (pixels - grey) * saturation
    middle = pixels.mean()
    pixels = ((pixels - middle) * rng.uniform(0.75, 1.3) + middle) * rng.uniform(0.8, 1.2)
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
