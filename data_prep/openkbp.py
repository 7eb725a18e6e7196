"""OpenKBP: head-and-neck CTs with clinical contours (Babier et al., Medical Physics 48, 5549, 2021; MIT licence).

Two ways to a case: `read_case` for a folder of NIfTI files, `fetch_case` for one case of the public repository, which
keeps its volumes as sparse CSV (flat index and value of a 128 x 128 x 128 array in C order).

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.case import Case
from data_prep.read import read_volume
from data_prep.volume import BadScan, Volume, array_sha256

__all__ = ["NAMES", "FetchFailed", "RemoteCase", "cases", "fetch_case", "read_case"]

NAMES = {
    1: "brainstem",
    2: "spinal cord",
    3: "right parotid",
    4: "left parotid",
    5: "esophagus",
    6: "larynx",
    7: "mandible",
}
BASE_URL = (
    "https://raw.githubusercontent.com/ababier/open-kbp/ed9602e68411a45b7c8f039999f897895407d25f"
    "/provided-data/validation-pats"
)
TOTAL_SECONDS = 120.0
LARGEST_BYTES = 64 * 2**20
CREDIT = """OpenKBP, patient {patient} of the validation set. Converted from the CSV files of {url}
A. Babier et al., OpenKBP: The open-access knowledge-based planning grand challenge, Medical Physics 48, 5549 (2021).
MIT License, Copyright (c) 2021 Aaron Babier.
"""


class FetchFailed(OSError):
    """A case could not be downloaded, or is not the one that was asked for; nothing was kept."""


@dataclass(frozen=True, kw_only=True)
class RemoteCase:
    """A case of the public repository, and what its conversion must give (see `data_prep.volume.array_sha256`)."""

    patient: str
    spacing: tuple[float, float, float]
    num_slices: int
    ct_sha256: str
    structures_sha256: str
    side: int = 128


# A validation patient with all seven structures, none of them cut; the last 13 slices of its array are empty.
DEMO_CASE = RemoteCase(
    patient="pt_236",
    spacing=(3.906, 3.906, 3.0),
    num_slices=115,
    ct_sha256="08c186f47c5641f4c832a3c45dca18562a0f88875b9ccaf7c034acb1b1658759",
    structures_sha256="c86d5e97f105b97e09bf5927f86918ca3bdfd906a3a5a6ceda34f08e65b4373e",
)


def cases(root: Path | str, split: str) -> list[Path]:
    """The case folders of a split (``train``, ``validation``), by patient number.

    Raises:
        FileNotFoundError: The folder is not there or holds no case.
    """
    folder = Path(root) / split
    found = [path.parent for path in folder.glob("*/ct.nii.gz")]
    if not found:
        raise FileNotFoundError(f"{folder}: no OpenKBP case (a folder with ct.nii.gz) in it")
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_case(folder: Path | str) -> Case:
    """Read one case: CT, contours, and which structures the crop has cut.

    ``complete`` is False: a structure that was not contoured is not absent.

    Raises:
        FileNotFoundError: ``ct.nii.gz`` or ``structures.nii.gz`` is not there.
        BadScan: One of them cannot be used, or the two do not belong together.
    """
    folder = Path(folder)
    volume = read_volume(folder / "ct.nii.gz")
    contours = read_volume(folder / "structures.nii.gz")
    if contours.shape != volume.shape or not np.allclose(contours.affine, volume.affine, atol=1e-3):
        raise BadScan(
            f"{folder / 'structures.nii.gz'}: shape {contours.shape} or place differs from ct.nii.gz {volume.shape}; "
            "copy both files of the case again"
        )
    odd = sorted(set(np.unique(contours.array).tolist()) - {0.0, *map(float, NAMES)})
    if odd:
        raise BadScan(f"{folder / 'structures.nii.gz'}: values {odd[:5]} are no OpenKBP labels (0 to {max(NAMES)})")
    return Case(
        id=folder.name,
        patient_id=folder.name,
        volume=volume,
        labels=contours.array.astype(np.uint8),
        names=NAMES,
        cut_by_crop=_cut(folder),
        source={"dataset": "OpenKBP", "license": "MIT", "region": "head and neck"},
    )


def fetch_case(
    cache: Path | str, *, remote: RemoteCase = DEMO_CASE, base_url: str = BASE_URL, timeout: float = 5.0
) -> Path:
    """Download and convert one case, or find it in ``cache``; the folder is what `read_case` reads.

    Args:
        cache: Where converted cases are kept; made if missing.
        remote: Which case, and the checksums of its conversion.
        base_url: The folder of patients in the public repository, or in a mirror of it.
        timeout: Seconds without an answer or without a byte after which it is given up.

    Raises:
        FetchFailed: No connection, a file missing or broken, or a conversion that is not the known one.
    """
    folder = Path(cache) / remote.patient
    if _kept(folder, remote):
        return folder
    url = f"{base_url.rstrip('/')}/{remote.patient}"
    deadline = time.monotonic() + max(TOTAL_SECONDS, timeout)
    ct = _ct(_table(f"{url}/ct.csv", 2, timeout, deadline), remote, url)
    labels = np.zeros(remote.side**3, np.uint8)
    for label, name in NAMES.items():
        file = name.title().replace(" ", "")
        voxels = _indices(_table(f"{url}/{file}.csv", 1, timeout, deadline)[:, 0], remote, f"{url}/{file}.csv")
        labels[voxels[labels[voxels] == 0]] = label  # where contours overlap, the first one keeps the voxel
    structures = _on_slices(labels, remote)
    for what, array, known in (("ct", ct, remote.ct_sha256), ("structures", structures, remote.structures_sha256)):
        if array_sha256(array) != known:
            raise FetchFailed(
                f"{url}: the converted {what} has checksum {array_sha256(array)[:12]}, {known[:12]} was expected; "
                "the source has changed, use a scan of your own"
            )
    _keep(folder, ct, structures, remote, url)
    return folder


def _ct(table: npt.NDArray[np.float64], remote: RemoteCase, url: str) -> npt.NDArray[np.int16]:
    stored = np.zeros(remote.side**3, np.float64)
    stored[_indices(table[:, 0], remote, f"{url}/ct.csv")] = table[:, 1]
    return _on_slices((stored - 1000).astype(np.int16), remote)


def _on_slices(flat: npt.NDArray[Any], remote: RemoteCase) -> npt.NDArray[Any]:
    return flat.reshape((remote.side,) * 3)[:, :, : remote.num_slices]


def _indices(column: npt.NDArray[np.float64], remote: RemoteCase, url: str) -> npt.NDArray[np.int64]:
    if column.size and not 0 <= column.min() <= column.max() < remote.side**3:
        raise FetchFailed(f"{url}: an index lies outside {remote.side} x {remote.side} x {remote.side} voxels")
    return column.astype(np.int64)


def _table(url: str, num_columns: int, timeout: float, deadline: float) -> npt.NDArray[np.float64]:
    """The leading columns of a CSV file with one header line: ``(rows, columns)``."""
    text = io.StringIO(_download(url, timeout, deadline).decode("ascii", errors="replace"))
    try:
        return np.loadtxt(text, delimiter=",", skiprows=1, usecols=range(num_columns), ndmin=2)
    except ValueError as error:
        raise FetchFailed(f"{url}: not the CSV file that was expected ({error})") from error


def _download(url: str, timeout: float, deadline: float) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            body = b"".join(_chunks(answer, url, deadline))
            expected = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise FetchFailed(f"{url}: the server answered {error.code} {error.reason}") from error
    except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchFailed(f"{url}: could not be downloaded ({reason}); pass a scan of your own instead") from error
    if expected is not None and len(body) != int(expected):
        raise FetchFailed(f"{url}: the download broke off after {len(body)} of {expected} bytes; try again")
    return body


def _chunks(answer: Any, url: str, deadline: float) -> Iterator[bytes]:  # noqa: ANN401 (whatever urlopen gives)
    size = 0
    while chunk := answer.read1(2**16):
        size += len(chunk)
        if size > LARGEST_BYTES:
            raise FetchFailed(f"{url}: more than {LARGEST_BYTES >> 20} MiB; this is not the file that was expected")
        if time.monotonic() > deadline:
            raise FetchFailed(f"{url}: not finished after {TOTAL_SECONDS:g} s; try again, or use a scan of your own")
        yield chunk


def _keep(folder: Path, ct: npt.NDArray[Any], structures: npt.NDArray[Any], remote: RemoteCase, url: str) -> None:
    import nibabel as nib

    affine = np.zeros((4, 4))  # axes P, L, I; the source tells no origin, so the array's middle becomes it
    steps = np.array(remote.spacing)
    affine[1, 0], affine[0, 1], affine[2, 2], affine[3, 3] = *-steps, 1.0
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(ct.shape) - 1) / 2)
    with atomic_path(folder / "CREDIT.txt") as path:
        path.write_text(CREDIT.format(patient=remote.patient, url=url), encoding="utf-8")
    for name, array in (("structures.nii.gz", structures), ("ct.nii.gz", ct)):
        with atomic_path(folder / name) as path:
            nib.Nifti1Image(array, affine).to_filename(path)


def _kept(folder: Path, remote: RemoteCase) -> bool:
    """Whether the cache holds the case whole; what is broken is fetched again."""
    known = {"ct.nii.gz": (remote.ct_sha256, np.int16), "structures.nii.gz": (remote.structures_sha256, np.uint8)}
    try:
        kept: list[Volume] = [read_volume(folder / name) for name in known]
    except (FileNotFoundError, BadScan):
        return False
    pairs = zip(kept, known.values(), strict=True)
    return all(array_sha256(volume.array.astype(dtype)) == sha256 for volume, (sha256, dtype) in pairs)


def _cut(folder: Path) -> tuple[str, ...]:
    index = folder.resolve().parent.parent / "cases.json"
    if not index.is_file():
        return ()
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        return next((tuple(entry["cut_by_crop"]) for entry in entries if entry["patient"] == folder.name), ())
    except (ValueError, KeyError, TypeError) as error:
        raise BadScan(f"{index}: not the list of cases that was expected ({error!r})") from error
