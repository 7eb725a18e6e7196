"""What the released evaluation computes, defects included, so that published numbers can be compared (DESIGN 7).

Each docstring says where a correct measure would differ.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["box_in", "enclosing_iou", "says_letter", "soft_dice", "soft_dice_of", "soft_sums"]

T = TypeVar("T", float, Tensor)
_NUMBER = r"[-+]?[0-9]*\.?[0-9]+"
_BOX = re.compile(rf"\[({_NUMBER}(?:, {_NUMBER}){{5}})\]")


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """The released "Dice": ``2 sum(p t) / (sum(p) + sum(t) + 1)`` of *probabilities*, mean over B samples.

    A mask that is perfect once thresholded can score .5 here, and a right refusal scores 0. Targets of -1 count as 0; a
    target of one voxel a sample stands for an empty one (REFERENCE A5, B-I 14).
    """
    overlap, said, truth = soft_sums(logits, target).unbind(dim=1)
    return soft_dice_of(overlap, said, truth).mean()


def soft_sums(logits: Tensor, target: Tensor) -> Tensor:
    """All that `soft_dice` needs of a mask: ``sum(p t), sum(p), sum(t)`` of each of B samples, ``(B, 3)``."""
    probability = torch.sigmoid(logits.float()).flatten(1)
    truth = target.float().clamp(min=0).flatten(1)
    return torch.stack([(probability * truth).sum(dim=1), probability.sum(dim=1), truth.sum(dim=1)], dim=1)


def soft_dice_of(overlap: T, said: T, truth: T) -> T:
    """`soft_dice` of one mask, or of each of B, from its sums; no 1 above, so that an empty truth scores 0."""
    return 2 * overlap / (said + truth + 1)


def box_in(text: str) -> tuple[float, ...] | None:
    """The first box of an answer: six plain numbers in brackets with exactly ``", "`` between them (REFERENCE A5).

    Anything else is no box, however plainly it is meant as one; nor has a number an exponent.
    """
    found = _BOX.search(text)
    return None if found is None else tuple(float(number) for number in found.group(1).split(", "))


def enclosing_iou(said: Sequence[float] | None, truth: Sequence[float] | None) -> float:
    """The released "IoU" of two boxes ``(d0, h0, w0, d1, h1, w1)``: overlap by the volume of the box around both.

    That is less than a true IoU wherever the boxes do not lie along one axis; -1 where either box is missing.
    """
    if said is None or truth is None:
        return -1.0
    overlap, around = 1.0, 1.0
    for axis in range(3):
        low, high = (said[axis], said[axis + 3]), (truth[axis], truth[axis + 3])
        overlap *= max(0.0, min(low[1], high[1]) - max(low[0], high[0]))
        around *= max(low[1], high[1]) - min(low[0], high[0])
    return overlap / (around + 1e-6)


def says_letter(text: str, letter: str) -> bool:
    """The released accuracy of closed questions: ``"A."`` stands anywhere in the answer, also within a word."""
    return f"{letter}." in text
