"""What masks and header say for certain, by rule: volumes, extents, places, sides, mean HU.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.boxes import Box, box_of_mask
from data_prep.case import Case

__all__ = ["StructureFacts", "facts"]

MIDLINE_MM = 10.0
BODY_HU = -400.0


@dataclass(frozen=True)
class StructureFacts:
    """One structure of a case; ``side`` is the patient's, ``centroid_mm`` RAS, ``extent_mm`` along R, A, S."""

    name: str
    volume_ml: float
    box: Box
    centroid_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    side: str
    touches_edge: bool
    cut: bool
    mean_hu: float


def facts(case: Case) -> dict[str, StructureFacts]:
    """The facts of every structure that has voxels, in the order of the case's names."""
    middle = _middle_mm(case)
    found = {}
    for value, name in case.names.items():
        mask = case.labels == value
        if mask.any():
            found[name] = _facts(case, name, mask, middle)
    return found


def _facts(case: Case, name: str, mask: npt.NDArray[np.bool_], middle: float) -> StructureFacts:
    volume, box = case.volume, box_of_mask(mask, name)
    voxels = np.argwhere(mask)
    places = volume.to_mm(voxels)
    half = np.abs(volume.affine[:3, :3]).sum(axis=1) / 2  # from a voxel's centre to its faces
    r, a, s = places.mean(axis=0).tolist()
    extent = places.max(axis=0) - places.min(axis=0) + 2 * half
    return StructureFacts(
        name=name,
        volume_ml=float(len(voxels) * volume.voxel_ml),
        box=box,
        centroid_mm=(r, a, s),
        extent_mm=(float(extent[0]), float(extent[1]), float(extent[2])),
        side=_side(name, r - middle),
        touches_edge=any(lo == 0 or hi == side for lo, hi, side in zip(box.lo, box.hi, mask.shape, strict=True)),
        cut=name in case.cut_by_crop,
        mean_hu=float(volume.array[mask].mean()),
    )


def _side(name: str, right_mm: float) -> str:
    for side in ("left", "right"):
        if side in name.split():
            return side
    if abs(right_mm) <= MIDLINE_MM:
        return "midline"
    return "right" if right_mm > 0 else "left"


def _middle_mm(case: Case) -> float:
    """The R coordinate of the body's middle: halfway between its outermost voxels."""
    body = case.volume.array > BODY_HU
    if not body.any():
        body = np.ones_like(body)
    corners = [np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    ends = np.array([[edge[0], edge[-1]] for edge in corners], dtype=float)
    return float(case.volume.to_mm(ends.T)[:, 0].mean())
