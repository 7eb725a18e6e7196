"""Boxes around structures: half-open, in array-axis order, in a named frame.

Part of m3d-lamed; import through `m3d`.

Half-open means that ``lo=(2, 0, 0), hi=(5, 1, 1)`` holds the voxels 2, 3 and 4 along the first axis and is three voxels
long. Voxel ``i`` reaches from edge ``i`` to edge ``i + 1``; as a voxel *index*, edge ``i`` lies at ``i - 0.5``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = ["Box", "Frame", "box_of_mask", "iou", "occupied", "to_mm", "to_norm", "to_voxel"]

Frame = Literal["voxel", "norm", "mm"]


@dataclass(frozen=True)
class Box:
    """An axis-aligned box; ``frame`` is voxel edges, fractions of the array (norm) or patient mm (RAS)."""

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    frame: Frame = "voxel"
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", tuple(self.lo))
        object.__setattr__(self, "hi", tuple(self.hi))
        if self.frame not in get_args(Frame):
            raise ValueError(f"unknown frame {self.frame!r} of a box; known: {', '.join(get_args(Frame))}")
        if len(self.lo) != len(self.hi) or not self.lo:
            raise ValueError(f"a box needs as many lower as upper corners, got lo={self.lo}, hi={self.hi}")
        if not all(low <= high for low, high in zip(self.lo, self.hi, strict=True)):
            raise ValueError(f"a box must have lo <= hi on every axis, got lo={self.lo}, hi={self.hi}")
        if not all(map(math.isfinite, self.lo + self.hi)):
            raise ValueError(f"a box must be finite, got lo={self.lo}, hi={self.hi}")

    @property
    def sides(self) -> tuple[float, ...]:
        """Lengths along the axes."""
        return tuple(high - low for low, high in zip(self.lo, self.hi, strict=True))

    @property
    def center(self) -> tuple[float, ...]:
        """The middle, in the box's own frame (edges, not indices, for voxel boxes)."""
        return tuple((low + high) / 2 for low, high in zip(self.lo, self.hi, strict=True))

    @property
    def volume(self) -> float:
        """Product of the sides: voxels, fraction of the array, or cubic mm."""
        return math.prod(self.sides)

    def clip(self, shape: Sequence[int]) -> Box:
        """The part inside an array of ``shape`` (voxel) or inside the unit cube (norm)."""
        if self.frame == "mm":
            raise ValueError("a box in mm cannot be clipped to an array; convert it with to_voxel first")
        top = [1.0] * len(shape) if self.frame == "norm" else shape
        lo = tuple(min(max(low, 0), limit) for low, limit in zip(self.lo, top, strict=True))
        hi = tuple(min(max(high, 0), limit) for high, limit in zip(self.hi, top, strict=True))
        return replace(self, lo=lo, hi=hi)


def box_of_mask(mask: npt.NDArray[Any], name: str = "") -> Box:
    """The smallest voxel box that holds every non-zero voxel."""
    sides = occupied(mask)
    if sides is None:
        raise ValueError(f"an empty mask has no box{f' ({name})' if name else ''}")
    return Box(tuple(side.start for side in sides), tuple(side.stop for side in sides), "voxel", name)


def occupied(mask: npt.NDArray[Any]) -> tuple[slice, ...] | None:
    """The slices of the smallest box that holds every non-zero voxel; None where there is none.

    The axis along which memory is longest goes first, and what it leaves out is not read again.
    """
    sides = [slice(0, side) for side in mask.shape]
    for axis in sorted(range(mask.ndim), key=lambda axis: -abs(mask.strides[axis])):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hits = np.flatnonzero(mask[tuple(sides)].any(axis=others))
        if not hits.size:
            return None
        sides[axis] = slice(int(hits[0]), int(hits[-1]) + 1)
    return tuple(sides)


def to_norm(box: Box, shape: Sequence[int]) -> Box:
    """Voxel edges to fractions of an array of ``shape``."""
    if box.frame == "norm":
        return box
    _need(box, "voxel", "to_norm")
    return _scaled(box, [1.0 / side for side in shape], "norm")


def to_voxel(box: Box, shape: Sequence[int], affine: npt.NDArray[np.float64] | None = None) -> Box:
    """Fractions (or, given the affine, mm) to voxel edges, not rounded; from mm it is the hull of the eight corners."""
    if box.frame == "voxel":
        return box
    if box.frame == "norm":
        return _scaled(box, shape, "voxel")
    if affine is None:
        raise ValueError("a box in mm needs the scan's affine to become voxels; pass affine=")
    lo, hi = _hull(_corners(box), np.linalg.inv(affine).astype(np.float64))
    return Box(tuple((lo + 0.5).tolist()), tuple((hi + 0.5).tolist()), "voxel", box.name)


def to_mm(box: Box, affine: npt.NDArray[np.float64]) -> Box:
    """Voxel edges to the axis-aligned hull, in RAS mm, of the box's eight corners."""
    if box.frame == "mm":
        return box
    _need(box, "voxel", "to_mm")
    lo, hi = _hull(_corners(box) - 0.5, affine)
    return Box(tuple(lo.tolist()), tuple(hi.tolist()), "mm", box.name)


def iou(first: Box, second: Box) -> float:
    """True intersection over union (the released code divides by the enclosing box instead)."""
    if first.frame != second.frame or len(first.lo) != len(second.lo):
        raise ValueError(f"boxes in different frames cannot be compared: {first} and {second}")
    lo = map(max, first.lo, second.lo)
    hi = map(min, first.hi, second.hi)
    common = math.prod(max(high - low, 0.0) for low, high in zip(lo, hi, strict=True))
    union = first.volume + second.volume - common
    return common / union if union > 0 else 0.0


def _need(box: Box, frame: Frame, function: str) -> None:
    if box.frame != frame:
        raise ValueError(f"{function} needs a {frame} box, got frame={box.frame!r}; convert it with to_voxel first")


def _scaled(box: Box, factors: Sequence[float], frame: Frame) -> Box:
    lo = tuple(low * factor for low, factor in zip(box.lo, factors, strict=True))
    hi = tuple(high * factor for high, factor in zip(box.hi, factors, strict=True))
    return Box(lo, hi, frame, box.name)


def _corners(box: Box) -> npt.NDArray[np.float64]:
    return np.array(list(itertools.product(*zip(box.lo, box.hi, strict=True))), dtype=np.float64)


def _hull(
    points: npt.NDArray[np.float64], affine: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    moved = np.asarray(points @ affine[:3, :3].T + affine[:3, 3], dtype=np.float64)
    return moved.min(axis=0), moved.max(axis=0)
