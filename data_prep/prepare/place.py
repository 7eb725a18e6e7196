"""From a draft, which knows only the scan, to a record, whose geometry is that of the stored voxels.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from data_prep.boxes import Box
from data_prep.draft import Draft
from data_prep.record import BoxTruth, Evidence, MaskTruth, Origin, Prompt, Record, Target
from data_prep.store import StoredImage

__all__ = ["NotOnGrid", "boxes_of_labels", "to_record", "to_records"]


class NotOnGrid(ValueError):
    """What a draft speaks of has no voxel left on the grid."""


def boxes_of_labels(labels: npt.NDArray[np.integer[Any]], names: Mapping[int, str]) -> dict[str, Box]:
    """The box of every name that has voxels: ``(L, D, H, W)`` label maps, one pass a layer."""
    found: dict[int, list[tuple[slice, ...]]] = {}
    for layer in labels:
        for value, where in enumerate(find_objects(layer), start=1):
            if where is not None:
                found.setdefault(value, []).append(where)
    boxes = {}
    for value, name in names.items():
        parts = found.get(value, ())
        if parts:
            lo = tuple(min(part[axis].start for part in parts) for axis in range(3))
            hi = tuple(max(part[axis].stop for part in parts) for axis in range(3))
            boxes[name] = Box(lo, hi, "voxel", name)
    return boxes


def to_records(
    drafts: Iterable[Draft], image: StoredImage, boxes: Mapping[str, Box]
) -> tuple[list[Record], list[dict[str, str]]]:
    """All records of an image, and the drafts that cannot become one with the reason."""
    counts: Counter[str] = Counter()
    records, dropped = [], []
    for draft in drafts:
        counts[draft.task] += 1
        identity = f"{image.image_id}/{draft.task}/{counts[draft.task]:03d}"
        try:
            records.append(to_record(draft, identity, image, boxes))
        except NotOnGrid as error:
            dropped.append({"id": identity, "error": "NotOnGrid", "reason": str(error)})
    return records, dropped


def to_record(draft: Draft, identity: str, image: StoredImage, boxes: Mapping[str, Box]) -> Record:
    """One record.

    Raises:
        NotOnGrid: A structure has no voxel left on the grid, or a box lies outside it.
        ValueError: The draft names what the image does not know, or breaks a rule of the schema.
    """
    target = Target(
        text=draft.text,
        options=draft.options,
        choice=draft.choice,
        value=draft.value,
        quantity=draft.quantity,
        unit=draft.unit,
        evidence=None if draft.evidence is None else tuple(Evidence(**vars(one)) for one in draft.evidence),
        boxes=None if draft.boxes is None else tuple(_box(box, image, boxes) for box in draft.boxes),
        masks=None if draft.masks is None else tuple(_mask(name, image, boxes) for name in draft.masks),
    )
    return Record(
        id=identity,
        image_id=image.image_id,
        patient_id=image.patient_id,
        split=image.split,  # type: ignore[arg-type]  # pydantic checks it
        lang=draft.lang,
        source=Origin(dataset=draft.dataset or image.dataset, license=None if draft.dataset else image.license),
        media=(image.media,),
        task=draft.task,
        subtask=draft.subtask,
        prompt=Prompt(template=draft.template, slots=dict(draft.slots)),
        target=target,
        meta=dict(draft.meta),
    )


def _box(box: str | Box, image: StoredImage, boxes: Mapping[str, Box]) -> BoxTruth:
    if isinstance(box, str):
        _check_known(box, image, boxes)
        placed = boxes[box]
    else:
        placed = image.way.box_to_grid(box).clip(image.media.shape)
        if not all(side > 0 for side in placed.sides):
            raise NotOnGrid(f"the box of {box.name or 'a finding'} lies outside what was kept of the scan")
    return BoxTruth(name=placed.name, lo=placed.lo, hi=placed.hi, frame="voxel")


def _mask(name: str, image: StoredImage, boxes: Mapping[str, Box]) -> MaskTruth:
    _check_known(name, image, boxes)
    label = next(value for value, known in image.names.items() if known == name)
    return MaskTruth(name=name, path=image.masks, label=label)


def _check_known(name: str, image: StoredImage, boxes: Mapping[str, Box]) -> None:
    if name not in image.names.values():
        raise ValueError(f"{image.image_id} has no structure {name!r}; known: {', '.join(image.names.values())}")
    if name not in boxes:
        raise NotOnGrid(f"{name} has no voxel left on the grid of {image.media.shape}; choose a finer one")
