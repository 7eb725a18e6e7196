"""The released evaluation's own numbers (fixture losses)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3d.bench.published import box_in, enclosing_iou, says_letter, soft_dice, soft_dice_of, soft_sums

FOLDER = Path(__file__).parents[1] / "fixtures" / "losses"
INPUTS, OUTPUTS = load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "outputs.safetensors")


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in OUTPUTS}))
def test_soft_dice_is_the_references(case):
    ours = soft_dice(INPUTS[f"{case}/logits"], INPUTS[f"{case}/target"])
    torch.testing.assert_close(ours, OUTPUTS[f"{case}/bench_dice"], atol=1e-6, rtol=1e-6)


def test_soft_dice_punishes_a_mask_that_is_right_once_thresholded():
    target = torch.zeros(1, 1, 10, 10, 10)
    target[..., :5] = 1
    logits = torch.where(target > 0, 0.1, -0.1)  # every voxel is on its side of the threshold
    p, q = torch.sigmoid(torch.tensor(0.1)), torch.sigmoid(torch.tensor(-0.1))
    by_hand = 2 * 500 * p / (500 * p + 500 * q + 500 + 1)
    assert soft_dice(logits, target).item() == pytest.approx(by_hand.item())
    assert by_hand < 0.53


def test_three_sums_are_all_that_soft_dice_needs():
    logits = torch.tensor([[0.0, 0.0, 40.0, -40.0], [40.0, 40.0, -40.0, -40.0]])
    target = torch.tensor([[1, 0, 1, -1], [1, 0, 1, 0]])
    sums = soft_sums(logits, target)
    torch.testing.assert_close(sums, torch.tensor([[1.5, 2.0, 2.0], [1.0, 2.0, 2.0]]))
    assert soft_dice_of(*sums[0].tolist()) == pytest.approx(3 / 5)
    assert soft_dice(logits, target).item() == pytest.approx((3 / 5 + 2 / 5) / 2)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("It is at [0.1, 0.2, 0.3, 0.4, 0.5, 0.6].", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("[0, 0, 0, 1, 1, 1] or [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]", (0, 0, 0, 1, 1, 1)),  # the first
        ("[-.5, +0.2, 0.3, 0.4, 0.5, 0.6]", (-0.5, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("[0.1,0.2,0.3,0.4,0.5,0.6]", None),
        ("[0.1,  0.2, 0.3, 0.4, 0.5, 0.6]", None),
        ("[ 0.1, 0.2, 0.3, 0.4, 0.5, 0.6 ]", None),
        ("(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)", None),
        ("[1e-1, 0.2, 0.3, 0.4, 0.5, 0.6]", None),
        ("[0.1, 0.2, 0.3, 0.4]", None),
        ("", None),
    ],
)
def test_only_a_box_to_the_letter_is_one(text, box):
    assert box_in(text) == box


def test_the_released_iou_is_that_of_the_enclosing_box():
    one, other = (0, 0, 0, 0.4, 0.4, 0.4), (0.2, 0.2, 0.2, 0.6, 0.6, 0.6)
    assert enclosing_iou(one, other) == pytest.approx(0.2**3 / (0.6**3 + 1e-6), abs=1e-9)  # true IoU: 0.2^3 / 0.12
    assert enclosing_iou(one, one) == pytest.approx(0.064 / (0.064 + 1e-6), abs=1e-9)
    assert enclosing_iou(one, (0.5, 0, 0, 0.9, 0.4, 0.4)) == 0  # apart
    assert enclosing_iou(one, (0, 0, 0.1, 0.4, 0.4, 0.5)) == pytest.approx(
        0.3 / 0.5, abs=1e-4
    )  # one axis: the true one
    assert enclosing_iou(None, one) == enclosing_iou(one, None) == -1


def test_a_letter_counts_wherever_it_stands():
    assert says_letter("A. left parotid", "A") and says_letter("The answer is vitamin A.", "A")
    assert not says_letter("A left parotid", "A") and not says_letter("(a)", "A") and not says_letter("B.", "A")
