"""What training minimises."""

import torch
from torch import Tensor
from torch.nn import functional

from bdnet.bdnet import Output

IGNORED_KIND = -100  # a crop without enough blur has no kind
KIND_CLASS_WEIGHTS = (1.5, 0.75)  # motion, defocus; BDNet 2020


def soft_iou(logits: Tensor, target: Tensor) -> Tensor:
    """One minus the soft IoU of both classes over the whole batch, a smooth stand-in for mean IoU.

    Args:
        logits: N×2×H×W.
        target: int64 N×H×W, 1 = blurred.
    """
    blurred = torch.softmax(logits.float(), dim=1)[:, 1]
    truth = target.float()
    losses = []
    for probability, label in ((blurred, truth), (1 - blurred, 1 - truth)):
        intersection = (probability * label).sum()
        union = (probability + label - probability * label).sum()
        losses.append(1 - (intersection + 1) / (union + 1))
    return torch.stack(losses).mean()


def bdnet_loss(
    output: Output, mask: Tensor, kind: Tensor, kind_weight: float, region_weight: float
) -> tuple[Tensor, Tensor]:
    """Total loss and its segmentation part.

    The paper's loss is softmax cross-entropy for the mask, 0.8, plus weighted cross-entropy for the kind of
    blur, 0.2; ``region_weight`` adds ``soft_iou`` to the first.

    Args:
        output: what the network said.
        mask: int64 N×H×W, 1 = blurred.
        kind: int64 N, 0 = motion, 1 = defocus, ``IGNORED_KIND`` where a crop shows hardly any blur.
        kind_weight: share of the kind branch in the total.
        region_weight: factor of the region loss.
    """
    segmentation = functional.cross_entropy(output.logits.float(), mask)
    if region_weight:
        segmentation = segmentation + region_weight * soft_iou(output.logits, mask)
    if not kind_weight:
        return segmentation, segmentation
    weights = torch.tensor(KIND_CLASS_WEIGHTS, device=kind.device)
    said = output.kind_logits.float()
    # A batch without any kind still touches the branch: data-parallel training waits for every gradient.
    has_kind = bool((kind != IGNORED_KIND).any())
    kind_loss = (
        functional.cross_entropy(said, kind, weights, ignore_index=IGNORED_KIND)
        if has_kind
        else 0 * said.sum()
    )
    return (1 - kind_weight) * segmentation + kind_weight * kind_loss, segmentation
