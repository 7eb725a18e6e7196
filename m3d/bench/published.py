"""What the released evaluation computes, defects included, so that published numbers can be compared (DESIGN 7)."""

import torch
from torch import Tensor


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """The released "Dice": ``2 sum(p t) / (sum(p) + sum(t) + 1)`` of *probabilities*, mean over B samples.

    A mask that is perfect once thresholded can score .5 here, and a right refusal scores 0. Targets of -1 count as 0; a
    target of one voxel a sample stands for an empty one (REFERENCE A5, B-I 14).
    """
    probability = torch.sigmoid(logits.float()).flatten(1)
    truth = target.float().clamp(min=0).flatten(1)
    overlap = (probability * truth).sum(dim=1)
    return (2 * overlap / (probability.sum(dim=1) + truth.sum(dim=1) + 1)).mean()
