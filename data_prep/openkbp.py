"""OpenKBP: head-and-neck CTs with clinical contours (Babier et al., Medical Physics 48, 5549, 2021; MIT licence).

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_prep.case import Case
from data_prep.read import read_volume

__all__ = ["NAMES", "cases", "read_case"]

NAMES = {
    1: "brainstem",
    2: "spinal cord",
    3: "right parotid",
    4: "left parotid",
    5: "esophagus",
    6: "larynx",
    7: "mandible",
}


def cases(root: Path, split: str) -> list[Path]:
    """The case folders of a split (``train``, ``validation``), by patient number.

    Raises:
        FileNotFoundError: The folder is not there or holds no case.
    """
    folder = Path(root) / split
    found = [path.parent for path in folder.glob("*/ct.nii.gz")]
    if not found:
        raise FileNotFoundError(f"{folder}: no OpenKBP case (a folder with ct.nii.gz) in it")
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_case(folder: Path) -> Case:
    """Read one case: CT, contours, and which structures the crop has cut.

    ``complete`` is False: a structure that was not contoured is not absent.
    """
    volume = read_volume(folder / "ct.nii.gz")
    labels = read_volume(folder / "structures.nii.gz")
    if labels.shape != volume.shape:
        raise ValueError(f"{folder}: structures.nii.gz has shape {labels.shape}, ct.nii.gz {volume.shape}")
    return Case(
        id=folder.name,
        patient_id=folder.name,
        volume=volume,
        labels=labels.array.astype(np.uint8),
        names=NAMES,
        cut_by_crop=_cut(folder),
        source={"dataset": "OpenKBP", "license": "MIT"},
    )


def _cut(folder: Path) -> tuple[str, ...]:
    index = folder.parent.parent / "cases.json"
    if not index.is_file():
        return ()
    entries = json.loads(index.read_text(encoding="utf-8"))
    return next((tuple(entry["cut_by_crop"]) for entry in entries if entry["patient"] == folder.name), ())
