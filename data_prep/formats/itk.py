"""NRRD and MetaImage, through SimpleITK.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from data_prep.formats import one_line
from data_prep.volume import BadScan, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk(path: Path) -> Volume:
    """Read ``.nrrd``, ``.nhdr``, ``.mha`` or ``.mhd``; array axes are (slice, row, column)."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = _check(reader)
        reader.SetOutputPixelType(sitk.sitkFloat32)
        if len(size) == 4:
            reader.SetExtractSize([*size[:3], 0])
        image = reader.Execute()
    except RuntimeError as error:
        raise BadScan(_reason(error, path)) from error
    return Volume(sitk.GetArrayFromImage(image), affine_of(image))


def affine_of(image: sitk.Image) -> npt.NDArray[np.float64]:
    """Array index (slice, row, column) -> RAS mm, from ITK's (column, row, slice) -> LPS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return (LPS_TO_RAS @ affine)[:, [2, 1, 0, 3]]


def _reason(error: RuntimeError, path: Path) -> str:
    said = re.sub(r"^\s*\w+\(0x\w+\):", "", str(error).rpartition("ERROR:")[2])
    if "spacing" in said:
        return "zero or negative voxel spacing in the header; correct it"
    if "determinant" in said:
        return "the affine is singular: its directions do not span space; correct the header"
    return f"cannot be read: truncated, damaged or not the format its name says ({one_line(said, path)})"


def _check(reader: sitk.ImageFileReader) -> tuple[int, ...]:
    size: tuple[int, ...] = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise BadScan(f"{reader.GetNumberOfComponents()} values per voxel (colour or vectors); one channel is needed")
    if not (len(size) == 3 or (len(size) == 4 and size[3] == 1)):
        raise BadScan(f"a 3D scan is needed, this one has {len(size)} axes {size}; save one volume of it")
    if not all(np.isfinite(side) and side > 0 for side in reader.GetSpacing()):
        raise BadScan(f"zero, negative or NaN voxel spacing in the header: {reader.GetSpacing()} mm")
    return size
