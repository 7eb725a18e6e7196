"""What the sources of M3D-Data share: finding and reading their volumes, naming images, keeping splits apart.

Part of m3d-lamed; import through `m3d`.

Published volumes have lost spacing and orientation: they get an affine of 1 mm that only fixes the axis order, and
their cases say ``placed=False``.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.case import Case
from data_prep.draft import Draft
from data_prep.formats import one_line
from data_prep.sources.base import SPLITS, Entry
from data_prep.sources.tables import BadTable
from data_prep.volume import BadScan, Volume, spl_affine

__all__ = [
    "OnLeak",
    "find_table",
    "identify",
    "listed_entries",
    "locate",
    "path_parts",
    "read_array",
    "read_norm01",
    "read_slices",
    "read_unlabelled",
    "settle_splits",
    "three_axes",
    "unplaced",
    "warn_missing",
]

OnLeak = Literal["error", "drop"]
Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-3  # how far float16 and interpolation may leave [0, 1]
_SLICES = (".jpeg", ".png")


def read_unlabelled(path: Path, *, image_id: str, patient_id: str) -> Case:
    """A case without labels: a prepared ``.npy``, or a folder of slices as M3D-Cap publishes them.

    Raises:
        FileNotFoundError: Nothing is there.
        BadScan: It is there and cannot be used.
    """
    volume = read_slices(path) if path.is_dir() else read_norm01(path)
    labels = np.zeros(volume.shape, np.uint8)
    unit: Literal["norm01", "arbitrary"] = "arbitrary" if path.is_dir() else "norm01"
    return Case(
        id=image_id,
        patient_id=patient_id,
        volume=volume,
        labels=labels,
        names={},
        modality="CT",
        unit=unit,
        placed=False,
    )


def read_array(path: Path) -> Array:
    """One plain array of numbers; pickles are never loaded.

    Raises:
        FileNotFoundError: There is no such file.
        BadScan: It is no such array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is the root right, and the download whole?")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadScan(f"{path}: not a plain .npy array, or a truncated one ({one_line(error, path)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BadScan(f"{path}: an .npy file with one array of numbers is needed")
    return array


def three_axes(array: Array, path: Path) -> Array:
    """``(1, D, H, W)`` or ``(D, H, W) -> (D, H, W)``."""
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or 0 in array.shape:
        raise BadScan(f"{path}: (1, D, H, W) or (D, H, W) is needed, this array has shape {array.shape}")
    return array


def read_norm01(path: Path) -> Volume:
    """A prepared M3D volume: ``(1, D, H, W)`` or ``(D, H, W)`` floats in [0, 1].

    Raises:
        FileNotFoundError: There is no such file.
        BadScan: It holds something else, or nothing to see.
    """
    array = three_axes(read_array(path), path)
    if array.dtype.kind != "f":
        raise BadScan(f"{path}: {array.dtype} voxels; M3D's prepared files hold floats in [0, 1]")
    volume = unplaced(array, path)
    low, high = volume.range
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise BadScan(f"{path}: values from {low:g} to {high:g}; M3D's prepared files hold floats in [0, 1]")
    return volume


def unplaced(array: Array, path: Path) -> Volume:
    """A volume of a known axis order and nothing else known; one without contrast, or with NaN, is refused."""
    try:
        volume = Volume(array, spl_affine((1.0, 1.0, 1.0)))
    except BadScan as error:
        raise BadScan(f"{path}: {error}") from error
    if volume.range[0] == volume.range[1]:
        raise BadScan(f"{path}: every voxel has the value {volume.range[0]:g}; there is nothing to see")
    return volume


def read_slices(folder: Path) -> Volume:
    """Slices ``<number>.jpeg`` or ``.png`` by number, grey, over 255; of several sizes, the most frequent one.

    Raises:
        FileNotFoundError: There is no such folder.
        BadScan: It holds no slices, or one that cannot be used.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; is the root right, and the download whole?")
    slices = [_read_grey(path) for path in _slice_files(folder)]
    shape, count = Counter(one.shape for one in slices).most_common(1)[0]
    if count < len(slices):
        logger.warning(
            "%s: %d of %d slices are not %s; left out, as published", folder, len(slices) - count, len(slices), shape
        )
    kept = np.stack([one for one in slices if one.shape == shape])
    if len(kept) < 2:
        raise BadScan(f"{folder}: only one slice of {shape}; a 3D scan is needed")
    return unplaced(kept.astype(np.float32) / np.float32(255), folder)


def _slice_files(folder: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SLICES:
            continue
        if not path.stem.isascii() or not path.stem.isdigit():
            raise BadScan(f"{path}: a slice is named by its number, like 12.jpeg; rename or remove it")
        other = found.setdefault(int(path.stem), path)
        if other != path:
            raise BadScan(f"{path}: {other.name} has the same number; remove one")
    if not found:
        raise BadScan(f"{folder}: no slices ({' or '.join(_SLICES)}) in it")
    return [found[number] for number in sorted(found)]


def _read_grey(path: Path) -> npt.NDArray[np.uint8]:
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise BadScan(f"{path}: not a picture, or a damaged one; download it again") from error
    if array.dtype != np.uint8:
        raise BadScan(f"{path}: {array.dtype} pixels; M3D-Cap's slices have 8 bits")
    if array.ndim == 3 and array.shape[-1] in (3, 4):  # ITU-R 601 weights in 16 bits, as pictures are made grey
        weighed = array[..., :3].astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((weighed + 0x8000) >> 16).astype(np.uint8)
    if array.ndim == 3 and array.shape[-1] == 2:  # grey and opacity
        array = array[..., 0]
    if array.ndim != 2:
        raise BadScan(f"{path}: one picture of rows and columns is needed, this has shape {array.shape}")
    return np.asarray(array, np.uint8)


def path_parts(text: str, where: str) -> tuple[str, ...]:
    """The parts of a path in a table, whatever its slashes and wherever it began.

    Raises:
        BadTable: It is empty or climbs out of the data folder.
    """
    parts = tuple(part for part in PurePosixPath(text.replace("\\", "/")).parts if part not in ("/", "."))
    if not parts or ".." in parts:
        raise BadTable(f"{where}: the path {text!r} does not stay inside the data folder; give it relative to the root")
    return parts


def locate(parts: tuple[str, ...], *, roots: tuple[Path, ...], raw_suffix: str | None = None) -> Path:
    """Where a listed file lies under one of ``roots``, which may be the data root or any folder on the way.

    Tables were written on other machines, so leading folders may be missing here. With ``raw_suffix``, a file
    ``X_npy/.../name.npy`` that was never prepared is looked for as ``X/.../name<raw_suffix>``. Where nothing is found
    the first guess comes back, and reading it says so.
    """
    ways = [parts]
    if raw_suffix is not None:
        folders, name = tuple(part.removesuffix("_npy") for part in parts[:-1]), parts[-1]
        ways.append((*folders, name.removesuffix(".npy") + raw_suffix if name.endswith(".npy") else name))
    for way in ways:
        for start in range(max(len(way) - 1, 1)):
            for root in roots:
                path = root.joinpath(*way[start:])
                if path.exists():
                    return path
    return roots[0].joinpath(*parts)


def find_table(root: Path, names: Iterable[str], folders: Iterable[str]) -> Path | None:
    """The first of ``names`` that lies in the root or one of its ``folders``."""
    places = [root, *(root / folder for folder in folders)]
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


def identify(*parts: str) -> str:
    """An id of letters, digits and ``._-``; where other characters had to go, a hash keeps it unique."""
    plain = unicodedata.normalize("NFD", "-".join(parts))
    plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Mn")  # as M3D-Cap's files were named
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain)
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


CAP = "M3D-Cap"


class Listed(Protocol):
    """An image that a table lists."""

    path: Path
    patient: str


def listed_entries(
    where: str,
    found: Mapping[str, Listed],
    splits: Mapping[str, Collection[str]],
    drafts: Callable[[str, str], tuple[Draft, ...]],
    *,
    license: str | None,
    on_leak: OnLeak,
) -> Iterator[Entry]:
    """The entries of M3D-Cap's images, whichever table lists them; ``drafts`` says what of an image in its split."""
    warn_missing(where, [one.path for one in found.values()])
    patients = {image: one.patient for image, one in found.items()}
    for image, split in settle_splits(where, splits, patients, on_leak=on_leak).items():
        one = found[image]
        yield Entry(
            dataset=CAP,
            license=license,
            image_id=image,
            patient_id=one.patient,
            split=split,
            files=(one.path,),
            read=partial(read_unlabelled, one.path, image_id=image, patient_id=one.patient),
            drafts=drafts(image, split),
        )


def settle_splits(
    source: str, listed: Mapping[str, Collection[str]], patients: Mapping[str, str], *, on_leak: str
) -> dict[str, str]:
    """The split of each image, given the splits that list it and its patient.

    Where an image or a patient is in two splits, ``drop`` keeps it in the one that is examined last (test, then
    validation) and leaves out its images elsewhere.

    Raises:
        BadTable: There is such a leak, and ``on_leak`` is not ``drop``.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for image, splits in listed.items():
        splits_of[patients[image]].update(splits)
    images = sorted(image for image, splits in listed.items() if len(set(splits)) > 1)
    leaking = sorted(patient for patient, splits in splits_of.items() if len(splits) > 1)
    if leaking:
        said = f"{source}: {_some(images, 'images')} and {_some(leaking, 'patients')} are in more than one split"
        if on_leak != "drop":
            raise BadTable(f"{said}; correct the lists, or set on_leak: drop to keep them in the test lists only")
        logger.warning("%s; they stay in the one that is examined last", said)
    last = {patient: max(splits, key=SPLITS.index) for patient, splits in splits_of.items()}
    return {image: last[patients[image]] for image, splits in listed.items() if last[patients[image]] in splits}


def warn_missing(source: str, paths: Collection[Path]) -> None:
    """Say how many listed files are not there; each is an error when it is read, all of them are one now.

    Raises:
        FileNotFoundError: Not one is there.
    """
    missing = [path for path in paths if not path.exists()]
    if missing and len(missing) == len(paths):
        raise FileNotFoundError(
            f"{missing[0]}: not there, nor is any other file that {source} lists; is the root right?"
        )
    if missing:
        logger.warning(
            "%s: %d of %d listed files are not there, such as %s", source, len(missing), len(paths), missing[0]
        )


def _some(names: list[str], what: str) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what} ({shown})" if names else f"no {what}"
