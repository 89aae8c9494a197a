"""What every network of this package says of a batch of photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the kinds' names are needed where nothing else of torch is
    from torch import Tensor

CLASSES = 2  # sharp, blurred
BLUR_KINDS = ("motion", "defocus")


class Output(NamedTuple):
    """Scores before any softmax. H×W is the input's size."""

    logits: Tensor  # N×2×H×W over (sharp, blurred)
    kind_logits: Tensor | None = None  # N×2 over BLUR_KINDS; None: the network has no such branch
    kind_maps: Tensor | None = None  # N×2×H×W over BLUR_KINDS, of a network that names each pixel's kind
    # In training only: coarser or intermediate scores N×2×h×w that are supervised too.
    sides: tuple[Tensor, ...] = ()
    side_weight: float = 0.0  # of each side's loss beside the map's
