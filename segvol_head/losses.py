"""What a mask is trained with: soft Dice and binary cross entropy, as published.

Computed in float32 whatever the model runs in; targets of -1 ("not annotated") count as background.

Part of m3d-lamed; import through `m3d`.
"""

# P = masks; the other dimensions are voxels

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "none"]


def dice_loss(logits: Tensor, target: Tensor, *, reduction: Reduction = "mean", smooth: float = 1.0) -> Tensor:
    """``1 - 2 sum(p t) / (sum p + sum t + smooth)`` per mask ``(P, ...) -> (P,)``, then the mean.

    Smoothing only below the line is published: an empty target costs 1 whatever is drawn, and has no gradient. Only
    the cross entropy teaches a model to draw nothing.
    """
    logits, target = _prepare(logits, target)
    with torch.autocast(logits.device.type, enabled=False):
        probability = logits.sigmoid()
        overlap = (probability * target).sum(dim=1)
        size = probability.sum(dim=1) + target.sum(dim=1)
        return _reduce(1 - 2 * overlap / (size + smooth), reduction)


def bce_loss(logits: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Binary cross entropy, the mean over the voxels of each mask ``(P, ...) -> (P,)``, then over the masks."""
    logits, target = _prepare(logits, target)
    with torch.autocast(logits.device.type, enabled=False):
        voxels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return _reduce(voxels.mean(dim=1), reduction)


def _prepare(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have the same shape")
    if logits.ndim < 2:
        raise ValueError(f"masks must be (P, ...) with voxels after the first dimension, got {tuple(logits.shape)}")
    known = target.float().clamp_min(0)
    return logits.float().flatten(1), known.flatten(1)


def _reduce(per_mask: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return per_mask
    if reduction != "mean":
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
    return per_mask.mean() if len(per_mask) else per_mask.sum()
