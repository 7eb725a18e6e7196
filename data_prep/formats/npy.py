"""Bare ``.npy`` arrays: a place only with an explicit spacing, an orientation only by convention.

Part of m3d-lamed; import through `m3d`.

Indices are taken to grow to superior, posterior and left (SPL), as a stack of axial slices read from the feet up does.
Pickles are never loaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.formats import one_line
from data_prep.volume import BadScan, Volume, spl_affine


def read_npy(path: Path, spacing: tuple[float, ...] | None) -> Volume:
    """Read ``(D, H, W)``, or ``(1, D, H, W)`` as M3D's prepared files have it."""
    if spacing is None:
        raise BadScan("an .npy array has no voxel size; pass spacing=(d, h, w) in mm (--spacing d,h,w)")
    if len(spacing) != 3 or not all(np.isfinite(side) and side > 0 for side in spacing):
        raise BadScan(f"spacing must be three positive numbers in mm, got {spacing}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadScan(f"not a plain .npy array, or a truncated one ({one_line(error, path)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BadScan("an .npy file with one array of numbers is needed")
    if array.ndim == 4 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 3:
        raise BadScan(f"a 3D array (D, H, W) is needed, this one has shape {array.shape}")
    d, h, w = spacing
    return Volume(array, spl_affine((d, h, w)))
