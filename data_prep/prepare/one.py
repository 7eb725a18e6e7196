"""One scan: read, prepared, its truths placed on the grid, and written so that a part means that all of it is there.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.case import Case
from data_prep.derived import derived_drafts
from data_prep.draft import Draft
from data_prep.prepare.job import Job, image_id
from data_prep.prepare.place import boxes_of_labels, to_records
from data_prep.record import Intensity, Media, Record
from data_prep.sources.base import Entry
from data_prep.store import StoredImage, file_sha256, pack
from data_prep.volume import array_sha256, axcodes

__all__ = ["Outcome", "PreparedImage", "finished", "part_path", "prepare_case", "prepare_entry"]

AIR_HU = -500.0


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedImage:
    """A scan on the grid: ``array`` as kept ``(D, H, W)``, ``labels`` ``(L, D, H, W)``, records, and what fell out."""

    image: StoredImage
    array: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    records: list[Record]
    dropped: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an entry: None in ``error``, or why it could not be prepared."""

    image_id: str
    files: tuple[str, ...] = ()
    error: str | None = None
    reason: str | None = None


def prepare_case(
    case: Case,
    job: Job,
    *,
    identity: str | None = None,
    split: str = "train",
    drafts: Sequence[Draft] = (),
    root: Path = Path(),
) -> PreparedImage:
    """Put a case on the job's grid with all its records, derived ones after ``drafts``; writes nothing.

    Raises:
        BadScan: The scan holds nothing to see under these settings.
        ValueError: A draft names what the case does not have.
    """
    identity = identity or case.id
    prepared = job.preprocess.apply(case.volume)
    labels = np.stack([prepared.mask_to_grid(layer) for layer in case.layers])
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0).tolist()
    media = Media(
        image_id=identity,
        kind="volume",
        path=f"images/{identity}.npy",
        modality=case.modality,
        shape=prepared.shape,
        axes="DHW",
        spacing_mm=tuple(round(side, 6) for side in spacing) if case.placed else None,
        orient=axcodes(prepared.affine) if case.placed else None,
        intensity=Intensity(
            unit="norm01",
            of="HU" if case.unit == "HU" else "arbitrary",
            lo=prepared.intensity["lo"],
            hi=prepared.intensity["hi"],
        ),
    )
    image = StoredImage(
        root=root,
        dataset=str(case.source.get("dataset", "unnamed")),
        patient_id=case.patient_id,
        split=split,
        license=case.source.get("license"),
        media=media,
        masks=f"masks/{identity}.npz" if case.names else None,
        names=dict(case.names),
        complete=case.complete,
        placed=case.placed,
        scan_affine=case.volume.affine,
        way=prepared,
        sha256=array_sha256(case.volume.array),
        warnings=(*prepared.warnings, *_unit_warnings(case)),
    )
    said = [*drafts, *_derived(case, job, drafts, identity)]
    records, dropped = to_records(said, image, boxes_of_labels(labels, case.names))
    return PreparedImage(
        image=image, array=pack(prepared.array, job.kept), labels=labels, records=records, dropped=dropped
    )


def prepare_entry(entry: Entry, *, job: Job, root: Path) -> Outcome:
    """Read, prepare and write one entry of a source; what is wrong comes back as a reason, never as another scan.

    The part is written last. Errors that are no fault of the data (a full disk, a bug) are raised.
    """
    identity, fingerprint = image_id(entry), job.fingerprint(entry)
    job = job if entry.derive is None else dataclasses.replace(job, derive=entry.derive)
    try:
        done = prepare_case(_case(entry), job, identity=identity, split=entry.split, drafts=entry.drafts, root=root)
    except (ValueError, KeyError, MemoryError, _Unread) as error:
        cause = error.__cause__ if isinstance(error, _Unread) and error.__cause__ is not None else error
        files = tuple(str(path) for path in entry.files)
        kind = type(cause).__name__
        return Outcome(image_id=identity, files=files, error=kind, reason=str(cause) or kind)
    written = _write(done)
    part = {
        "fingerprint": fingerprint,
        "image": dataclasses.replace(done.image, files=written).to_row(),
        "records": [record.model_dump(mode="json", exclude_none=True) for record in done.records],
        "dropped": done.dropped,
    }
    with atomic_path(part_path(root, identity)) as temporary:
        temporary.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    return Outcome(image_id=identity)


def _unit_warnings(case: Case) -> list[str]:
    """A CT has air around or in it; what has none was rescaled, masked, or is no CT."""
    low, high = case.volume.range
    if case.unit == "HU" and low > AIR_HU:
        return [f"no voxel is air ({low:g} to {high:g}): is this CT in Hounsfield units? Say modality and unit if not"]
    return []


def _derived(case: Case, job: Job, drafts: Sequence[Draft], identity: str) -> list[Draft]:
    """What follows from masks and header; a report or caption of the source's own is not given a second one."""
    own = {draft.task for draft in drafts}
    kinds = [kind for kind in job.derive if kind not in own]
    return derived_drafts(case, random.Random(f"{job.seed}/{identity}"), kinds=kinds) if case.names and kinds else []


class _Unread(Exception):
    """A file could not be read; its cause says why. An error of writing is none of the data's."""


def _case(entry: Entry) -> Case:
    """The entry's case, under the name and the patient that the source gave the entry."""
    try:
        case = entry.read()
    except (OSError, EOFError) as error:
        raise _Unread from error
    source = {**case.source, "dataset": entry.dataset, "license": entry.license}
    return dataclasses.replace(case, patient_id=f"{image_id(entry).split('/')[0]}/{entry.patient_id}", source=source)


def part_path(root: Path, identity: str) -> Path:
    """Where an image's part lies."""
    return root / "parts" / f"{identity}.json"


def finished(entry: Entry, *, job: Job, root: Path) -> bool:
    """Whether the store has the entry whole, made by these settings from these files."""
    path = part_path(root, image_id(entry))
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    image = part.get("image", {})
    there = all((root / file).is_file() for file in image.get("files", {}))
    return bool(image and there and part.get("fingerprint") == job.fingerprint(entry))


def _write(done: PreparedImage) -> dict[str, str]:
    """Write image and labels; the SHA-256 of each file by its path in the store."""
    image, written = done.image, dict[str, str]()
    with atomic_path(image.path) as temporary:
        np.save(temporary, done.array, allow_pickle=False)
    written[image.media.path] = file_sha256(image.path)
    if image.mask_path is not None and image.masks is not None:
        with atomic_path(image.mask_path) as temporary:
            np.savez_compressed(temporary, labels=done.labels)
        written[image.masks] = file_sha256(image.mask_path)
    return written
