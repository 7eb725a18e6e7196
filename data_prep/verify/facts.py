"""What lines say of images, gathered by image, so that each file need be opened only once.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_prep.boxes import Box, to_voxel
from data_prep.record import BoxTruth, MaskTruth, Media, Record

__all__ = ["ABSENCE_SLOTS", "ImageFacts", "ReportText", "asked_for", "same_name"]

ABSENCE_SLOTS = ("object", "objects")


@dataclass(frozen=True)
class ReportText:
    """A report or caption, for comparing it with others; ``by_rule`` where no person wrote it."""

    where: str
    image_id: str
    split: str
    text: str
    by_rule: bool


@dataclass
class ImageFacts:
    """One image: its media, the names of its labels if an index gives them, and what records say of it.

    Each value of ``patients``, ``splits``, ``said`` and ``absent`` is the line that said so first. ``said`` has the
    masks by file, label and name.
    """

    media: Media
    where: str
    names: Mapping[int, str] | None = None
    masks: str | None = None
    scan_sha256: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)  # file -> sha256 of its bytes
    patients: dict[tuple[str, str], str] = field(default_factory=dict)  # (data set, patient) -> line
    splits: dict[str, str] = field(default_factory=dict)
    said: dict[tuple[str, int, str], str] = field(default_factory=dict)
    boxes: dict[Box, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def mask_paths(self) -> tuple[str, ...]:
        """Every mask file of the image, the index's first."""
        return tuple(dict.fromkeys(path for path in (self.masks, *(path for path, _, _ in self.said)) if path))

    def hear(self, record: Record, number: int, where: str) -> None:
        """Take in what a record says about its medium ``number``, which is this image."""
        for mask in record.target.masks or ():
            if mask.media == number and mask.path is not None and mask.label is not None:
                self.said.setdefault((mask.path, mask.label, mask.name), where)
        for box in record.target.boxes or ():
            if box.media == number and (voxel := _voxel_box(box, self.media)) is not None:
                self.boxes.setdefault(voxel, where)
        targets: list[tuple[BoxTruth, ...] | tuple[MaskTruth, ...] | None] = [record.target.boxes, record.target.masks]
        given = [target for target in targets if target is not None]
        if given and not any(given):
            for name in asked_for(record):
                self.absent.setdefault(name, where)


def asked_for(record: Record) -> list[str]:
    """The class names that a record's prompt asks for."""
    found: list[str] = []
    for slot in ABSENCE_SLOTS:
        value = record.prompt.slots.get(slot)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [str(one) for one in value]
    return found


def same_name(one: str, other: str) -> bool:
    """Whether two names differ only in case and spaces."""
    return " ".join(one.casefold().split()) == " ".join(other.casefold().split())


def _voxel_box(box: BoxTruth, media: Media) -> Box | None:
    if not box.name or box.frame == "mm":
        return None
    return to_voxel(Box(box.lo, box.hi, box.frame, box.name), media.size)
