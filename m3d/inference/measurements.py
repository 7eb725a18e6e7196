"""What can be measured of a mask by rule, on the scan's own grid: size, place, intensities, longest diameter.

A voxel is a solid with faces, not a point: a mask's extents and its diameter are those of its voxels' corners, as its
volume is that of its voxels. So they agree with each other, one voxel has a size, and a box of voxels has the
diagonal that one would compute by hand; a smooth body gains up to a voxel's diagonal.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from data_prep.boxes import occupied
from data_prep.case import Unit
from data_prep.volume import Volume
from m3d.inference.planes import choose_window

__all__ = ["Measurements", "measure_mask", "unit_of"]

Triple = tuple[float, float, float]
Points = npt.NDArray[np.int64]
BLOCK = 512  # rows of distances at a time: a few MB


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """One mask, measured; what an empty mask cannot have is None.

    ``extent_mm`` and ``centroid_mm`` are along the patient's R, A and S, whatever the grid's axes. ``mean`` and ``sd``
    (of the voxels, not of a larger population) are the scan's values inside, in ``unit``. ``longest_diameter_mm`` is
    the largest distance between two corners of its voxels, in any direction. ``touches_edge`` says that the mask
    reaches the scan's first or last voxel along some axis, so that the structure may go on outside.
    """

    voxels: int
    volume_ml: float
    touches_edge: bool
    unit: Unit
    extent_mm: Triple | None = None
    centroid_mm: Triple | None = None
    longest_diameter_mm: float | None = None
    mean: float | None = None
    sd: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "voxels": self.voxels,
            "volume_ml": round(self.volume_ml, 6),
            "extent_mm": _rounded(self.extent_mm),
            "centroid_mm": _rounded(self.centroid_mm),
            "longest_diameter_mm": _rounded(self.longest_diameter_mm),
            "mean": _rounded(self.mean),
            "sd": _rounded(self.sd),
            "unit": self.unit,
            "touches_edge": self.touches_edge,
        }


def unit_of(volume: Volume) -> Unit:
    """``HU`` for what must be CT, by the rule that the pictures go by; no header is asked, for none is kept."""
    return "HU" if choose_window(volume).unit == "HU" else "arbitrary"


def measure_mask(mask: npt.NDArray[np.bool_], volume: Volume, *, unit: Unit | None = None) -> Measurements:
    """Measure a mask on the volume's own grid; ``unit`` is that of its voxels, by default what `unit_of` says."""
    unit = unit_of(volume) if unit is None else unit
    window = occupied(mask)
    if window is None:
        return Measurements(voxels=0, volume_ml=0.0, touches_edge=False, unit=unit)
    part, start = mask[window], np.array([side.start for side in window])
    values, count = volume.array[window][part], int(np.count_nonzero(part))
    corners = volume.to_mm(_hull(part) + start - 0.5)
    return Measurements(
        voxels=count,
        volume_ml=count * volume.voxel_ml,
        touches_edge=any(side.start == 0 or side.stop == n for side, n in zip(window, volume.shape, strict=True)),
        unit=unit,
        extent_mm=_triple(corners.max(axis=0) - corners.min(axis=0)),
        centroid_mm=_triple(volume.to_mm((_centre(part) + start)[None])[0]),
        longest_diameter_mm=max(float(cdist(some, corners).max()) for some in _blocks(corners)),
        mean=float(values.mean(dtype=np.float64)),
        sd=float(values.std(dtype=np.float64)),
    )


def _centre(part: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Mean index along each axis."""
    counts = [np.count_nonzero(part, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def _hull(part: npt.NDArray[np.bool_]) -> Points:
    """The corners of a mask's convex hull, ``(N, 3)`` edges of voxels: solids, so even one voxel spans space.

    An affine keeps them corners, so the hull is sought in whole numbers. Only the ends of rows can be among them.
    """
    rows = np.argwhere(part.any(axis=2))
    lines = part[rows[:, 0], rows[:, 1]]
    first, last = lines.argmax(axis=1), part.shape[2] - lines[:, ::-1].argmax(axis=1)
    ends = [
        np.column_stack([rows + shift, end]) for shift in itertools.product((0, 1), (0, 1)) for end in (first, last)
    ]
    points = np.concatenate(ends)
    for axis in range(3):
        points = _ends(points, axis)
    return np.asarray(points[ConvexHull(points).vertices])


def _ends(points: Points, axis: int) -> Points:
    """Of the points on each line along an axis, the first and the last."""
    others = [other for other in range(3) if other != axis]
    points = points[np.lexsort((points[:, axis], points[:, others[0]], points[:, others[1]]))]
    new = (np.diff(points[:, others], axis=0) != 0).any(axis=1)
    keep = np.concatenate([[True], new]) | np.concatenate([new, [True]])
    return np.asarray(points[keep])


def _blocks(points: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    return [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]


def _triple(values: npt.NDArray[np.float64]) -> Triple:
    r, a, s = values.tolist()
    return r, a, s


def _rounded(value: Triple | float | None) -> list[float] | float | None:
    if isinstance(value, tuple):
        return [round(one, 4) for one in value]
    return None if value is None else round(value, 4)
