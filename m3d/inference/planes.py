"""The pixels of a picture: three mid-planes of a scan with masks and boxes, turned as a radiologist expects them.

Every scan is turned (flips and swaps of axes only) until its indices grow to superior, posterior and left; so patient
right is on the left of the picture, anterior and head are up, whatever order the file stores. An oblique scan is cut
along its own axes, the closest to the patient's. Nothing here draws: `m3d.inference.overlay` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel import orientations
from scipy import ndimage

from data_prep.boxes import Box
from data_prep.volume import Volume

__all__ = ["NOTICE", "VIEWS", "Finding", "Plane", "Window", "choose_window", "is_oblique", "mid_planes"]

NOTICE = "Not for clinical use"
SHOWN = "SPL"  # display axes: 0 to superior, 1 to posterior, 2 to left
# view -> axis it cuts, axis down its rows, is that flipped, axis along its columns, letters left right top bottom
VIEWS: dict[str, tuple[int, int, bool, int, str]] = {
    "axial": (0, 1, False, 2, "RLAP"),
    "coronal": (1, 0, True, 2, "RLSI"),
    "sagittal": (2, 0, True, 1, "APSI"),
}

MARGIN_MM, CONTEXT_MM = 8.0, 70.0

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]
Extent = list[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """Which intensities are shown from black to white."""

    lo: float
    hi: float
    unit: str = ""

    def __str__(self) -> str:
        """As it stands in the picture."""
        if self.unit == "HU":
            return f"window {self.hi - self.lo:.0f}, level {(self.hi + self.lo) / 2:.0f} HU"
        return f"intensities {self.lo:.4g} to {self.hi:.4g}"


@dataclass(frozen=True, eq=False)
class Finding:
    """Something to show: a mask, a box (in voxels) or both; ``note`` stands beside the name in the legend.

    ``color`` is ``#RRGGBB``, None for the next one of the palette.
    """

    name: str
    mask: Bool | None = None
    box: Box | None = None
    note: str = ""
    color: str | None = None

    @property
    def visible(self) -> bool:
        """Whether there is anything to draw: an empty mask is not."""
        return self.box is not None or (self.mask is not None and bool(self.mask.any()))


@dataclass(frozen=True, eq=False)
class Plane:
    """One view: pixels with rows from the top and columns from the left, and what of each finding lies in it.

    ``boxes`` are (left, top, width, height) in mm from the upper left corner, None where the box does not reach this
    plane. ``where`` is the plane as the stored array spells it, ``[57, :, :]``.
    """

    name: str
    image: Float
    masks: tuple[Bool | None, ...]
    boxes: tuple[tuple[float, float, float, float] | None, ...]
    spacing: tuple[float, float]
    letters: str
    where: str

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width."""
        return self.image.shape[0] * self.spacing[0], self.image.shape[1] * self.spacing[1]


def choose_window(volume: Volume) -> Window:
    """Soft tissue for what must be CT (nothing else goes far below zero), else the middle 98 % of intensities."""
    if volume.range[0] <= -200:
        return Window(-160.0, 240.0, "HU")
    lo, hi = (float(value) for value in np.percentile(volume.array[::2, ::2, ::2], (1, 99)))
    return Window(lo, hi) if hi > lo else Window(*volume.range)


def is_oblique(volume: Volume) -> bool:
    """Whether the stored axes lean more than half a degree away from the patient's."""
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    return bool(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0), 0, 1))).max() > 0.5)


def mid_planes(
    volume: Volume,
    findings: Sequence[Finding] = (),
    *,
    centre_on: int = 0,
    centre: Sequence[float] | None = None,
    around: Box | None = None,
    above: float | None = None,
) -> tuple[Plane, Plane, Plane]:
    """Cut axial, coronal and sagittal planes through the middle of a finding, or ``centre``, a voxel index.

    The planes are trimmed to ``around``, a voxel box; without it to the findings and the body near them (all that is
    brighter than ``above``), plus a margin.
    """
    upright = _Upright(volume)
    array = upright.turn(volume.array)
    masks = [None if finding.mask is None else upright.turn(finding.mask) for finding in findings]
    boxes = [None if finding.box is None else upright.turn_box(finding.box) for finding in findings]
    if centre is not None:
        index = upright.turn_point(centre)
    elif findings:
        index = _centre(array.shape, masks[centre_on], boxes[centre_on])
    else:
        index = [side // 2 for side in array.shape]
    if around is not None:
        extent = _whole_voxels(upright.turn_box(around), array.shape)
    else:
        found = _extents(masks, boxes)
        near = _hull(array.shape, found, upright.spacing, CONTEXT_MM) if found else [(0, side) for side in array.shape]
        body = _body(array, near, choose_window(volume).lo if above is None else above)
        extent = _hull(array.shape, [body, *found], upright.spacing, MARGIN_MM)
    axial, coronal, sagittal = (_Cut(name, upright, index, extent).plane(array, masks, boxes) for name in VIEWS)
    return axial, coronal, sagittal


class _Upright:
    """The flips and swaps that bring a scan's axes to `SHOWN`."""

    def __init__(self, volume: Volume) -> None:
        start = orientations.axcodes2ornt(tuple(volume.orientation))
        moves = orientations.ornt_transform(start, orientations.axcodes2ornt(tuple(SHOWN)))
        self.moves = moves
        self.targets = [int(target) for target in moves[:, 0]]
        self.flipped = [bool(flip < 0) for flip in moves[:, 1]]
        self.shape = volume.shape
        self.spacing = [volume.spacing[self.targets.index(axis)] for axis in range(3)]

    def turn(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of ``array`` in display axes."""
        turned: npt.NDArray[Any] = orientations.apply_orientation(array, self.moves)
        return turned

    def turn_box(self, box: Box) -> Box:
        """A voxel box in display axes."""
        lo, hi = [0.0] * 3, [0.0] * 3
        for axis, (target, flipped) in enumerate(zip(self.targets, self.flipped, strict=True)):
            side, low, high = self.shape[axis], box.lo[axis], box.hi[axis]
            lo[target], hi[target] = (side - high, side - low) if flipped else (low, high)
        return Box(tuple(lo), tuple(hi), "voxel", box.name)

    def turn_point(self, point: Sequence[float]) -> list[int]:
        """A voxel index in display axes, rounded and kept inside."""
        index = [0, 0, 0]
        for axis, (target, flipped) in enumerate(zip(self.targets, self.flipped, strict=True)):
            last = self.shape[axis] - 1
            inside = min(max(round(float(point[axis])), 0), last)
            index[target] = last - inside if flipped else inside
        return index

    def stored(self, axis: int, index: int) -> str:
        """How the stored array spells the plane at ``index`` of a display axis."""
        source = self.targets.index(axis)
        places = [":", ":", ":"]
        places[source] = str(self.shape[source] - 1 - index if self.flipped[source] else index)
        return f"[{', '.join(places)}]"


@dataclass(frozen=True, eq=False)
class _Cut:
    """Where one view cuts the upright scan, and how its pixels are taken."""

    name: str
    upright: _Upright
    index: Sequence[int]
    extent: Extent

    def plane(self, array: Float, masks: Sequence[Bool | None], boxes: Sequence[Box | None]) -> Plane:
        axis, row, _, column, letters = VIEWS[self.name]
        return Plane(
            self.name,
            self._pixels(array),
            tuple(None if mask is None else self._pixels(mask) for mask in masks),
            tuple(None if box is None else self._rectangle(box) for box in boxes),
            (self.upright.spacing[row], self.upright.spacing[column]),
            letters,
            self.upright.stored(axis, self.index[axis]),
        )

    def _pixels(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        axis, row, flipped, column, _ = VIEWS[self.name]
        where: list[slice | int] = [0, 0, 0]
        where[axis], where[row], where[column] = self.index[axis], slice(*self.extent[row]), slice(*self.extent[column])
        pixels = array[tuple(where)]
        return np.ascontiguousarray(pixels[::-1] if flipped else pixels)

    def _rectangle(self, box: Box) -> tuple[float, float, float, float] | None:
        axis, row, flipped, column, _ = VIEWS[self.name]
        if not box.lo[axis] - 0.5 <= self.index[axis] < box.hi[axis]:
            return None
        (first, last), (start, _), spacing = self.extent[row], self.extent[column], self.upright.spacing
        top = last - box.hi[row] if flipped else box.lo[row] - first
        left, width, height = box.lo[column] - start, box.sides[column], box.sides[row]
        return left * spacing[column], top * spacing[row], width * spacing[column], height * spacing[row]


def _centre(shape: Sequence[int], mask: Bool | None, box: Box | None) -> list[int]:
    """Centre of mass, moved along each axis to the closest plane that the mask touches; of a box, its middle."""
    if mask is not None and mask.any():
        index = []
        for axis in range(3):
            counts = np.count_nonzero(mask, axis=_others(axis))
            middle = float((counts * np.arange(len(counts))).sum() / counts.sum())
            touched = np.flatnonzero(counts)
            index.append(int(touched[np.abs(touched - middle).argmin()]))
        return index
    if box is not None:
        return [min(max(int(middle), 0), side - 1) for middle, side in zip(box.center, shape, strict=True)]
    return [side // 2 for side in shape]


def _others(axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(3) if other != axis)


def _reach(mask: Bool) -> Extent | None:
    hits = [np.flatnonzero(mask.any(axis=_others(axis))) for axis in range(3)]
    return [(int(hit[0]), int(hit[-1]) + 1) for hit in hits] if all(hit.size for hit in hits) else None


def _body(array: Float, near: Extent, above: float) -> Extent:
    """Where in ``near`` the patient is, without specks of noise in the air; all of it when that cannot be told."""
    part = array[tuple(slice(lo, hi) for lo, hi in near)]
    step = max(1, round(max(part.shape) / 160))
    bright = np.pad(part[::step, ::step, ::step] > above, 1, mode="edge")
    found = _reach(ndimage.binary_opening(bright)[1:-1, 1:-1, 1:-1])
    if found is None:
        return near
    return [
        (first + lo * step, min(first + hi * step, last)) for (lo, hi), (first, last) in zip(found, near, strict=True)
    ]


def _extents(masks: Sequence[Bool | None], boxes: Sequence[Box | None]) -> list[Extent]:
    reaches = [_reach(mask) for mask in masks if mask is not None]
    corners = [list(zip(map(int, box.lo), np.ceil(box.hi).astype(int).tolist(), strict=True)) for box in boxes if box]
    return [reach for reach in reaches if reach is not None] + corners


def _hull(shape: Sequence[int], extents: Sequence[Extent], spacing: Sequence[float], margin_mm: float) -> Extent:
    """The smallest extent that holds all of these, a margin added, inside the array."""
    hull = []
    for axis, side in enumerate(shape):
        low = min(extent[axis][0] for extent in extents) - margin_mm / spacing[axis]
        high = max(extent[axis][1] for extent in extents) + margin_mm / spacing[axis]
        hull.append((max(int(low), 0), min(int(np.ceil(high)), side)))
    return hull


def _whole_voxels(box: Box, shape: Sequence[int]) -> Extent:
    clipped = box.clip(shape)
    edges = zip(clipped.lo, clipped.hi, shape, strict=True)
    return [(min(int(lo), side - 1), max(int(np.ceil(hi)), min(int(lo), side - 1) + 1)) for lo, hi, side in edges]
