"""What a user points at: checked against the scan, then brought to the grid that the mask head knows.

Indices and edges are those of `data_prep.boxes`: voxel ``i`` reaches from edge ``i`` to edge ``i + 1``.
"""

# N = points or voxels, (D, H, W) = the scan's voxels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import Box, to_voxel
from data_prep.volume import Volume
from data_prep.way import Way
from segvol_head import Prompts

__all__ = [
    "Place",
    "Point",
    "ScanFrame",
    "as_prompts",
    "in_words",
    "mask_logits",
    "place_box",
    "place_points",
    "refuse_contradictions",
    "slice_box",
    "spread",
    "unseen",
]

Place = tuple[float, float, float]
Point = tuple[Place, int]
ScanFrame = Literal["voxel", "mm"]
DIGITS = 6  # of a voxel: what is left of the rounding of an affine and its inverse is cut off
INSIDE, OUTSIDE = 8.0, -16.0
"""Logits of a mask that is given, which are about those of the head's own answers."""


def place_points(
    places: npt.ArrayLike, volume: Volume, *, frame: ScanFrame = "voxel", kind: str = "point"
) -> tuple[Place, ...]:
    """Indices in the scan of places that are given as such, or in patient mm (RAS): ``(N, 3)``.

    Raises:
        ValueError: They are no triples of numbers, there are none, or one lies outside the scan.
    """
    try:
        given = np.asarray(places, dtype=np.float64)
    except (TypeError, ValueError):  # words, or places of different lengths
        given = np.empty(0)
    if given.ndim != 2 or given.shape[1:] != (3,) or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"a {kind} needs three finite numbers, (d, h, w) or (x, y, z) in mm; got {places!r}")
    _check_frame(frame)
    at = given
    if frame == "mm":
        inverse = np.linalg.inv(volume.affine)
        at = (given @ inverse[:3, :3].T + inverse[:3, 3]).round(DIGITS)
    outside = ((at < -0.5) | (at > np.array(volume.shape) - 0.5)).any(axis=1)
    if outside.any():
        first = int(outside.argmax())
        named = f"{kind} {in_words(given[first])}"
        if frame == "mm":
            named += f" mm, which is voxel {in_words(at[first].round(1))},"
        other = "mm" if frame == "voxel" else "voxel"
        raise ValueError(
            f"{named} lies outside the scan, whose voxels are {volume.shape}; "
            f"give one inside, or frame={other!r} if that is what its numbers are"
        )
    return tuple((d, h, w) for d, h, w in at.tolist())


def place_box(box: Box, volume: Volume) -> Box:
    """A box of any frame in voxels of the scan, half-open; in mm it is cut where it reaches beyond the scan.

    Raises:
        ValueError: A side is empty, or it reaches beyond the scan in voxels, or does not reach it in mm.
    """
    if len(box.lo) != 3:
        raise ValueError(f"a box needs three sides, got lo={box.lo}, hi={box.hi}; for one slice there is add_slice_box")
    voxel = to_voxel(box, volume.shape, volume.affine)
    if box.frame != "voxel":
        lo, hi = (tuple(np.round(corner, DIGITS).tolist()) for corner in (voxel.lo, voxel.hi))
        voxel = replace(voxel, lo=lo, hi=hi)
    if box.frame == "mm":  # the hull of a box that is turned into an oblique scan's axes is larger than the box
        voxel = voxel.clip(volume.shape)
    lows, highs = np.array(voxel.lo), np.array(voxel.hi)
    if (lows >= highs).any() or (lows < 0).any() or (highs > np.array(volume.shape)).any():
        raise ValueError(
            f"box {in_words(box.lo)} to {in_words(box.hi)} ({box.frame}) must have lo < hi and lie in the scan, "
            f"whose voxels are {volume.shape}; cut it with box.clip(shape), or give it in its own frame"
        )
    return voxel


def slice_box(
    volume: Volume, *, axis: int, at: float, lo: Sequence[float], hi: Sequence[float], frame: ScanFrame = "voxel"
) -> Box:
    """A box drawn on one slice, as a voxel box that is one voxel thin.

    In voxels ``axis`` is the array's and ``at`` a slice's index; in mm ``axis`` is R, A or S (0, 1, 2) and ``at`` where
    on it. ``lo`` and ``hi`` are the two other sides, in order.

    Raises:
        ValueError: There is no such axis or slice, or a side is empty or reaches beyond the scan.
    """
    _check_frame(frame)
    if axis not in (0, 1, 2) or len(lo) != 2 or len(hi) != 2:
        raise ValueError(f"a box on a slice needs axis 0, 1 or 2 and two sides, got axis={axis}, lo={lo}, hi={hi}")
    if frame == "voxel" and not (float(at).is_integer() and 0 <= at < volume.shape[axis]):
        raise ValueError(f"there is no slice {at:g} on axis {axis}: the scan has slices 0 to {volume.shape[axis] - 1}")
    low, high = (tuple(np.insert(np.asarray(side, dtype=np.float64), axis, at).tolist()) for side in (lo, hi))
    drawn = Box(low, high, frame)
    flat = to_voxel(drawn, volume.shape, volume.affine)
    lows, highs = np.round(flat.lo, DIGITS), np.round(flat.hi, DIGITS)
    # An axis of the patient need not be the array's: that of the slice is where the box has no thickness.
    thin = axis if frame == "voxel" else int((highs - lows).argmin())
    if highs[thin] - lows[thin] < 1:
        lows[thin] = np.floor((lows[thin] + highs[thin]) / 2)
        highs[thin] = lows[thin] + 1
    return place_box(Box(tuple(lows.tolist()), tuple(highs.tolist())), volume)


def spread(places: Sequence[Place], most: int, spacing: Sequence[float]) -> tuple[Place, ...]:
    """At most so many places that stand for all: one near the middle, then always that farthest from the chosen."""
    if most < 1:
        raise ValueError(f"a scribble is reduced to at least 1 point, got most={most}")
    unique = list(dict.fromkeys(places))
    mm = np.array(unique) * np.array(spacing)
    chosen = [int(np.linalg.norm(mm - mm.mean(axis=0), axis=1).argmin())]
    nearest = np.linalg.norm(mm - mm[chosen[0]], axis=1)
    while len(chosen) < min(most, len(unique)):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(mm - mm[chosen[-1]], axis=1))
    return tuple(unique[number] for number in chosen)


def refuse_contradictions(points: Sequence[Point], box: Box | None) -> None:
    """Refuse what cannot all be true; points and box are in voxels of the scan.

    Raises:
        ValueError: A label is none, a voxel is both inside and outside, or a point inside is not in the box.
    """
    labels: dict[tuple[int, ...], int] = {}
    for at, label in points:
        if label not in (0, 1):
            raise ValueError(f"a point's label is 1 (inside) or 0 (outside), got {label}")
        voxel = tuple(int(np.floor(side + 0.5)) for side in at)
        if labels.setdefault(voxel, label) != label:
            raise ValueError(
                f"point {in_words(at)} is said to be inside and outside: voxel {voxel} has a point of either kind; "
                "undo one of them"
            )
        if box is not None and label == 1 and not _holds(box, at):
            raise ValueError(
                f"point {in_words(at)} is said to be inside, but lies outside the box {in_words(box.lo)} to "
                f"{in_words(box.hi)}; undo the one that is wrong, or give a box that holds the point"
            )


def as_prompts(way: Way, points: Sequence[Point], box: Box | None, *, mask: Tensor | None = None) -> Prompts | None:
    """One prompt on the grid, of what `place_points` and `place_box` have checked; None where nothing is given.

    What the model's grid leaves out of the scan moves to the nearest voxel that it has. ``mask`` is on the grid.
    """
    last = np.array(way.shape) - 1.0
    given: dict[str, Tensor] = {}
    if points:
        on_grid = np.clip(way.points_to_grid([at for at, _ in points]), 0, last)
        given["points"] = torch.from_numpy(on_grid).float()[None]
        given["point_labels"] = torch.tensor([[float(label) for _, label in points]])
    if box is not None:
        given["boxes"] = torch.from_numpy(_corners(way.box_to_grid(box), last)).float()[None]
    if mask is not None:
        given["mask"] = mask[None, None]
    return Prompts(**given) if given else None


def mask_logits(way: Way, mask: npt.NDArray[np.bool_]) -> Tensor:
    """A mask on the scan, ``(D, H, W)``, as logits on the grid.

    Raises:
        ValueError: Nothing of it is left there.
    """
    on_grid = way.mask_to_grid(mask)
    if not on_grid.any():
        raise ValueError("nothing of the mask is left on the model's coarser grid; give a point in it instead")
    return torch.from_numpy(np.where(on_grid, np.float32(INSIDE), np.float32(OUTSIDE)))


def unseen(way: Way, at: Place) -> bool:
    """Whether the model's grid leaves this voxel of the scan out."""
    on_grid = way.points_to_grid([at])[0]
    return bool(((on_grid < -0.5) | (on_grid > np.array(way.shape) - 0.5)).any())


def in_words(numbers: Sequence[float] | npt.NDArray[np.float64]) -> str:
    """A place as messages show it: ``(61, 40.5, 52)``."""
    return "(" + ", ".join(f"{float(number):g}" for number in numbers) + ")"


def _corners(on_grid: Box, last: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A half-open voxel box of the grid as the inclusive corners that the head was trained with."""
    first = np.clip(np.round(np.array(on_grid.lo)), 0, last)
    end = np.clip(np.round(np.array(on_grid.hi)) - 1, first, last)
    return np.concatenate([first, end])


def _holds(box: Box, at: Place) -> bool:
    """Whether the middle of a voxel lies in a voxel box; edges belong to it."""
    return all(low <= side + 0.5 <= high for low, side, high in zip(box.lo, at, box.hi, strict=True))


def _check_frame(frame: str) -> None:
    if frame not in get_args(ScanFrame):
        raise ValueError(f"unknown frame {frame!r} of a prompt; known: {', '.join(get_args(ScanFrame))}")
