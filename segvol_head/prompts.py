"""What a user, or a language model, can say to the mask decoder.

Part of m3d-lamed; import through `m3d`.
"""

# P = prompts, N = points per prompt, C = width, (D, H, W) = the model's grid in voxels

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEGATIVE, POSITIVE, PADDING = 0, 1, -1
"""Labels of points: outside the object, inside it, and no point at all."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """P prompts, each of the same kinds; every kind that is given changes the mask.

    Coordinates are voxel indices ``(d, h, w)`` of the model's grid. Points carry labels 1 (inside), 0 (outside) or
    -1 (padding, ignored), so prompts with different numbers of points share a batch. Boxes are
    ``(d0, h0, w0, d1, h1, w1)`` with *inclusive* corners, as SegVol was trained; a half-open box ``lo, hi`` is
    ``lo, hi - 1`` here. ``text`` is an embedding of the decoder's width, ``mask`` the logits of an earlier answer.
    """

    text: Tensor | None = None
    points: Tensor | None = None
    point_labels: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that contradict each other, before they broadcast into a wrong answer."""
        _expect("text", self.text, "(P, C)", 2)
        _expect("points", self.points, "(P, N, 3)", 3, last=3)
        _expect("point_labels", self.point_labels, "(P, N)", 2)
        _expect("boxes", self.boxes, "(P, 6)", 2, last=6)
        _expect("mask", self.mask, "(P, 1, D, H, W)", 5)
        if self.mask is not None and self.mask.shape[1] != 1:
            raise ValueError(f"mask must be (P, 1, D, H, W), got {tuple(self.mask.shape)}; give one channel of logits")
        counts = {name: value.shape[0] for name, value in self._given().items()}
        if not counts:
            raise ValueError("a prompt needs at least one of text, points, boxes or mask")
        if len(set(counts.values())) > 1:
            raise ValueError(f"prompts disagree about how many they are: {counts}")
        self._check_points()

    def _check_points(self) -> None:
        if (self.points is None) != (self.point_labels is None):
            missing = "points" if self.points is None else "point_labels"
            raise ValueError(f"points and point_labels belong together; {missing} is missing")
        if self.points is None or self.point_labels is None:
            return
        if self.points.shape[:2] != self.point_labels.shape:
            raise ValueError(
                f"points {tuple(self.points.shape)} need point_labels {tuple(self.points.shape[:2])}, "
                f"got {tuple(self.point_labels.shape)}"
            )
        known = torch.isin(self.point_labels.float(), self.point_labels.new_tensor([-1, 0, 1]).float())
        if not bool(known.all()):
            raise ValueError(
                f"point_labels must be 1 (inside), 0 (outside) or -1 (padding), "
                f"got {sorted(set(self.point_labels[~known].tolist()))}"
            )

    def _given(self) -> dict[str, Tensor]:
        named = {
            "text": self.text,
            "points": self.points,
            "point_labels": self.point_labels,
            "boxes": self.boxes,
            "mask": self.mask,
        }
        return {name: value for name, value in named.items() if value is not None}

    def __len__(self) -> int:
        """How many prompts: P."""
        return next(iter(self._given().values())).shape[0]

    def to(self, device: torch.device | str) -> Prompts:
        """Move every part to ``device``."""
        return Prompts(**{name: value.to(device) for name, value in self._given().items()})

    def __getitem__(self, index: Tensor | slice) -> Prompts:
        """Take some of the prompts."""
        return Prompts(**{name: value[index] for name, value in self._given().items()})


def _expect(name: str, value: Tensor | None, shape: str, ndim: int, last: int | None = None) -> None:
    if value is None:
        return
    if value.ndim != ndim or (last is not None and value.shape[-1] != last):
        raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")


def box_of(mask: Tensor) -> Tensor | None:
    """The tightest box ``(6,)`` around what is true in ``(D, H, W)``, corners inclusive; None where nothing is."""
    found = mask.nonzero()
    if len(found) == 0:
        return None
    return torch.cat([found.amin(dim=0), found.amax(dim=0)]).float()


def sample_points(
    mask: Tensor, *, positive: int, negative: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Simulated clicks ``(N, 3)`` and labels ``(N,)``: one inside and up to ``positive`` more, ``negative`` outside.

    N is always ``1 + positive + negative``, filled up with padding; an empty mask gives one padding point and the
    negative ones. The order of random draws is SegVol's.
    """
    inside, outside = mask.bool().nonzero().cpu(), (~mask.bool()).nonzero().cpu()
    chosen = [inside.new_full((1, 3), -1)]
    labels = [PADDING]
    if len(inside):
        chosen = [inside[torch.randint(len(inside), (1,), generator=generator)]]
        labels = [POSITIVE]
    else:
        positive = 0
    for candidates, number, label in ((inside, positive, POSITIVE), (outside, negative, NEGATIVE)):
        if number:
            extra = candidates[torch.randperm(len(candidates), generator=generator)[:number]]
            chosen.append(extra)
            labels += [label] * len(extra)
    missing = 1 + positive + negative - len(labels)
    chosen.append(inside.new_full((missing, 3), -1))
    labels += [PADDING] * missing
    return torch.cat(chosen).float().to(mask.device), torch.tensor(labels, dtype=torch.float32, device=mask.device)
