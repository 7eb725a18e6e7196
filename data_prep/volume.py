"""Voxels and where they are: the one form in which a scan travels through the project.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BadScan", "Volume", "array_sha256", "axcodes", "spl_affine"]

_CODES = (("L", "R"), ("P", "A"), ("I", "S"))


class BadScan(ValueError):
    """A scan that cannot be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True, eq=False)
class Volume:
    """``array`` (D, H, W) float32 in stored units (HU for CT); ``affine`` voxel index -> patient mm (RAS).

    Array axes are the file's own: (i, j, k) for NIfTI, (slice, row, column) for DICOM, NRRD and MetaImage. What
    they mean is said by the affine, never by their order.
    """

    array: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", np.asarray(self.array, dtype=np.float32))
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise BadScan(f"a 3D volume is needed, got an array of shape {self.array.shape}")
        _check_affine(self.affine)
        if not all(np.isfinite(self.range)):
            raise BadScan(f"{_count_bad(self.array)} voxels are NaN or infinite; replace them before use")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along D, H, W."""
        d, h, w = self.array.shape
        return d, h, w

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along D, H, W."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return d, h, w

    @property
    def orientation(self) -> str:
        """Where each index grows to, e.g. "SPL": nibabel's axis codes of the closest patient axes."""
        return axcodes(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL (also right for sheared affines, as from a tilted gantry)."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @cached_property
    def range(self) -> tuple[float, float]:
        """Lowest and highest voxel."""
        return float(self.array.min()), float(self.array.max())

    def to_mm(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Voxel indices to patient mm: ``(N, 3) -> (N, 3)``."""
        return np.asarray(np.asarray(points, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3])

    def to_voxel(self, points_mm: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Patient mm to (fractional) voxel indices: ``(N, 3) -> (N, 3)``."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(np.asarray(points_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3])


def array_sha256(array: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's shape and of its values as little-endian bytes in C order."""
    values = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(str(tuple(array.shape)).encode() + values.tobytes()).hexdigest()


def axcodes(affine: npt.NDArray[np.float64]) -> str:
    """Letters of the closest patient axes, each given to one array axis (as nibabel's ``aff2axcodes``)."""
    return "".join(_CODES[axis][int(sign > 0)] for axis, sign in closest_axes(affine))


def closest_axes(affine: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """For each array axis, the patient axis (0 R, 1 A, 2 S) it runs along and the sign of that run.

    The clearest axis chooses first, on the rotation closest to the affine: nibabel's rule, so that both agree on
    oblique and sheared affines.
    """
    matrix = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(matrix)
    rotation = left @ right
    found = {}
    for column in np.argsort(-np.abs(rotation).max(axis=0), kind="stable").tolist():
        axis = int(np.abs(rotation[:, column]).argmax())
        found[column] = (axis, 1 if rotation[axis, column] > 0 else -1)
        rotation[axis] = 0.0
    return [found[column] for column in range(3)]


def spl_affine(spacing: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Affine of an array whose indices grow to superior, posterior and left, the origin at its first voxel."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1.0
    return affine


def _check_affine(affine: npt.NDArray[np.float64]) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise BadScan(f"the affine must be a finite 4x4 matrix, got {affine.tolist()}")
    if not np.array_equal(affine[3], [0.0, 0.0, 0.0, 1.0]):
        raise BadScan(f"the last row of the affine must be 0 0 0 1, got {affine[3].tolist()}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing <= 0).any():
        raise BadScan(f"a voxel spacing is zero: {spacing.tolist()} mm; correct the header")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-4:
        raise BadScan(f"the affine is singular, its axes do not span space: {affine[:3, :3].tolist()}")


def _count_bad(array: npt.NDArray[np.float32]) -> int:
    return sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in array)
