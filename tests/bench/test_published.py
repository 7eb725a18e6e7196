"""The released evaluation's own numbers (fixture losses)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3d.bench.published import soft_dice

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
