"""Masks and volumes back to files, on the scan's own grid.

Part of m3d-lamed; import through `m3d`.

NIfTI keeps its affine in float32: what is read back agrees with the scan's to about 1e-7 of its values (exactly where
the scan was a NIfTI with an sform). The quaternion form (qform) is written too, unless the affine is sheared (tilted
gantry), which it cannot say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.volume import Volume

__all__ = ["write_mask", "write_volume"]


def write_mask(path: Path | str, mask: npt.NDArray[Any], *, like: Volume) -> None:
    """Write a mask or label map (0..255) as uint8 NIfTI with the shape and affine of ``like``."""
    mask = np.asarray(mask)
    if mask.shape != like.shape:
        raise ValueError(f"{path}: the mask has shape {mask.shape}, the scan {like.shape}")
    if mask.dtype.kind not in "biu" or (mask.size and not 0 <= int(mask.min()) <= int(mask.max()) <= 255):
        raise ValueError(f"{path}: a mask needs whole numbers 0 to 255, got {mask.dtype} up to {mask.max()}")
    _write(Path(path), mask.astype(np.uint8), like.affine)


def write_volume(path: Path | str, volume: Volume) -> None:
    """Write a volume as float32 NIfTI."""
    _write(Path(path), volume.array, volume.affine)


def _write(path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> None:
    import nibabel as nib

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: results are written as NIfTI; use a name that ends in .nii.gz")
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(affine, code=0)
    with atomic_path(path) as temporary:
        image.to_filename(temporary)
