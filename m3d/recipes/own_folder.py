"""A user's own folder in nnU-Net's layout becomes a store on a checkpoint's grid, with some patients held out."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.prepare import Job, Local, prepare
from data_prep.preprocess import Preprocess
from data_prep.sources.base import Entry
from data_prep.sources.registry import build_source
from data_prep.store import Store
from m3d.inference.checkpoints import bundled, resolve
from m3d.recipes.checkpoints import model_folder

log = logging.getLogger(__name__)

DERIVED = ("rec", "seg")
FEWEST_HELD_OUT = 2  # whether a tower tells volumes apart takes two


def checkpoint_folder(name_or_path: str) -> Path:
    """The folder of a bundled model's name, of a checkpoint, or of a stage's output.

    Raises:
        FileNotFoundError: There is none.
    """
    return resolve(name_or_path) if name_or_path in bundled() else model_folder(name_or_path)


def entries_of(folder: str, options: Mapping[str, Any], held_out: float) -> list[Entry]:
    """The folder's cases with contours: those of ``imagesTs`` to test, of the others some held out as validation.

    Raises:
        FileNotFoundError: The folder has no ``dataset.json``, or lists no case.
        ValueError: It has too few patients, or an option is none of the source `nnunet`.
    """
    root = Path(folder)
    if not (root / "dataset.json").is_file():
        raise FileNotFoundError(
            f"folder={folder}: no dataset.json in it; nnU-Net's layout has dataset.json, imagesTr/CASE_0000.nii.gz and "
            "labelsTr/CASE.nii.gz"
        )
    source = build_source({"kind": "nnunet", **options, "root": str(root.resolve())})
    found = list(source.entries())
    tested = [entry for entry in found if entry.files[0].parent.name == "imagesTs"]
    return [*hold_out([entry for entry in found if entry not in tested], held_out), *tested]


def hold_out(entries: Sequence[Entry], share: float) -> list[Entry]:
    """The same entries, those of some patients in the split "validation", of all others in "train".

    A patient is held out where the hash of its name, as a fraction, lies below the share, so it is the same on every
    machine and in a folder that has grown. Where that is fewer than two, those with the smallest are: who joins the
    folder may send one of these back to learn from, but nobody who was learned from becomes held out.

    Raises:
        ValueError: There would be nobody left to learn from.
    """
    patients = sorted({entry.patient_id for entry in entries}, key=_fraction)
    number = max(sum(_fraction(patient) < share for patient in patients), FEWEST_HELD_OUT)
    if number >= len(patients):
        raise ValueError(
            f"{len(patients)} patients, of whom {number} are held out, leave nobody to learn from; "
            f"{FEWEST_HELD_OUT + 1} are the fewest; add patients, or lower held_out={share}"
        )
    held = set(patients[:number])
    return [
        dataclasses.replace(entry, split="validation" if entry.patient_id in held else "train") for entry in entries
    ]


def _fraction(patient: str) -> float:
    """The hash of a patient's name, from 0 to 1."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8]) / 2**64


def prepare_folder(entries: Sequence[Entry], preprocess: Preprocess, store: Path, *, seed: int = 0) -> Store:
    """Put cases on a checkpoint's grid; what is done already stays.

    Raises:
        ValueError: A case cannot be prepared: which one, and why.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = Job(preprocess=preprocess, derive=DERIVED, seed=seed)
    summary = prepare(entries, job, store, runner=Local(0 if len(entries) < 4 * workers else workers))
    if summary.rejected:
        first = Store(store).rejects()[0]
        raise ValueError(
            f"{summary.rejected} cases cannot be prepared, the first {first['image_id']}: {first['reason']}; see "
            f"{store / 'rejects.jsonl'}, correct or remove them, and run the same again"
        )
    log.info("%s: %d scans, %d of them prepared now", store, summary.images, summary.prepared)
    return Store(store)
