"""One door for every scan: `read_volume` looks at the path and hands it to the reader of its format.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.volume import BadScan, Volume

__all__ = ["SUFFIXES", "read_volume"]

_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = (".nii", ".nii.gz", *_ITK, ".zip", ".npy")


def read_volume(path: Path | str, *, series: str | None = None, spacing: Sequence[float] | None = None) -> Volume:
    """Read a scan: NIfTI, NRRD, MHA/MHD, a DICOM folder or zip, or ``.npy``.

    Args:
        path: A file, or a folder that holds one DICOM series.
        series: SeriesInstanceUID, for a DICOM folder or zip that holds several.
        spacing: Voxel size in mm along the axes of an ``.npy`` array, whose indices are taken to grow to superior,
            posterior and left; other formats bring their own.

    Raises:
        FileNotFoundError: Nothing is there.
        BadScan: It is there and cannot be used; the message says why and what helps.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        volume = _read(path, series, None if spacing is None else tuple(spacing))
        low, high = volume.range
        if low == high:
            raise BadScan(f"every voxel has the value {low:g}; there is nothing to see")
        if min(volume.shape) < 2:
            raise BadScan(f"a 3D scan is needed, this one is a single slice of shape {volume.shape}")
    except BadScan as error:
        raise BadScan(f"{path}: {error}") from error.__cause__
    return volume


def _read(path: Path, series: str | None, spacing: tuple[float, ...] | None) -> Volume:
    name = path.name.lower()
    dicom = path.is_dir() or name.endswith(".zip")
    if series is not None and not dicom:
        raise BadScan("series= (--series) is for a DICOM folder or zip only")
    if spacing is not None and not name.endswith(".npy"):
        raise BadScan("spacing= (--spacing) is for .npy only; this format has its own")
    if dicom:
        from data_prep.formats import dicom as dicom_format

        return dicom_format.read_folder(path, series) if path.is_dir() else dicom_format.read_zip(path, series)
    if name.endswith((".nii", ".nii.gz")):
        from data_prep.formats.nifti import read_nifti

        return read_nifti(path)
    if name.endswith(_ITK):
        from data_prep.formats.itk import read_itk

        return read_itk(path)
    if name.endswith(".npy"):
        from data_prep.formats.npy import read_npy

        return read_npy(path, spacing)
    raise BadScan(_unknown(path))


def _unknown(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":
            return "this is one DICOM file of a series; pass the folder that holds the series"
    return f"unknown format {path.suffix!r}; known: {', '.join(SUFFIXES)}, or a DICOM folder"
