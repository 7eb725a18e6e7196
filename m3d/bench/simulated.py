"""Users who know the truth: where they point, what they frame, and where they click next.

All is in voxels of the scan's own grid, follows from the true mask alone and, where something is drawn by lot, from a
seed: one record is asked alike in every run, by every process. The clicks are in the manner of RITM (Sofiiuk et al.
2022), in three dimensions and in mm.
"""

# (D, H, W) = the scan's voxels, N = points

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter, label

from data_prep.boxes import Box, box_of_mask
from data_prep.volume import Volume
from m3d.bench.kinds import CLICKS, MOST_CLICKS, TEXT, parts_of
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.inference.history import Given, Mask
from m3d.inference.prompting import Place, Point, slice_box, spread
from m3d.inference.session import SCRIBBLE_POINTS, SessionObject
from segvol_head.prompts import PADDING, sample_points

__all__ = [
    "SIMULATION",
    "Clicked",
    "Told",
    "click_on",
    "deepest_voxel",
    "dice",
    "middle_of",
    "next_click",
    "perturbed",
    "tell",
]

SIMULATION = "m3d.bench.simulated/1"
"""What the users do: a run that was begun with others is not gone on with."""
INSIDE, OUTSIDE, NEAR_MM = 3, 2, 20.0
"""Points of the kind ``points``: those inside, those outside, and how far from the structure's box those may lie."""
MOVED_MM, SMOOTH_MM, LEAST = 4.0, 8.0, 0.5
"""Of the kind ``mask``: how far the surface is moved, as a standard deviation, over which length that changes, and the
least Dice that is left."""
Voxel = tuple[int, int, int]


# -- what is said at once -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Told:
    """What a user says of one structure beside words: points with labels, a box, an earlier mask ``(D, H, W)``."""

    points: tuple[Point, ...] = ()
    box: Box | None = None
    mask: Mask | None = None

    def in_words(self) -> str:
        """As a person reads it."""
        masked = torch.empty(0) if self.mask is not None else None  # words do not show its voxels
        return str(Given(points=self.points, box=self.box, mask=masked))


def tell(kind: str, truth: Mask, volume: Volume, seed: str) -> Told:
    """What a user who knows the truth says by this kind of prompt; clicks are none of it, they follow answers.

    Raises:
        ValueError: The truth has no voxel.
    """
    if not truth.any():
        raise ValueError("the truth has no voxel")
    found: dict[str, Any] = {}
    for part in parts_of(kind):
        if part not in (TEXT, CLICKS):
            found |= _SAID[part](truth, volume, f"{seed}/{part}")
    return Told(**found)


def deepest_voxel(mask: Mask, spacing: Sequence[float]) -> Voxel:
    """The voxel farthest from all that is outside, in mm, where a careful user clicks; the first of equals."""
    depth, low = _depth(mask, spacing)
    return _moved(np.unravel_index(int(depth.argmax()), depth.shape), low)


def middle_of(mask: Mask, spacing: Sequence[float]) -> Voxel:
    """The voxel farthest from all that is outside, in mm; of equals, as in a thin shell, that nearest to the centre."""
    depth, low = _depth(mask, spacing)
    deepest = np.argwhere(depth >= depth.max() - 1e-9)
    centre = np.argwhere(depth).mean(axis=0)
    return _moved(deepest[np.linalg.norm((deepest - centre) * np.array(spacing), axis=1).argmin()], low)


def perturbed(truth: Mask, spacing: Sequence[float], seed: int) -> Mask:
    """An earlier mask, as of a hurried hand: the surface moved in and out smoothly, by about `MOVED_MM`.

    It is moved less where Dice would fall below `LEAST`, as of what is thin.
    """
    region = _around(truth, spacing, 3 * MOVED_MM)
    near = np.pad(truth[region], 1)  # an edge of the scan is an edge of the structure
    half = min(spacing) / 2  # from the middle of a voxel at the surface to the surface
    inside, outside = (distance_transform_edt(side, sampling=tuple(spacing)) - half for side in (near, ~near))
    depth = np.where(near, inside, -outside)
    noise = np.random.default_rng(seed).standard_normal(near.shape)
    noise = gaussian_filter(noise, [SMOOTH_MM / side for side in spacing])
    noise -= noise.mean()  # of a small region it is far from 0, and would shrink or swell the whole
    amount = MOVED_MM / noise.std()
    while dice(moved := depth + amount * noise > 0, near, spacing) < LEAST:
        amount *= 0.8
    found = np.zeros_like(truth)
    found[region] = moved[1:-1, 1:-1, 1:-1]
    return found


def _point(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    """One click, in the middle."""
    d, h, w = middle_of(truth, volume.spacing)
    return {"points": (((float(d), float(h), float(w)), 1),)}


def _points(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    """Several drawn by lot: inside anywhere, outside near the structure, which is where it matters."""
    region = _around(truth, volume.spacing, NEAR_MM)
    places, labels = sample_points(
        torch.from_numpy(truth[region].copy()),
        positive=INSIDE - 1,  # beside the one that it always draws
        negative=OUTSIDE,
        generator=torch.Generator().manual_seed(_number(seed)),
    )
    low = np.array([side.start for side in region])
    kept = [(_place(at + low), int(said)) for at, said in zip(places.numpy(), labels, strict=True) if said != PADDING]
    return {"points": tuple(kept)}


def _scribble(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    """A stroke along the middle of the structure, on the axial slice that shows most of it."""
    axis, at, flat = _widest(truth, volume)
    stroke = _stroke(flat, np.delete(volume.spacing, axis).tolist())
    places = [_place(np.insert(np.array(one), axis, at)) for one in stroke]
    return {"points": tuple((one, 1) for one in spread(places, SCRIBBLE_POINTS, volume.spacing))}


def _box(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    """The smallest box around it."""
    return {"box": box_of_mask(truth)}


def _slice_box(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    """The smallest box around what the axial slice shows that shows most."""
    axis, at, flat = _widest(truth, volume)
    drawn = box_of_mask(flat)
    return {"box": slice_box(volume, axis=axis, at=at, lo=drawn.lo, hi=drawn.hi)}


def _mask(truth: Mask, volume: Volume, seed: str) -> dict[str, Any]:
    return {"mask": perturbed(truth, volume.spacing, _number(seed))}


_SAID: Mapping[str, Callable[[Mask, Volume, str], dict[str, Any]]] = {
    "point": _point,
    "points": _points,
    "scribble": _scribble,
    "box": _box,
    "slice_box": _slice_box,
    "mask": _mask,
}


# -- clicks that follow answers -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Clicked:
    """What came of clicking: the last mask, Dice before the first click and after each of so many, what each took."""

    mask: Mask
    dice: tuple[float, ...]
    milliseconds: tuple[float, ...]
    clicks: tuple[Voxel, ...]


def click_on(target: SessionObject, truth: Mask, spacing: Sequence[float], *, most: int = MOST_CLICKS) -> Clicked:
    """Click where the answer so far is wrong, from what the object is now; once nothing is wrong, it stays."""
    guess = target.current.array
    scores, times, clicked = [dice(guess, truth, spacing)], list[float](), list[Voxel]()
    while len(clicked) < most:
        # Without a mask all is missed, and the middle of its largest piece is the first click.
        click = next_click(guess, truth, spacing, clicked)
        if click is None:
            break
        at, inside = click
        step = target.add_point(at, positive=inside)
        guess = step.array
        clicked.append(at)
        scores.append(dice(guess, truth, spacing))
        times.append(round(step.milliseconds, 2))
    scores += scores[-1:] * (most + 1 - len(scores))
    return Clicked(mask=guess, dice=tuple(scores), milliseconds=tuple(times), clicks=tuple(clicked))


def next_click(
    guess: Mask, truth: Mask, spacing: Sequence[float], clicked: Sequence[Voxel] = ()
) -> tuple[Voxel, bool] | None:
    """Where a user who knows the truth clicks next, and whether that is inside; None where nothing is left to say.

    The largest error is the largest piece, in voxels, of what is missed or wrongly drawn, without voxels that were
    clicked before; a missed piece goes before one of the same size that is wrongly drawn.
    """
    wrong = guess ^ truth
    for at in clicked:
        wrong[at] = False
    if not wrong.any():
        return None
    region = _around(wrong, spacing, 0.0)
    near, missed = wrong[region], truth[region]
    found: list[tuple[int, bool, Mask]] = []
    for error, inside in ((near & missed, True), (near & ~missed, False)):
        pieces, number = label(error)
        if number:
            sizes = np.bincount(pieces.ravel())[1:]
            found.append((int(sizes.max()), inside, pieces == int(sizes.argmax()) + 1))
    _, inside, piece = max(found, key=lambda one: one[0])
    return _moved(middle_of(piece, spacing), [side.start for side in region]), inside


def dice(guess: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """Hard Dice on the scan's own grid."""
    d, h, w = spacing
    return Dice().value(MaskPair("", guess, truth, (d, h, w)))


# -- geometry -------------------------------------------------------------------------------------------------------


def _depth(mask: Mask, spacing: Sequence[float]) -> tuple[npt.NDArray[np.float64], tuple[int, ...]]:
    """How deep, in mm, each voxel lies of the box around a mask with a margin of one, and where that box begins."""
    box = box_of_mask(mask)
    inner = mask[tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))]
    depth = distance_transform_edt(np.pad(inner, 1), sampling=tuple(spacing))
    return np.asarray(depth, dtype=np.float64), tuple(int(low) - 1 for low in box.lo)


def _moved(at: Sequence[Any] | npt.NDArray[Any], low: Sequence[int]) -> Voxel:
    d, h, w = (int(side) + start for side, start in zip(at, low, strict=True))
    return d, h, w


def _around(mask: Mask, spacing: Sequence[float], margin_mm: float) -> tuple[slice, slice, slice]:
    """The box around a mask with a margin, as far as there are voxels."""
    box = box_of_mask(mask)
    wide = [int(np.ceil(margin_mm / side)) for side in spacing]
    d, h, w = (
        slice(max(0, int(low) - more), min(side, int(high) + more))
        for low, high, more, side in zip(box.lo, box.hi, wide, mask.shape, strict=True)
    )
    return d, h, w


def _widest(truth: Mask, volume: Volume) -> tuple[int, int, Mask]:
    """The axis along the body, and the slice on it that shows most of the structure; the middle one of equals."""
    axis = next(number for number, code in enumerate(volume.orientation) if code in "SI")
    shown = truth.sum(axis=tuple(other for other in range(3) if other != axis))
    equal = np.flatnonzero(shown == shown.max())
    at = int(equal[len(equal) // 2])
    return axis, at, np.asarray(np.take(truth, at, axis=axis))


def _stroke(flat: Mask, spacing: Sequence[float]) -> list[tuple[int, int]]:
    """Of the largest piece of a slice, the deepest voxel of each line across its longer side; the middle of equals."""
    pieces, _ = label(flat)
    piece = pieces == int(np.bincount(pieces.ravel())[1:].argmax()) + 1
    depth = distance_transform_edt(np.pad(piece, 1), sampling=tuple(spacing))[1:-1, 1:-1]
    sides = np.ptp(np.argwhere(piece), axis=0) * np.array(spacing)
    along = int(sides.argmax())
    found = []
    for place, line in enumerate(depth if along == 0 else depth.T):
        if line.any():
            equal = np.flatnonzero(line >= line.max() - 1e-9)
            across = int(equal[len(equal) // 2])
            found.append((place, across) if along == 0 else (across, place))
    return found


def _place(at: npt.NDArray[Any]) -> Place:
    d, h, w = (float(side) for side in at)
    return d, h, w


def _number(seed: str) -> int:
    return random.Random(seed).getrandbits(63)
