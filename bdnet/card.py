"""What is known of a trained model without its network: ``card.json`` beside ``model.safetensors``."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import fsspec

DEFAULT_MODEL = "bdnet-topdown"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "card.json"
# Raise it when ``preprocess.normalize`` gives the network other values: models are bound to it.
PREPROCESSING_VERSION = "1"
# Raised when a network of the same weights says something else: its photos are audited anew. Version 2:
# odd sides are enlarged without a shift; DSS pools as published.
ARCH_VERSIONS = {"bdnet-topdown": "2", "dss": "2", "dss-resnet18": "2"}
WORKING_SIZE = 640  # long side, pixels


@dataclass(frozen=True)
class Card:
    """What a model is, where it came from and what it scored."""

    arch: str
    digest: str  # sha256 of model.safetensors
    working_size: int = WORKING_SIZE
    preprocessing: str = PREPROCESSING_VERSION
    # Logits are divided by it: above 1 the network was surer than it was right. Masks don't change.
    temperature: float = 1.0
    # Largest input of each convolution: with it a CPU that can computes in int8 (``bdnet.int8``).
    ranges: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)


def read_file(uri: str) -> bytes:
    """Read a file of a local folder or at an fsspec URI, with fsspec's own timeouts."""
    fs, path = fsspec.core.url_to_fs(uri)
    content: bytes = fs.cat_file(path)
    return content


def read_folder(name_or_uri: str, read: Callable[[str], bytes] = read_file) -> tuple[bytes, Card]:
    """Read the weights' bytes and the card of a shipped model's name, a folder or an fsspec URI.

    Args:
        name_or_uri: what to read.
        read: reads a file that isn't shipped.

    Raises:
        ValueError: there is no model, or its weights are not those that the card describes.
        OSError: storage refuses.
    """
    if name_or_uri in shipped_models():
        shipped = resources.files("bdnet") / "models" / name_or_uri
        weights, card_text = (shipped / WEIGHTS_FILE).read_bytes(), (shipped / CARD_FILE).read_bytes()
    else:
        folder = name_or_uri.rstrip("/")
        try:
            weights, card_text = read(f"{folder}/{WEIGHTS_FILE}"), read(f"{folder}/{CARD_FILE}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"no model at {name_or_uri}: expected {WEIGHTS_FILE} and {CARD_FILE} there, or the name of a "
                f"shipped model ({', '.join(shipped_models())})"
            ) from error
    try:
        card = Card(**json.loads(card_text))
        _check(card)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name_or_uri}: {CARD_FILE} is no card that this bdnet reads ({error}); copy it again or "
            "install the bdnet that wrote it"
        ) from error
    if hashlib.sha256(weights).hexdigest() != card.digest:
        raise ValueError(f"{name_or_uri}: {WEIGHTS_FILE} is not the one its card describes; copy both again")
    if card.preprocessing != PREPROCESSING_VERSION:
        raise ValueError(
            f"{name_or_uri} expects preprocessing {card.preprocessing}, this bdnet has "
            f"{PREPROCESSING_VERSION}; install the bdnet it was trained with or train it again"
        )
    return weights, card


def _check(card: Card) -> None:
    """Refuse, as ValueError, a value with which a photo would end in an error or be measured wrongly."""
    if not isinstance(card.arch, str):
        raise ValueError("arch is no name")
    if not isinstance(card.working_size, int) or card.working_size < 1:
        raise ValueError("working_size is no number of pixels")
    if not isinstance(card.temperature, int | float) or not 0 < card.temperature < math.inf:
        raise ValueError("temperature is no number above 0")
    if not isinstance(card.ranges, dict) or not all(
        isinstance(value, int | float) for value in card.ranges.values()
    ):
        raise ValueError("ranges are no numbers by name")


def shipped_models() -> list[str]:
    """Names of the models that come with bdnet."""
    folder = resources.files("bdnet") / "models"
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CARD_FILE).is_file())


def read_card(name_or_uri: str, read: Callable[[str], bytes] = read_file) -> Card:
    """Read and check a model's card without building the network; arguments and errors as ``read_folder``."""
    return read_folder(name_or_uri, read)[1]
