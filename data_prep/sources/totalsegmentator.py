"""TotalSegmentator: CT and MR with a hundred structures each, as published or as its program writes them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.case import Case
from data_prep.read import read_volume
from data_prep.sources.base import Entry
from data_prep.sources.label_files import Labels, label_map, names_in_header, read_names, stem_of, structures
from data_prep.sources.names import natural_names
from data_prep.sources.patterns import natural_order
from data_prep.sources.splits import DEFAULT_SHARES, check_shares, split_by_hash, split_named
from data_prep.sources.tables import BadTable, at_row

__all__ = ["TotalSegmentator"]

logger = logging.getLogger(__name__)

_SCANS = {"ct.nii.gz": "CT", "mri.nii.gz": "MR", "image.nii.gz": None}


@dataclass(frozen=True, kw_only=True)
class TotalSegmentator:
    """The TotalSegmentator data sets, and folders with the one-file output of its program.

    Layout::

        root/meta.csv                              separated by semicolons: image_id; ...; study_type; split; ...
        root/s0001/ct.nii.gz                       or mri.nii.gz
        root/s0001/segmentations/<structure>.nii.gz
        root/<case>/image.nii.gz                   or: one label map a case
        root/<case>/labels.nii.gz
        root/<case>/labels.json                    {"1": "spleen"}; without it, the table in the header of labels.nii.gz

    The masks come from a model that people corrected, or from the model alone: never complete. Each case is a patient.
    Where ``meta.csv`` is there its split holds, otherwise a hash of the case decides. ``cases`` is a pattern of case
    folders; ``structures`` picks some by their published names (a case of 117 files takes seconds to read). What
    image.nii.gz is, ``modality`` says.
    """

    name: ClassVar[str] = "totalsegmentator"

    root: Path
    dataset: str = "TotalSegmentator"
    license: str | None = "CC-BY-4.0"
    cases: str = "*"
    structures: tuple[str, ...] | None = None
    modality: str = "CT"
    rename: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))

    def __post_init__(self) -> None:
        check_shares(self.split, f"totalsegmentator {self.root}")

    def entries(self) -> Iterator[Entry]:
        """Every case folder that holds a scan, in natural order."""
        folders = sorted(self.root.glob(self.cases), key=lambda path: natural_order(path.name))
        scans = [scan for folder in folders for word in _SCANS if (scan := folder / word).is_file()]
        if not scans:
            raise FileNotFoundError(f"{self.root / self.cases}: no folder with {' or '.join(_SCANS)}; correct the root")
        table = self.root / "meta.csv"
        meta = dict(_meta(table)) if table.is_file() else None
        for scan in scans:
            case = scan.parent.name
            row = None if meta is None else meta.get(case)
            if meta is not None and row is None:
                raise BadTable(f"{table}: no row for {case}; add it, or choose others with the option `cases`")
            split = split_by_hash(case, self.split) if row is None else split_named(*row)
            masks = self._masks(scan.parent)
            yield Entry(
                dataset=self.dataset,
                license=self.license,
                image_id=case,
                patient_id=case,
                split=split,
                files=(scan, *_files(masks)),
                read=partial(_read, scan, masks, self),
            )

    def _masks(self, folder: Path) -> Path | tuple[tuple[str, Path], ...]:
        """The label map, or the name and file of each structure."""
        whole = folder / "labels.nii.gz"
        if whole.is_file():
            return whole
        found = {stem_of(path): path for path in (folder / "segmentations").glob("*.nii.gz")}
        if not found:
            raise FileNotFoundError(
                f"{folder}: neither segmentations/*.nii.gz nor labels.nii.gz; unpack the case whole"
            )
        wanted = sorted(found, key=natural_order) if self.structures is None else self.structures
        return tuple((name, _known(found, name, folder)) for name in wanted)


def _files(masks: Path | tuple[tuple[str, Path], ...]) -> tuple[Path, ...]:
    if not isinstance(masks, Path):
        return tuple(path for _, path in masks)
    table = masks.with_name("labels.json")
    return (masks, table) if table.is_file() else (masks,)


def _known(found: Mapping[str, Path], name: str, folder: Path) -> Path:
    if name not in found:
        raise FileNotFoundError(
            f"{folder / 'segmentations' / name}.nii.gz: no such mask; correct the option `structures`"
        )
    return found[name]


def _meta(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Case, its split, and the row that says so."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=";")
        missing = [column for column in ("image_id", "split") if column not in (rows.fieldnames or ())]
        if missing:
            raise BadTable(
                f"{path}: no column {missing[0]!r} between semicolons; take the meta.csv as it was published"
            )
        for number, row in enumerate(rows, start=2):
            if not row["image_id"] or not row["split"]:
                raise BadTable(f"{at_row(path, number)}: image_id or split is empty; fill it in")
            yield row["image_id"].strip(), (row["split"], at_row(path, number))


def _read(scan: Path, masks: Path | tuple[tuple[str, Path], ...], source: TotalSegmentator) -> Case:
    volume = read_volume(scan)
    labels: Labels
    names: Mapping[int, str]
    if isinstance(masks, Path):
        table = masks.with_name("labels.json")
        raw = read_names(table) if table.is_file() else names_in_header(masks)
        labels = label_map(masks, volume, scan, natural_names(raw, source.rename), remedy=f"add it to {table}")
        if source.structures is not None:
            raw = {value: name for value, name in raw.items() if name in source.structures}
            labels[~np.isin(labels, list(raw))] = 0
        names = natural_names(raw, source.rename)
    else:
        words = natural_names(dict(enumerate((name for name, _ in masks), start=1)), source.rename)
        labels, names = structures(((words[at], file) for at, (_, file) in enumerate(masks, 1)), volume, scan)
    modality = _SCANS[scan.name] or source.modality
    return Case(
        id=scan.parent.name,
        patient_id=scan.parent.name,
        volume=volume,
        labels=labels,
        names=names,
        modality=modality,
        unit="HU" if modality == "CT" else "arbitrary",
        source={"dataset": source.dataset, "license": source.license},
    )
