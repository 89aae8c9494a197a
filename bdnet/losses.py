"""What training minimises."""

import torch
from torch import Tensor
from torch.nn import functional

from bdnet.decoder import resize
from bdnet.output import Output

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


def segmentation_loss(logits: Tensor, mask: Tensor, region_weight: float) -> Tensor:
    """Softmax cross-entropy of N×2×h×w, enlarged to the mask, and ``region_weight`` times ``soft_iou``."""
    logits = logits.float()
    if logits.shape[-2:] != mask.shape[-2:]:
        logits = resize(logits, mask)
    loss = functional.cross_entropy(logits, mask)
    return loss + region_weight * soft_iou(logits, mask) if region_weight else loss


def kind_loss(output: Output, mask: Tensor, kind: Tensor) -> Tensor:
    """Cross-entropy of the kind of blur, of the photo or of its blurred pixels; motion weighs twice defocus.

    Crops whose kind is ``IGNORED_KIND`` say nothing; without any other the loss is 0 and its gradient zero.
    """
    if output.kind_maps is None:
        said, truth = output.kind_logits, kind
    else:
        said = output.kind_maps
        truth = torch.where(mask == 1, kind[:, None, None], IGNORED_KIND)
    assert said is not None
    said = said.float()
    if not bool((truth != IGNORED_KIND).any()):
        # Data-parallel training waits for every gradient.
        return 0 * said.sum()
    weights = torch.tensor(KIND_CLASS_WEIGHTS, device=kind.device)
    return functional.cross_entropy(said, truth, weights, ignore_index=IGNORED_KIND)


def bdnet_loss(
    output: Output, mask: Tensor, kind: Tensor, kind_weight: float, region_weight: float
) -> Tensor:
    """The paper's loss: 0.8 softmax cross-entropy for the mask, 0.2 for the kind of blur; and more.

    Args:
        output: what the network said.
        mask: int64 N×H×W, 1 = blurred.
        kind: int64 N, 0 = motion, 1 = defocus, ``IGNORED_KIND`` where a crop shows hardly any blur.
        kind_weight: share of the kind branch in the total, where the network has one.
        region_weight: factor of ``soft_iou`` beside the cross-entropy.
    """
    segmentation = segmentation_loss(output.logits, mask, region_weight)
    for side in output.sides:
        segmentation = segmentation + output.side_weight * segmentation_loss(side, mask, region_weight)
    if output.kind_logits is None:
        return segmentation
    return (1 - kind_weight) * segmentation + kind_weight * kind_loss(output, mask, kind)
