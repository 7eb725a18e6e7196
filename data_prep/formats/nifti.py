"""NIfTI, through nibabel: slope and intercept applied once, sform before qform.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from data_prep.formats import one_line
from data_prep.volume import BadScan, Volume

logger = logging.getLogger(__name__)

_BROKEN = (ImageFileError, HeaderDataError, EOFError, OSError, zlib.error, ValueError)


def read_nifti(path: Path) -> Volume:
    """Read ``.nii`` or ``.nii.gz``; axes stay (i, j, k)."""
    image = _whole(_open(path), path)
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3:
        raise BadScan(f"a 3D scan is needed, this one has {len(shape)} axes {shape}; save one volume of it")
    if image.get_data_dtype().kind not in "iuf":
        raise BadScan(f"voxels are colours or complex numbers ({image.get_data_dtype()}); convert to one channel")
    header: Any = image.header
    if not (header["sform_code"] or header["qform_code"]):
        logger.warning("%s: neither sform nor qform is set; left and right are assumed, not known", path)
    try:
        array = np.asarray(image.dataobj, dtype=np.float32)
    except _BROKEN as error:
        raise BadScan(f"the voxels cannot be read: truncated or damaged ({one_line(error, path)})") from error
    return Volume(array.reshape(shape), image.affine)


def _whole(image: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    """The image from a stream read to its end, where gzip keeps its checksum: nibabel alone stops at the last voxel."""
    if not path.name.lower().endswith(".gz"):
        return image
    try:
        return type(image).from_bytes(gzip.decompress(path.read_bytes()))
    except _BROKEN as error:
        raise BadScan(f"truncated or damaged, its checksum fails ({one_line(error, path)}); copy it again") from error


def _open(path: Path) -> nib.Nifti1Image:
    try:
        with LoggingOutputSuppressor():  # what it would say of a bad spacing, we say ourselves
            image = nib.load(path)
        header: Any = type(image.header)
        with ImageOpener(str(path)) as file:
            raw = header.from_fileobj(file, check=False)  # `load` repairs a bad spacing in silence
    except _BROKEN as error:
        raise BadScan(f"not a NIfTI image, or a damaged one ({one_line(error, path)})") from error
    if not isinstance(image, nib.Nifti1Image):
        raise BadScan(f"not a NIfTI image ({type(image).__name__})")
    zooms = raw["pixdim"][1:4].astype(float).tolist()
    axes = min(int(raw["dim"][0]), 3)
    if not all(np.isfinite(zooms[:axes])) or min(zooms[:axes], default=1.0) <= 0:
        raise BadScan(f"zero, negative or NaN voxel spacing in the header: {zooms} mm; correct pixdim")
    if not np.isfinite(image.affine).all():
        raise BadScan("the affine has NaN or infinite values; correct sform or qform")
    return image
