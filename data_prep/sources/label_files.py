"""Mask files as data sets have them: label maps and one file a structure, brought onto their scan's own voxels.

Part of m3d-lamed; import through `m3d`.

A mask must lie on the grid of its scan. Axes in another order or direction are the same grid, seen otherwise, and are
turned exactly; anything else is an error, since a resampled mask is no longer what was drawn.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import yaml
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from data_prep.sources.tables import BadTable, read_json
from data_prep.steps import reorient
from data_prep.volume import BadScan, Volume

__all__ = ["label_map", "names_in_header", "overlapping", "pack", "read_names", "stem_of", "structures"]

Labels = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy")
_BROKEN = (ImageFileError, HeaderDataError, EOFError, OSError, zlib.error, ValueError)
_NEAR = 0.1  # of a voxel: headers are rounded, and a quaternion has seven digits
_CARET_LABEL = re.compile(rb'<Label\s+Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<]*))\s*</Label>', re.DOTALL)


def stem_of(path: Path) -> str:
    """The name of a file without the suffix of its format."""
    for suffix in (*SUFFIXES, ".zip"):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def label_map(
    path: Path,
    scan: Volume,
    scan_path: Path,
    names: Mapping[int, str],
    *,
    remedy: str,
    unnamed: Sequence[int] = (),
    spacing: Sequence[float] | None = None,
) -> Labels:
    """Read a label map onto the voxels of its scan: ``(D, H, W)``.

    Args:
        path: The label map.
        scan: The scan it belongs to.
        scan_path: Where the scan came from, for errors.
        names: What the values mean.
        remedy: Where a name can be added, for errors.
        unnamed: Values that mean nothing (background, ignored): they become 0.
        spacing: For ``.npy``.

    Raises:
        BadScan: It cannot be read, lies elsewhere, or has values that are no labels.
    """
    array = _on_grid(_read(path, spacing), scan, path, scan_path)
    labels = _whole(array, path)
    there = sorted({int(value) for slab in labels for value in np.flatnonzero(np.bincount(slab.ravel()))} - {0})
    nameless = [value for value in there if value not in {*names, *unnamed}]
    if nameless:
        known = ", ".join(f"{value}: {name}" for value, name in list(names.items())[:8]) or "none"
        raise BadScan(f"{path}: the value {nameless[0]} has no name (known: {known}); {remedy}")
    if unnamed:
        labels[np.isin(labels, list(unnamed))] = 0
    return labels


def structures(
    files: Iterable[tuple[str, Path]], scan: Volume, scan_path: Path, *, spacing: Sequence[float] | None = None
) -> tuple[Labels, dict[int, str]]:
    """Read one mask a file, which may overlap: labels ``(L, D, H, W)`` and names, in the order of the files.

    Raises:
        BadScan: One cannot be read, lies elsewhere, or holds more than one structure.
    """
    return pack(scan.shape, ((name, _one(path, scan, scan_path, spacing)) for name, path in files))


def overlapping(labels: Labels, regions: Mapping[str, Sequence[int]]) -> tuple[Labels, dict[int, str]]:
    """Structures made of several values of one label map: labels ``(L, D, H, W)`` and names."""
    return pack(labels.shape, ((name, np.isin(labels, list(values))) for name, values in regions.items()))


def pack(shape: Sequence[int], masks: Iterable[tuple[str, Mask]]) -> tuple[Labels, dict[int, str]]:
    """As `data_prep.case.layered`, but one mask is in memory at a time: a scan may have more than a hundred."""
    layers: list[Labels] = [np.zeros(shape, np.uint8)]
    names: dict[int, str] = {}
    for value, (name, mask) in enumerate(masks, start=1):
        if value == 256:
            layers = [layer.astype(np.uint16) for layer in layers]
        free = next((layer for layer in layers if not layer[mask].any()), None)
        if free is None:
            free = np.zeros(shape, layers[0].dtype)
            layers.append(free)
        free[mask] = value
        names[value] = name
    return np.stack(layers), names


def read_names(path: Path) -> dict[int, str]:
    """Names of label values from a JSON or YAML file: ``{"1": "liver"}``, or ``{"liver": 1}``.

    Raises:
        FileNotFoundError: It is not there.
        BadTable: It is something else.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadTable(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    else:
        found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise BadTable(f"{path}: label values with their names are expected, such as {{'1': 'liver'}}")
    names: dict[int, str] = {}
    for one, other in found.items():
        value, name = (one, other) if isinstance(other, str) else (other, one)
        if isinstance(value, bool) or not str(value).isdigit() or not isinstance(name, str):
            raise BadTable(f"{path}: {one!r}: {other!r} is no label value with its name, such as '1': 'liver'")
        if int(value) in names:
            raise BadTable(f"{path}: the value {value} has two names, {names[int(value)]!r} and {name!r}")
        names[int(value)] = name
    return names


def names_in_header(path: Path) -> dict[int, str]:
    """Names that a NIfTI label map carries in its own header (a Caret label table, as TotalSegmentator writes)."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return {}
    try:
        extensions: Any = getattr(nib.load(path).header, "extensions", [])
    except _BROKEN:
        return {}  # reading it will say what is wrong
    names: dict[int, str] = {}
    for extension in extensions:
        content = extension.get_content()
        raw = content if isinstance(content, bytes) else str(content).encode()
        for key, marked, plain in _CARET_LABEL.findall(raw):
            names[int(key)] = (marked or plain).decode("utf-8", errors="replace").strip()
    return names


def _read(path: Path, spacing: Sequence[float] | None) -> Volume:
    """As `read_volume`, but an empty mask is a mask."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mask")
    name = path.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            from data_prep.formats.nifti import read_nifti

            return read_nifti(path)
        if name.endswith(".npy"):
            from data_prep.formats.npy import read_npy

            return read_npy(path, None if spacing is None else tuple(spacing))
        if name.endswith(SUFFIXES):
            from data_prep.formats.itk import read_itk

            return read_itk(path)
    except BadScan as error:
        raise BadScan(f"{path}: {error}") from error.__cause__
    raise BadScan(f"{path}: masks are read from {', '.join(SUFFIXES)}; convert this one")


def _whole(array: npt.NDArray[np.float32], path: Path) -> Labels:
    """The values as the smallest unsigned type that holds them all."""
    low, high = float(array.min()), float(array.max())
    odd = low if low < 0 else high if high >= 2**16 else None
    labels: Labels = np.zeros(0, np.uint8)
    if odd is None:
        labels = array.astype(np.uint8 if high < 256 else np.uint16)
        differs = labels != array
        odd = float(array[differs][0]) if differs.any() else None
    if odd is not None:
        raise BadScan(f"{path}: the value {odd:g} is no label; label maps hold whole numbers from 0 to 65535")
    return labels


def _one(path: Path, scan: Volume, scan_path: Path, spacing: Sequence[float] | None) -> Mask:
    array = _on_grid(_read(path, spacing), scan, path, scan_path)
    low, high = float(array.min()), float(array.max())
    if low < 0 or not np.isin(array, (0.0, high)).all():
        raise BadScan(
            f"{path}: one structure is expected, 0 and one other value; for a map of several give `labels`, "
            "for probabilities save the mask after a threshold"
        )
    return np.asarray(array > 0)


def _on_grid(mask: Volume, scan: Volume, path: Path, scan_path: Path) -> npt.NDArray[np.float32]:
    """The mask's voxels in the order of the scan's axes."""
    if not _same_grid(mask, scan):
        turned, _ = reorient(mask, scan.orientation)
        if not _same_grid(turned, scan):
            raise BadScan(f"{path}: its grid ({_grid(mask)}) is not that of {scan_path} ({_grid(scan)}); {_REMEDY}")
        mask = turned
    return mask.array


_REMEDY = "resample the mask onto the scan (nearest neighbour), or correct the header that is wrong"


def _same_grid(one: Volume, other: Volume) -> bool:
    if one.shape != other.shape:
        return False
    corners = np.array(list(itertools.product(*((0, side - 1) for side in one.shape))), float)
    apart = np.linalg.norm(one.to_mm(corners) - other.to_mm(corners), axis=1).max()
    return bool(apart <= _NEAR * min(other.spacing))


def _grid(volume: Volume) -> str:
    sides, steps = "x".join(map(str, volume.shape)), "x".join(f"{side:.4g}" for side in volume.spacing)
    first = ", ".join(f"{value:.1f}" for value in volume.affine[:3, 3])
    return f"{sides} voxels of {steps} mm, {volume.orientation}, first voxel at {first}"
