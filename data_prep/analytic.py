"""Shapes that are known in closed form, and the voxels they are painted on.

A shape is a rule in millimetres with a bounding box: the same shape gives the same anatomy on any grid. Every warp of
the canvas is a shear, so a shape keeps its closed-form volume however the patient stoops.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Canvas", "Pose", "Shape", "arch", "capsule", "ellipsoid", "plate", "rotation", "stack", "tube"]

# R, A, S = coordinates in mm: to the patient's right, forward, up. A shape gets them as three arrays of one shape.
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Point = tuple[float, float, float]
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Shape:
    """A rule for what is inside, and the box ``lo`` to ``hi`` beyond which nothing is."""

    inside: Callable[[Array, Array, Array], Mask]
    lo: Point
    hi: Point

    def scaled(self, factor: float, about: Point) -> Shape:
        """Larger or smaller by ``factor``, the point ``about`` staying where it is."""
        r0, a0, s0 = about

        def inside(r: Array, a: Array, s: Array) -> Mask:
            return self.inside((r - r0) / factor + r0, (a - a0) / factor + a0, (s - s0) / factor + s0)

        lo, hi = (((np.array(end) - about) * factor + about).tolist() for end in (self.lo, self.hi))
        return Shape(inside, _point(lo), _point(hi))

    def moved(self, by: Point) -> Shape:
        """Shifted by ``by``."""
        dr, da, ds = by
        lo, hi = ((np.array(end) + by).tolist() for end in (self.lo, self.hi))
        return Shape(lambda r, a, s: self.inside(r - dr, a - da, s - ds), _point(lo), _point(hi))

    def mirrored(self) -> Shape:
        """The same on the other side of the body's middle."""
        lo, hi = (-self.hi[0], *self.lo[1:]), (-self.lo[0], *self.hi[1:])
        return Shape(lambda r, a, s: self.inside(-r, a, s), lo, hi)

    def where(self, also: Callable[[Array, Array, Array], Mask]) -> Shape:
        """Only the part for which ``also`` holds."""
        return Shape(lambda r, a, s: self.inside(r, a, s) & also(r, a, s), self.lo, self.hi)


def ellipsoid(centre: Point, half: Point, *, power: float = 2.0, yaw: float = 0.0) -> Shape:
    """``|x/a|^p + |y/b|^p + |z/c|^p <= 1``, turned by ``yaw`` degrees about S (right side forward if positive)."""
    cos, sin = float(np.cos(np.deg2rad(yaw))), float(np.sin(np.deg2rad(yaw)))
    reach = np.array([np.hypot(half[0] * cos, half[1] * sin), np.hypot(half[0] * sin, half[1] * cos), half[2]])
    if power != 2.0 and yaw:
        reach[:2] = abs(half[0] * cos) + abs(half[1] * sin), abs(half[0] * sin) + abs(half[1] * cos)

    def inside(r: Array, a: Array, s: Array) -> Mask:
        dr, da, ds = r - centre[0], a - centre[1], (s - centre[2]) / half[2]
        terms = ((dr * cos + da * sin) / half[0], (da * cos - dr * sin) / half[1], ds)
        return np.asarray(sum(np.abs(term) ** power if power != 2.0 else term * term for term in terms) <= 1)

    return Shape(inside, _point((np.array(centre) - reach).tolist()), _point((np.array(centre) + reach).tolist()))


def tube(rows: Rows, *, grow: float = 1.0) -> Shape:
    """Elliptic cross-sections from row to row ``(s, r, a, half_r, half_a)``, s falling; ``grow`` widens them."""
    table = np.array(rows, float)[::-1]
    table[:, 3:] *= grow

    def inside(r: Array, a: Array, s: Array) -> Mask:
        at_r, at_a, half_r, half_a = (_lookup(s, table, column) for column in range(1, 5))
        within = (s >= table[0, 0]) & (s <= table[-1, 0])
        return np.asarray((((r - at_r) / half_r) ** 2 + ((a - at_a) / half_a) ** 2 <= 1) & within)

    middle, half = table[:, 1:3], table[:, 3:]
    lo, hi = (middle - half).min(axis=0), (middle + half).max(axis=0)
    return Shape(inside, (lo[0], lo[1], table[0, 0]), (hi[0], hi[1], table[-1, 0]))


def stack(rows: Rows, *, shrink: float = 0.0, wide: float = 1.0) -> Shape:
    """A body outline: rows ``(s, front, back, widest a, half width, power in front, power behind)``, s falling.

    ``shrink`` mm are taken off all round, ``wide`` stretches the width.
    """
    table = np.array(rows, float)[::-1]
    table[:, 4] *= wide

    def inside(r: Array, a: Array, s: Array) -> Mask:
        front, back, middle, half, power_front, power_back = (_lookup(s, table, column) for column in range(1, 7))
        ahead = a > middle
        reach = np.maximum(np.where(ahead, front - middle, middle - back) - shrink, 1.0)
        power = np.where(ahead, power_front, power_back)
        across = (np.abs(r) / np.maximum(half - shrink, 1.0)) ** power
        along = (np.abs(a - middle) / reach) ** power
        return np.asarray((across + along <= 1) & (s >= table[0, 0]) & (s <= table[-1, 0] - shrink))

    half = table[:, 4].max()
    return Shape(inside, (-half, table[:, 2].min(), table[0, 0]), (half, table[:, 1].max(), table[-1, 0]))


def arch(rows: Rows, *, thick: float, tall: float) -> Shape:
    """A horseshoe: a wall along rows ``(|r|, a, s)``, front to back, ``thick`` and ``tall`` to either side of them."""
    table = np.array(rows, float)

    def inside(r: Array, a: Array, s: Array) -> Mask:
        away, level = _along(np.abs(r), a, table)
        return np.asarray((away / thick) ** 4 + ((s - level) / tall) ** 4 <= 1)

    lo, hi = table.min(axis=0), table.max(axis=0)
    side = hi[0] + thick
    return Shape(inside, (-side, lo[1] - thick, lo[2] - tall), (side, hi[1] + thick, hi[2] + tall))


def plate(rows: Rows, *, thick: float) -> Shape:
    """An upright wall that faces sideways: rows ``(s, r, back, front)``, s falling, of half thickness ``thick``."""
    table = np.array(rows, float)[::-1]

    def inside(r: Array, a: Array, s: Array) -> Mask:
        at_r, back, front = (_lookup(s, table, column) for column in range(1, 4))
        within = (s >= table[0, 0]) & (s <= table[-1, 0]) & (a >= back) & (a <= front)
        return np.asarray(within & (np.abs(r - at_r) <= thick))

    lo, hi = table.min(axis=0), table.max(axis=0)
    return Shape(inside, (lo[1] - thick, lo[2], lo[0]), (hi[1] + thick, hi[3], hi[0]))


def capsule(start: Point, end: Point, radius: float) -> Shape:
    """A rod with round ends."""
    first, step = np.array(start), np.array(end) - np.array(start)
    length = float(step @ step)

    def inside(r: Array, a: Array, s: Array) -> Mask:
        off = [x - float(c) for x, c in zip((r, a, s), first, strict=True)]
        at = np.clip(sum(o * float(d) for o, d in zip(off, step, strict=True)) / length, 0, 1)
        return np.asarray(sum((o - at * float(d)) ** 2 for o, d in zip(off, step, strict=True)) <= radius**2)

    lo, hi = np.minimum(start, end) - radius, np.maximum(start, end) + radius
    return Shape(inside, _point(lo.tolist()), _point(hi.tolist()))


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How a patient lies: anatomy mm, sheared along the height, then ``size * turn @ . + offset``, give patient mm."""

    size: float = 1.0
    turn: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]
    lean: float = 0.0
    stoop: float = 0.0
    sway: float = 0.0
    phase: float = 0.0

    def shear(self, s: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """How far the level ``s`` is pushed to the right and forward."""
        below = np.minimum(s + 60.0, 0.0)
        return self.sway * np.sin(s / 60.0 + self.phase), self.lean * s + self.stoop * below**2 / 100.0

    @property
    def to_patient(self) -> npt.NDArray[np.float64]:
        """The affine part: sheared anatomy mm -> patient mm."""
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.turn * self.size, self.offset
        return matrix


class Canvas:
    """HU and labels on a grid that knows where in the anatomy each voxel lies."""

    def __init__(self, pose: Pose, shape: tuple[int, int, int], affine: npt.NDArray[np.float64]) -> None:
        self.pose, self.shape = pose, shape
        self.hu = np.full(shape, -1000.0, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        self._to_voxel = np.linalg.inv(affine) @ pose.to_patient
        matrix = np.linalg.inv(self._to_voxel).astype(np.float32)
        grids = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
        r, a, s = (sum((matrix[row, i] * grids[i] for i in range(3)), matrix[row, 3]) for row in range(3))
        dr, da = pose.shear(s)
        self.places: tuple[Array, Array, Array] = (r - dr, a - da, s)

    def paint(self, shape: Shape, hu: float, label: int | None = None) -> None:
        """Give the voxels inside a shape an HU and, where one is named, a label (0 takes it away)."""
        window = self.window(shape)
        if window is None:
            return
        within = shape.inside(*(axis[window] for axis in self.places))
        self.hu[window][within] = hu
        if label is not None:
            self.labels[window][within] = label

    def paint_pair(self, shape: Shape, hu: float, label: int | None = None) -> None:
        """Paint a shape and its mirror image."""
        self.paint(shape, hu, label)
        self.paint(shape.mirrored(), hu, label)

    def window(self, shape: Shape) -> tuple[slice, slice, slice] | None:
        """The voxels that the shape's box can reach; None where it lies outside."""
        heights = np.linspace(shape.lo[2], shape.hi[2], 9)
        corners = [(r, a, s) for r in (shape.lo[0], shape.hi[0]) for a in (shape.lo[1], shape.hi[1]) for s in heights]
        points = np.array(corners, float)
        dr, da = self.pose.shear(points[:, 2])
        points[:, 0] += dr
        points[:, 1] += da
        at = points @ self._to_voxel[:3, :3].T + self._to_voxel[:3, 3]
        lo = np.maximum(np.floor(at.min(axis=0)).astype(int) - 1, 0)
        hi = np.minimum(np.ceil(at.max(axis=0)).astype(int) + 2, self.shape)
        if (lo >= hi).any():
            return None
        d, h, w = (slice(int(first), int(last)) for first, last in zip(lo, hi, strict=True))
        return d, h, w


def rotation(degrees: Sequence[float]) -> npt.NDArray[np.float64]:
    """Turn about R (nod), then A (tilt), then S (look aside)."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(degrees, float)).tolist()):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[first, first] = step[second, second] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def _along(across: Array, a: Array, table: npt.NDArray[np.float64]) -> tuple[Array, Array]:
    """Distance in the (|r|, a) plane to a path, and the path's level at the nearest point."""
    away = np.full(np.broadcast_shapes(across.shape, a.shape), np.inf, np.float32)
    level = np.zeros_like(away)
    for start, end in itertools.pairwise(table):
        (dr, da, ds), (r0, a0, s0) = (end - start).tolist(), start.tolist()
        at = np.clip(((across - r0) * dr + (a - a0) * da) / (dr**2 + da**2), 0, 1)
        distance = np.hypot(across - r0 - at * dr, a - a0 - at * da)
        nearer = distance < away
        away, level = np.where(nearer, distance, away), np.where(nearer, s0 + at * ds, level)
    return away, level


def _lookup(s: Array, table: npt.NDArray[np.float64], column: int) -> Array:
    return np.asarray(np.interp(s, table[:, 0], table[:, column]), dtype=np.float32)


def _point(values: Sequence[float]) -> Point:
    r, a, s = values
    return float(r), float(a), float(s)
