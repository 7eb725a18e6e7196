"""Dice and cross entropy: values known by hand, and the reference's (fixture losses)."""

import math

import pytest
import torch

from segvol_head import bce_loss, dice_loss

CASES = ["plain", "one_empty", "saturated", "with_minus1", "int_target", "minus_inf", "minus_inf_empty"]
CERTAIN = 50.0


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_references(losses, case):
    logits = losses.inputs[f"{case}/logits"].clone().requires_grad_()
    target = losses.inputs[f"{case}/target"]
    dice, bce = dice_loss(logits, target), bce_loss(logits, target)
    torch.testing.assert_close(dice, losses.outputs[f"{case}/dice_loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bce, losses.outputs[f"{case}/bce_loss"], atol=1e-6, rtol=1e-6, equal_nan=True)
    if f"{case}/grad" in losses.outputs:
        (dice + bce).backward()
        torch.testing.assert_close(logits.grad, losses.outputs[f"{case}/grad"], atol=1e-8, rtol=1e-5)


def test_dice_by_hand():
    target = torch.zeros(2, 1, 2, 2, 2)
    target[0, :, 0] = 1  # 4 voxels of 8
    logits = torch.full_like(target, CERTAIN)  # "everything": overlap 4, sizes 8 + 4
    per_mask = dice_loss(logits, target, reduction="none")
    assert per_mask.tolist() == pytest.approx([1 - 2 * 4 / (8 + 4 + 1), 1.0])
    assert dice_loss(logits, target).item() == pytest.approx(per_mask.mean().item())


def test_bce_by_hand():
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0], [0.0, -CERTAIN]])
    assert bce_loss(logits, target, reduction="none").tolist() == pytest.approx([math.log(2), math.log(2) / 2])


def test_an_empty_target_teaches_only_through_the_cross_entropy():
    logits, target = torch.zeros(1, 1, 2, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, 2)
    dice_loss(logits, target).backward()
    assert logits.grad.abs().max() == 0
    bce_loss(logits, target).backward()
    assert bool((logits.grad > 0).all())


def test_no_masks_cost_nothing_and_keep_the_graph():
    logits = torch.zeros(0, 1, 2, 2, 2, requires_grad=True)
    loss = dice_loss(logits, torch.zeros(0, 1, 2, 2, 2)) + bce_loss(logits, torch.zeros(0, 1, 2, 2, 2))
    assert loss.item() == 0
    loss.backward()


def test_half_precision_is_summed_in_float32():
    logits, target = torch.randn(2, 1, 32, 32, 32), (torch.rand(2, 1, 32, 32, 32) > 0.5).float()
    with torch.autocast("cpu", torch.bfloat16):
        dice, bce = dice_loss(logits.bfloat16(), target), bce_loss(logits.bfloat16(), target)
    assert dice.dtype == bce.dtype == torch.float32
    assert dice.item() == pytest.approx(dice_loss(logits, target).item(), abs=1e-3)


def test_shapes_never_broadcast():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 6, 5\) and target \(1, 1, 1, 1, 1\)"):
        dice_loss(torch.zeros(1, 1, 4, 6, 5), torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="after the first dimension"):
        bce_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        bce_loss(torch.zeros(1, 3), torch.zeros(1, 3), reduction="sum")
