"""Scans of one's own: a folder of files in any format that we read, with masks and reports where there are some.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.case import Case, Unit
from data_prep.read import SUFFIXES, read_volume
from data_prep.sources.base import Entry
from data_prep.sources.label_files import SUFFIXES as MASK_SUFFIXES
from data_prep.sources.label_files import Labels, label_map, names_in_header, read_names, stem_of, structures
from data_prep.sources.names import natural_names
from data_prep.sources.patterns import Found, fill, find_scans, natural_order
from data_prep.sources.reports import Said, finder, read_column, read_reports
from data_prep.sources.splits import DEFAULT_SHARES, check_patients, check_shares, split_by_hash, split_named

__all__ = ["Folder"]

logger = logging.getLogger(__name__)

Masks = Path | tuple[tuple[str, Path], ...] | None


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Scans in a folder, as their owner keeps them.

    Layout, all of it by pattern::

        root/a.nii.gz               scans: "*.nii.gz"                  any format of `read_volume`
        root/a_seg.nii.gz           masks: "{id}_seg.nii.gz"           one label map a scan, or
        root/masks/a/<name>.nii.gz  masks: "masks/{id}/{name}.nii.gz"  one file a structure; these may overlap
        root/labels.json            labels: labels.json                {"1": "liver"}, also YAML, also {"liver": 1}
        root/reports.csv            reports: reports.csv               see `data_prep.sources.reports`

    A folder that ``scans`` matches is one DICOM series. ``{id}`` is what the wildcards of ``scans`` stood for (``{1}``,
    ``{2}``... each of them), and the id of the image: keep names of people out of it. ``labels`` may also stand in the
    config; without it the table in the header of a NIfTI label map is taken. Names become words (``kidney_left``: "left
    kidney"); ``rename`` has those wanted otherwise.

    A scan is its own patient and patients are split by hash, unless ``patients`` and ``splits`` say otherwise: each the
    name of a CSV file (columns ``id`` or ``image``, and ``patient`` or ``split``), or a regular expression whose first
    group is found in the path. Set ``patients`` whenever people were scanned twice.

    ``complete`` may be true only where every named structure was looked for in every scan: then a name without voxels
    is taught as absent. ``unit`` is HU for CT and arbitrary for all else; ``spacing`` is for ``.npy`` only;
    ``region`` ("abdomen") is said in derived reports.
    """

    name: ClassVar[str] = "folder"

    root: Path
    dataset: str = "folder"
    license: str | None = None
    scans: str = "*.nii.gz"
    masks: str | None = None
    labels: Mapping[int, str] | str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    reports: str | None = None
    patients: str | None = None
    splits: str | None = None
    split: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    complete: bool = False
    modality: str = "CT"
    unit: Unit | None = None
    region: str | None = None
    spacing: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        check_shares(self.split, f"folder {self.dataset}")
        for option, value in (("patients", self.patients), ("splits", self.splits)):
            if value is not None and not value.endswith(".csv"):
                _check_expression(option, value)

    def entries(self) -> Iterator[Entry]:
        """Every scan, in natural order of its path."""
        scans = self._scans()
        said = self._said(scans)
        patients = self._column("patients", "patient", scans)
        splits = self._column("splits", "split", scans)
        masks = {scan.id: self._masks(scan) for scan in scans}
        if self.masks is not None:
            _check_masks(self.root, self.masks, masks)
        entries = []
        for scan in scans:
            told = said.get(scan.id, Said())
            patient = re.sub(r"\s+", "_", patients.get(scan.id) or told.patient or scan.id)
            named = splits.get(scan.id) or told.split
            entries.append(
                Entry(
                    dataset=self.dataset,
                    license=self.license,
                    image_id=scan.id,
                    patient_id=patient,
                    split=split_named(named, scan.relative) if named else split_by_hash(patient, self.split),
                    files=(scan.path, *_files(masks[scan.id]), *self._table(scan)),
                    read=partial(_read, scan.path, self, scan.id, patient, masks[scan.id], self._names(scan)),
                    drafts=tuple(told.drafts),
                )
            )
        check_patients(entries, str(self.root))
        yield from entries

    def _scans(self) -> list[Found]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; set root to the folder of your scans")
        found = [
            one
            for one in find_scans(self.root, self.scans)
            if one.path.is_dir() or one.path.name.lower().endswith(SUFFIXES)
        ]
        masks = set() if self.masks is None else {one.path for one in find_scans(self.root, _any(self.masks))}
        masks |= {path for one in found for path in _files(self._masks(one))}
        masks |= {parent for path in masks for parent in path.parents}
        found = [one for one in found if one.path not in masks]
        if not found:
            also = f" that is not matched by masks={self.masks!r}" if masks else ""
            raise FileNotFoundError(f"{self.root / self.scans}: no scan{also}; correct root or the pattern `scans`")
        seen: dict[str, Found] = {}
        for one in found:
            other = seen.setdefault(one.id, one)
            if other is not one:
                raise ValueError(
                    f"{one.path}: its id {one.id!r} is also that of {other.path}; rename one, or let the wildcards of "
                    f"scans={self.scans!r} tell them apart"
                )
        return found

    def _masks(self, scan: Found) -> Masks:
        if self.masks is None:
            return None
        keep = {**scan.fields, "name": "{name}"}
        path = self.root / fill(self.masks, keep, what="masks").lstrip("/")
        if "{name}" in path.name:
            return _listed(path.parent, path.name)
        if path.is_dir():
            return _listed(path, "{name}")
        return path if path.is_file() else None

    def _table(self, scan: Found) -> tuple[Path, ...]:
        """The file of names, if there is one."""
        return (self.root / fill(self.labels, scan.fields, what="labels"),) if isinstance(self.labels, str) else ()

    def _names(self, scan: Found) -> dict[int, str] | None:
        if self.labels is None:
            return None
        return dict(self.labels) if isinstance(self.labels, Mapping) else read_names(*self._table(scan))

    def _aliases(self, scans: Sequence[Found]) -> dict[str, str]:
        names = [scan.path.name for scan in scans]
        aliases = {scan.path.name: scan.id for scan in scans if names.count(scan.path.name) == 1}
        for scan in scans:
            aliases |= {scan.relative: scan.id, scan.fields["id"]: scan.id, scan.id: scan.id}
        return aliases

    def _said(self, scans: Sequence[Found]) -> dict[str, Said]:
        if self.reports is None:
            return {}
        return read_reports(self.root / self.reports, finder(self._aliases(scans)))

    def _column(self, option: str, column: str, scans: Sequence[Found]) -> dict[str, str]:
        rule = self.patients if option == "patients" else self.splits
        if rule is None:
            return {}
        if rule.endswith(".csv"):
            return read_column(self.root / rule, column, finder(self._aliases(scans)))
        values = {}
        for scan in scans:
            match = re.search(rule, scan.relative)
            if match is None or not match[1]:
                raise ValueError(f"{scan.path}: {option}={rule!r} finds no {column} in it; correct the expression")
            values[scan.id] = match[1]
        return values


def _read(
    path: Path, source: Folder, image_id: str, patient_id: str, masks: Masks, raw: Mapping[int, str] | None
) -> Case:
    volume = read_volume(path, spacing=source.spacing if path.name.lower().endswith(".npy") else None)
    labels: Labels
    names: Mapping[int, str]
    if masks is None:
        labels, names = np.zeros(volume.shape, np.uint8), {}
    elif isinstance(masks, Path):
        raw = names_in_header(masks) if raw is None else raw
        names = natural_names(raw, source.rename)
        remedy = "add it to `labels` of this source"
        labels = label_map(masks, volume, path, names, remedy=remedy, spacing=source.spacing)
    else:
        words = natural_names(dict(enumerate((name for name, _ in masks), start=1)), source.rename)
        pairs = [(words[number], file) for number, (_, file) in enumerate(masks, start=1)]
        labels, names = structures(pairs, volume, path, spacing=source.spacing)
    return Case(
        id=image_id,
        patient_id=patient_id,
        volume=volume,
        labels=labels,
        names=names,
        complete=source.complete,
        modality=source.modality,
        unit=source.unit or ("HU" if source.modality == "CT" else "arbitrary"),
        source={"dataset": source.dataset, "license": source.license, "region": source.region},
    )


def _listed(folder: Path, pattern: str) -> Masks:
    """The structures of a folder: names and files, in natural order."""
    known = re.compile(re.escape(pattern).replace(r"\{name\}", "(.+)"))
    found = []
    for path in sorted(folder.glob("*"), key=lambda path: natural_order(path.name)):
        match = known.fullmatch(path.name)
        if match is not None and path.is_file() and path.name.lower().endswith(MASK_SUFFIXES):
            found.append((stem_of(Path(match[1])), path))
    return tuple(found) or None


def _files(masks: Masks) -> tuple[Path, ...]:
    if masks is None:
        return ()
    return (masks,) if isinstance(masks, Path) else tuple(path for _, path in masks)


def _check_masks(root: Path, pattern: str, masks: Mapping[str, Masks]) -> None:
    if len(masks) > 1 and not re.search(r"\{(?!name\})\w+\}", pattern):
        raise ValueError(f"{root}: masks={pattern!r} has no {{id}}, but there are {len(masks)} scans; put it in")
    without = [image for image, one in masks.items() if one is None]
    if len(without) == len(masks):
        raise FileNotFoundError(f"{root / pattern}: no mask for any of {len(masks)} scans; correct the pattern `masks`")
    if without:
        logger.warning("%s: %d of %d scans have no mask, such as %s", root, len(without), len(masks), without[0])


def _check_expression(option: str, value: str) -> None:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"folder: {option}={value!r} is no regular expression ({error}), nor a .csv file") from error
    if groups < 1:
        raise ValueError(f"folder: {option}={value!r} needs a group in (), which finds the word in a scan's path")


def _any(pattern: str) -> str:
    """A pattern of masks as a glob."""
    return fill(pattern, {}, other=lambda _: "*")
