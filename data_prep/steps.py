"""The spatial steps of a preparation, each with its way back.

Part of m3d-lamed; import through `m3d`.

Two kinds are enough. A `View` re-reads the same voxels (axes reordered, directions flipped, a box cut out): exact both
ways, and no voxel is copied. A `Lattice` lays a grid of another size over the volume: interpolation forth and back.
Both carry ``matrix``, the 4x4 matrix from a voxel index after the step to one before it, so points and boxes follow the
very same way as voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.boxes import Box, box_of_mask
from data_prep.volume import Volume, closest_axes

__all__ = [
    "Axis",
    "Lattice",
    "View",
    "crop",
    "foreground",
    "reorient",
    "resample",
    "sampled",
    "transform_box",
    "transform_points",
]

Shape = tuple[int, int, int]
Part = tuple[slice, slice, slice]
_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_SAME_SPACING = 1e-3  # header spacings are rounded (3.9059999 for 3.906): closer than this is the same grid
_TIE = 1e-6  # halves round down on every machine, as the published nearest neighbour does for even factors


@dataclass(frozen=True)
class View:
    """Reordered axes and one slice (step 1 or -1) along each: what orientation and crop do."""

    shape: Shape
    axes: Shape
    slices: tuple[slice, slice, slice]

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """Index in the view -> index in the full array."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1.0
        for column, (axis, part) in enumerate(zip(self.axes, self.slices, strict=True)):
            start, _, step = part.indices(self.shape[axis])
            matrix[axis, column], matrix[axis, 3] = step, start
        return matrix

    def apply(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of a full array that the step keeps; writing into it writes into the array."""
        return array.transpose(self.axes)[self.slices]

    def undo(self, array: npt.NDArray[Any], *, fill: float = 0.0) -> npt.NDArray[Any]:
        """A full array with ``array`` where it came from and ``fill`` elsewhere."""
        full = np.full(self.shape, fill, dtype=array.dtype)
        self.apply(full)[...] = array
        return full


@dataclass(frozen=True)
class Axis:
    """A grid axis over a volume axis: the volume begins at grid edge ``start``, a grid step is ``step`` voxels."""

    size: int
    grid: int
    step: float
    start: int = 0

    @property
    def stop(self) -> int:
        """First grid index that lies wholly outside the volume."""
        return min(math.ceil(self.start + self.size / self.step - 1e-6), self.grid)

    def to_volume(self, index: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Grid index -> volume index."""
        return (index + 0.5 - self.start) * self.step - 0.5

    def to_grid(self, index: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Volume index -> grid index."""
        return (index + 0.5) / self.step + self.start - 0.5


@dataclass(frozen=True)
class Lattice:
    """A grid laid over a volume; grid voxels outside the volume are padding."""

    axes: tuple[Axis, Axis, Axis]
    smooth: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the volume."""
        d, h, w = (axis.size for axis in self.axes)
        return d, h, w

    @property
    def grid(self) -> Shape:
        """Shape of the grid."""
        d, h, w = (axis.grid for axis in self.axes)
        return d, h, w

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """Index in the grid -> index in the volume."""
        matrix = np.diag([*(axis.step for axis in self.axes), 1.0])
        matrix[:3, 3] = [float(axis.to_volume(np.zeros(1))[0]) for axis in self.axes]
        return matrix

    def finer(self, factor: float) -> Lattice:
        """The same volume under a grid ``factor`` times as fine, without padding; never finer than the voxels."""
        steps = [max(axis.step / factor, min(axis.step, 1.0)) for axis in self.axes]
        d, h, w = (
            Axis(axis.size, max(math.ceil(axis.size / step - 1e-6), 1), step)
            for axis, step in zip(self.axes, steps, strict=True)
        )
        return Lattice((d, h, w), self.smooth)

    def apply(self, array: npt.NDArray[Any], *, order: int = 1, fill: float = 0.0) -> npt.NDArray[Any]:
        """Volume -> grid: linear (order 1; averaging where coarser, if ``smooth``) or nearest voxel (order 0)."""
        _check(array, self.shape, "volume", order)
        inside = tuple(slice(axis.start, axis.stop) for axis in self.axes)
        for number in sorted(range(3), key=lambda n: self.axes[n].grid / self.axes[n].size):  # shrink first
            axis = self.axes[number]
            where = axis.to_volume(np.arange(axis.start, axis.stop, dtype=np.float64)).clip(0, axis.size - 1)
            support = max(axis.step, 1.0) if self.smooth else 1.0
            array = _nearest(array, number, where) if order == 0 else _linear(array, number, where, support)
        if array.shape == self.grid:
            return np.ascontiguousarray(array)
        full = np.full(self.grid, fill, dtype=array.dtype)
        full[inside] = array
        return full

    def undo(self, array: npt.NDArray[Any], out: npt.NDArray[Any], *, order: int = 1, part: Part | None = None) -> None:
        """Grid -> volume, written into ``out`` slab by slab so that no second full-size array is needed.

        With ``part`` the same voxels of that part of the volume alone, which ``out`` then is.
        """
        part = part or (slice(0, self.shape[0]), slice(0, self.shape[1]), slice(0, self.shape[2]))
        _check(array, self.grid, "grid", order)
        _check(out, tuple(side.stop - side.start for side in part), "volume", order)
        back = [
            axis.to_grid(np.arange(side.start, side.stop, dtype=np.float64)).clip(
                axis.start, max(axis.stop - 1, axis.start)
            )
            for axis, side in zip(self.axes, part, strict=True)
        ]
        for number in (1, 2):
            array = _nearest(array, number, back[number]) if order == 0 else _linear(array, number, back[number], 1.0)
        if order == 0:
            for slab, index in enumerate(_round(back[0])):
                out[slab] = array[index]
            return
        low, weight = _neighbours(back[0], array.shape[0])
        for slab, (index, share) in enumerate(zip(low, weight, strict=True)):
            out[slab] = array[index] if share == 0 else array[index] * (1 - share) + array[index + 1] * share


def reorient(volume: Volume, codes: str) -> tuple[Volume, View]:
    """Permute and flip axes so that indices grow towards ``codes`` ("SPL"), as closely as that can be."""
    wanted = [_LETTERS[letter] for letter in codes]
    have = closest_axes(volume.affine)
    axes = tuple(next(number for number, (axis, _) in enumerate(have) if axis == target) for target, _ in wanted)
    signs = [have[number][1] * sign for number, (_, sign) in zip(axes, wanted, strict=True)]
    slices = tuple(slice(None, None, sign) for sign in signs)
    return _seen(volume, View(volume.shape, axes, slices))  # type: ignore[arg-type]  # three of each


def crop(volume: Volume, box: Box) -> tuple[Volume, View]:
    """Cut out a voxel box (whole numbers, inside the volume)."""
    slices = tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))
    return _seen(volume, View(volume.shape, (0, 1, 2), slices))  # type: ignore[arg-type]  # three slices


def resample(volume: Volume, grid: Shape, spacing: Sequence[float] | None) -> tuple[Volume, Lattice]:
    """Lay ``grid`` over the volume: stretched over it (``spacing`` None) or with voxels of ``spacing`` mm, centred.

    Stretched, this is ``F.interpolate(mode="trilinear", align_corners=False)``, without smoothing, as published. With a
    spacing, an axis on which the volume does not fit gets larger voxels until it does, and coarser axes are smoothed.
    """
    if spacing is None:
        axes = [Axis(size, side, size / side) for size, side in zip(volume.shape, grid, strict=True)]
    else:
        axes = [_fit(*sides) for sides in zip(volume.shape, grid, volume.spacing, spacing, strict=True)]
    lattice = Lattice((axes[0], axes[1], axes[2]), smooth=spacing is not None)
    return Volume(lattice.apply(volume.array), volume.affine @ lattice.matrix), lattice


def sampled(
    array: npt.NDArray[Any], where: Sequence[npt.NDArray[np.float64]], support: Sequence[float] = (1.0, 1.0, 1.0)
) -> npt.NDArray[Any]:
    """Linear values at every combination of the positions ``where`` along three axes: as `Lattice` has them, in part.

    Positions beyond the array take the value of its edge; ``support`` above 1 smooths over so many voxels.
    """
    for number in sorted(range(3), key=lambda n: len(where[n]) / array.shape[n]):  # shrink first
        inside = where[number].clip(0, array.shape[number] - 1)
        array = _linear(array, number, inside, max(support[number], 1.0))
    return array


def foreground(array: npt.NDArray[np.float32], above: float, margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """The box of all voxels above a value, grown by ``margin`` voxels within the array; None when there are none."""
    hits = array > above
    if not hits.any():
        return None
    box = box_of_mask(hits, "foreground")
    lo = tuple(low - side for low, side in zip(box.lo, margin, strict=True))
    hi = tuple(high + side for high, side in zip(box.hi, margin, strict=True))
    return Box(lo, hi, "voxel", box.name).clip(array.shape)


def transform_points(points: npt.ArrayLike, matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Move voxel indices ``(N, 3)`` by a 4x4 matrix."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be (N, 3) voxel indices in array-axis order, got shape {points.shape}")
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def transform_box(box: Box, matrix: npt.NDArray[np.float64]) -> Box:
    """Move a voxel box by a matrix that keeps axes axes; edges lie half a voxel before indices."""
    if box.frame != "voxel":
        raise ValueError(f"a voxel box is needed here, got frame={box.frame!r}; convert it with to_voxel first")
    ends = transform_points(np.array([box.lo, box.hi], dtype=np.float64) - 0.5, matrix) + 0.5
    return Box(tuple(ends.min(axis=0).tolist()), tuple(ends.max(axis=0).tolist()), "voxel", box.name)


def _seen(volume: Volume, view: View) -> tuple[Volume, View]:
    return Volume(view.apply(volume.array), volume.affine @ view.matrix), view


def _fit(size: int, side: int, voxel: float, wanted: float) -> Axis:
    step = max(wanted / voxel, size / side)
    if abs(step - 1.0) < _SAME_SPACING and size <= side:
        step = 1.0
    return Axis(size, side, step, max(math.floor((side - size / step) / 2 + 0.5 - _TIE), 0))


def _check(array: npt.NDArray[Any], shape: tuple[int, ...], name: str, order: int) -> None:
    if array.shape != shape:
        raise ValueError(f"expected an array on the {name} of shape {shape}, got {array.shape}")
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (nearest) or 1 (linear), got {order}")


def _round(where: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    return np.floor(where + (0.5 - _TIE)).astype(np.intp).clip(0)


def _nearest(array: npt.NDArray[Any], axis: int, where: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    return _take(array, axis, _round(where))


def _linear(array: npt.NDArray[Any], axis: int, where: npt.NDArray[np.float64], support: float) -> npt.NDArray[Any]:
    """Weighted sum of neighbours along one axis; ``support`` > 1 widens the triangle of weights (smoothing)."""
    if support == 1.0 and np.array_equal(where, np.rint(where)):
        return _take(array, axis, where.astype(np.intp))
    size = array.shape[axis]
    if support == 1.0:
        low, share = _neighbours(where, size)
        taps = [(low, 1 - share), (np.minimum(low + 1, size - 1), share)]
    else:
        first = np.ceil(where - support).astype(np.intp)
        indices = [first + tap for tap in range(math.floor(2 * support) + 1)]
        weights = [np.where((0 <= i) & (i < size), (1 - np.abs(where - i) / support).clip(0), 0.0) for i in indices]
        total = np.sum(weights, axis=0)
        taps = [(i.clip(0, size - 1), weight / total) for i, weight in zip(indices, weights, strict=True)]
    shape = [-1 if number == axis else 1 for number in range(3)]
    result: npt.NDArray[Any] | None = None
    for index, weight in taps:
        part = _take(array, axis, index) * weight.astype(np.float32).reshape(shape)
        result = part if result is None else np.add(result, part, out=result)
    assert result is not None
    return result


def _take(array: npt.NDArray[Any], axis: int, index: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    if index.size and np.array_equal(index, np.arange(index[0], index[0] + index.size)):
        return array[(slice(None),) * axis + (slice(int(index[0]), int(index[0]) + index.size),)]
    return np.take(array, index, axis=axis)


def _neighbours(where: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    low = np.floor(where).astype(np.intp).clip(0, max(size - 2, 0))
    return low, (where - low).astype(np.float32)
