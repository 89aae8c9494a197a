"""Trained models as jobs read and write them: by a shipped one's name, or in storage, with its patience.

torch is imported by what builds a network alone: drivers and most workers do without.
"""

import os
from typing import TYPE_CHECKING, Any

from bdnet import card
from bdnet.card import Card
from bdnet.memory import keep_freed_memory
from pipeline import storage

if TYPE_CHECKING:
    from torch import nn

    from bdnet.model import Model


def resolved(model: str) -> str:
    """A shipped model's name as it is, else the URI: workers stand in other folders.

    Raises:
        ValueError: as ``storage.normalize``.
    """
    return model if model in card.shipped_models() else storage.normalize(model)


def read_card(model: str) -> Card:
    """Read and check a model's card; errors as ``bdnet.card.read_folder``."""
    return card.read_card(model, storage.read_bytes)


def read_network(model: str) -> "tuple[nn.Module, Card]":
    """Read a model's network and card; see ``bdnet.model.read_network``."""
    from bdnet import model as networks

    return networks.read_network(model, storage.read_bytes)


def load(model: str, digest: str, threads: int) -> "Model":
    """Load the network that a job began with into a detector's process, with the threads that it plans for.

    Raises:
        ValueError: there is another one meanwhile.
        OSError: what storage says.
    """
    import torch

    from bdnet.model import Model

    # Planned from logical CPUs, which may be more than the cores of this node.
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    keep_freed_memory()
    net, its_card = read_network(model)
    if its_card.digest != digest:
        raise ValueError(f"{model} is another model than when the job began; run the same command again")
    return Model(net, its_card)


def save(net: "nn.Module", folder: str, fields: dict[str, Any]) -> Card:
    """Write a model; see ``bdnet.model.save``."""
    from bdnet import model as networks

    return networks.save(net, folder, fields, storage.write_bytes)
