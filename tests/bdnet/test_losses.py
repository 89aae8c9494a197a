import math

import pytest
import torch
from torch.nn import functional

from bdnet.losses import (
    IGNORED_KIND,
    KIND_CLASS_WEIGHTS,
    bdnet_loss,
    kind_loss,
    segmentation_loss,
    soft_iou,
)
from bdnet.output import BLUR_KINDS, Output

MOTION, DEFOCUS = range(2)


def masks(batch=3, seed=0):
    return (torch.rand(batch, 16, 20, generator=torch.Generator().manual_seed(seed)) < 0.3).long()


def logits_saying(mask, sure=30.0):
    said = torch.stack([1 - mask, mask], dim=1).float()
    return sure * (2 * said - 1)


def output(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Output(
        torch.randn(batch, 2, 16, 20, generator=generator).requires_grad_(),
        torch.randn(batch, 2, generator=generator).requires_grad_(),
    )


def kind_part(kind_logits, kinds):
    said = Output(torch.zeros(len(kinds), 2, 4, 4), kind_logits)
    return kind_loss(said, torch.zeros(len(kinds), 4, 4).long(), torch.tensor(kinds)).item()


@pytest.mark.parametrize("mask", [masks(), torch.zeros_like(masks()), torch.ones_like(masks())])
def test_soft_iou_is_0_for_a_perfect_and_1_for_an_inverted_map(mask):
    assert soft_iou(logits_saying(mask), mask) == pytest.approx(0, abs=1e-5)
    assert soft_iou(logits_saying(1 - mask), mask) == pytest.approx(1, abs=0.01)


def test_soft_iou_of_a_sure_map_is_one_minus_the_mean_iou_of_both_classes():
    truth = torch.zeros(1, 40, 50).long()
    truth[:, :20] = 1
    said = torch.zeros_like(truth)
    said[:, 10:20] = 1  # half of the blur found, nothing else: IoU 1/2 and 2/3
    assert soft_iou(logits_saying(said), truth) == pytest.approx(1 - (1 / 2 + 2 / 3) / 2, abs=1e-3)


def test_soft_iou_falls_as_the_map_gets_surer_of_the_truth():
    mask = masks()
    losses = [float(soft_iou(logits_saying(mask, sure), mask)) for sure in (-1.0, 0.0, 1.0, 3.0)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_total_is_the_papers_sum_of_cross_entropies():
    said, mask, kind = output(), masks(), torch.tensor([MOTION, DEFOCUS, DEFOCUS])
    total = bdnet_loss(said, mask, kind, kind_weight=0.2, region_weight=0.0)
    # Weighted cross-entropy divides by the weights of the classes that are there.
    each = functional.cross_entropy(said.kind_logits, kind, reduction="none")
    weighted = (1.5 * each[0] + 0.75 * each[1] + 0.75 * each[2]) / (1.5 + 0.75 + 0.75)
    expected = 0.8 * functional.cross_entropy(said.logits, mask) + 0.2 * weighted
    assert total.item() == pytest.approx(expected.item())


def test_the_region_weight_adds_that_much_soft_iou_to_the_segmentation():
    said, mask = output(), masks()
    plain, both = (segmentation_loss(said.logits, mask, region_weight=weight) for weight in (0.0, 0.5))
    assert (both - plain).item() == pytest.approx(0.5 * soft_iou(said.logits, mask).item(), rel=1e-4)


def test_a_wrong_motion_photo_costs_twice_a_wrong_defocus_photo():
    assert dict(zip(BLUR_KINDS, KIND_CLASS_WEIGHTS, strict=True)) == {"motion": 1.5, "defocus": 0.75}
    sure_of_defocus = torch.tensor([[-2.0, 2.0]]).repeat(2, 1)
    wrong, right = math.log1p(math.exp(4)), math.log1p(math.exp(-4))
    motion_wrong = kind_part(sure_of_defocus, [MOTION, DEFOCUS])
    defocus_wrong = kind_part(-sure_of_defocus, [MOTION, DEFOCUS])
    assert motion_wrong == pytest.approx((1.5 * wrong + 0.75 * right) / 2.25, rel=1e-4)
    assert defocus_wrong == pytest.approx((0.75 * wrong + 1.5 * right) / 2.25, rel=1e-4)


def test_a_crop_without_a_kind_says_nothing_about_kinds():
    said = output()
    both = kind_part(said.kind_logits, [MOTION, DEFOCUS, IGNORED_KIND])
    assert both == pytest.approx(kind_part(said.kind_logits[:2], [MOTION, DEFOCUS]), rel=1e-4)


def test_a_batch_without_any_kind_still_reaches_the_branch_with_a_zero_gradient():
    said = output()
    total = bdnet_loss(said, masks(), torch.full((3,), IGNORED_KIND), 0.2, 0.0)
    total.backward()
    assert total.item() == pytest.approx(0.8 * functional.cross_entropy(said.logits, masks()).item())
    assert said.logits.grad.any()
    assert said.kind_logits.grad is not None  # data-parallel training waits for it
    assert not said.kind_logits.grad.any()


def test_without_weight_for_kinds_the_total_is_the_segmentation():
    said, mask, kind = output(), masks(), torch.tensor([MOTION, DEFOCUS, DEFOCUS])
    total = bdnet_loss(said, mask, kind, kind_weight=0.0, region_weight=1.0)
    assert total.item() == segmentation_loss(said.logits, mask, 1.0).item()
    # A network without such a branch: the weight has nothing to take from.
    without = bdnet_loss(Output(said.logits), mask, kind, kind_weight=0.2, region_weight=1.0)
    assert without.item() == total.item()


def test_sides_are_enlarged_to_the_mask_and_add_their_weighted_loss():
    said, mask = output(), masks()
    coarse = torch.randn(3, 2, 4, 5)
    with_side = bdnet_loss(
        Output(said.logits, sides=(coarse,), side_weight=0.3), mask, torch.zeros(3).long(), 0.0, 0.0
    )
    enlarged = functional.interpolate(coarse, (16, 20), mode="bilinear")
    expected = functional.cross_entropy(said.logits, mask) + 0.3 * functional.cross_entropy(enlarged, mask)
    assert with_side.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_network_that_names_the_kind_of_each_pixel_learns_it_from_the_blurred_ones():
    mask, kinds = masks(), torch.randn(3, 2, 16, 20)
    said = Output(output().logits, torch.zeros(3, 2), kind_maps=kinds)
    truth = torch.tensor([MOTION, DEFOCUS, IGNORED_KIND])
    chosen = (mask == 1) & (truth != IGNORED_KIND)[:, None, None]
    pixels = kinds.permute(0, 2, 3, 1)[chosen]
    labels = truth[:, None, None].expand_as(mask)[chosen]
    expected = functional.cross_entropy(pixels, labels, torch.tensor(KIND_CLASS_WEIGHTS))
    assert kind_loss(said, mask, truth).item() == pytest.approx(expected.item(), rel=1e-5)


def test_half_precision_outputs_are_summed_in_float32():
    said = Output(*(part.detach().bfloat16() for part in output()[:2]))
    total = bdnet_loss(said, masks(), torch.tensor([MOTION, DEFOCUS, DEFOCUS]), 0.2, 1.0)
    assert total.dtype == torch.float32
