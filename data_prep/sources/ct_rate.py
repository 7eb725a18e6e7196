"""CT-RATE: chest CTs with their reports, metadata and labels found in the reports (Hamamci et al., 2024).

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from data_prep.case import Case
from data_prep.draft import Draft
from data_prep.read import read_volume
from data_prep.sources.base import Entry
from data_prep.sources.patterns import natural_order
from data_prep.sources.splits import split_named
from data_prep.sources.tables import BadTable, at_row, read_csv
from data_prep.volume import BadScan, Volume

__all__ = ["CTRate"]

logger = logging.getLogger(__name__)

Values = Literal["stored", "HU"]
_VOLUME = re.compile(r"((?:train|valid)_\d+)_[a-z]+_(\d+)\.nii\.gz")
_REPORT = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
_PLACE = (
    "RescaleSlope",
    "RescaleIntercept",
    "XYSpacing",
    "ZSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
_NOTHING = {"", "nan", "none", "not given", "not given."}
_LEAST = 0.02  # of the voxels of a chest are lung or air, and as many are soft tissue


@dataclass(frozen=True, kw_only=True)
class CTRate:
    """CT-RATE as it is downloaded, whole or in part: what is listed are the volumes that are there.

    Layout (``dataset/`` may itself be the root)::

        root/dataset/train/train_1/train_1_a/train_1_a_1.nii.gz          split_patient_scan_reconstruction
        root/dataset/valid/valid_1/...
        root/dataset/radiology_text_reports/{train,validation}_reports.csv
        root/dataset/metadata/{train,validation}_metadata.csv
        root/dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv      optional

    **Two releases that differ in their voxels.** In the first one NIfTI files hold stored values under a default
    header: HU, spacing, position and orientation come from the metadata table, as in the data set's own download
    scripts and in CT-CLIP. In the second (2025) voxels are HU under a right header, and must not be rescaled again,
    although the table still has slope and intercept. Nothing in a file says which it is: ``values`` is "stored" or
    "HU"; if it is not given, volumes in ``train_fixed`` and ``valid_fixed`` are HU and others stored. Each volume is
    checked for air and soft tissue where HU have them, which a wrong choice fails.

    The report is findings and impression; clinical information, technique and the 18 labels stand in its ``meta``
    (``abnormalities``: 1 where a classifier found it in the report): they are no ground truth of the image. The split
    "valid" has become "validation" unless ``valid_as`` says test. Patients are those of the file names; reconstructions
    of one scan share its report (``reconstructions`` keeps only some, such as [1]). License CC-BY-NC-SA-4.0.
    """

    name: ClassVar[str] = "ct_rate"

    root: Path
    values: Values | None = None
    valid_as: str = "validation"
    reconstructions: tuple[int, ...] | None = None

    def entries(self) -> Iterator[Entry]:
        """Every volume on disk, training volumes first, by patient."""
        found = False
        for word, table in (("train", "train"), ("valid", "validation")):
            folder = next((path for end in ("_fixed", "") if (path := self._base / f"{word}{end}").is_dir()), None)
            if folder is None:
                continue
            values: Values = self.values or ("HU" if folder.name.endswith("_fixed") else "stored")
            split = split_named(word if word == "train" else self.valid_as, "ct_rate: valid_as")
            for entry in self._entries(folder, word, table, values, split):
                found = True
                yield entry
        if not found:
            raise FileNotFoundError(f"{self._base}: no volume such as train/train_1/train_1_a/train_1_a_1.nii.gz")

    @property
    def _base(self) -> Path:
        inner = self.root / "dataset"
        return inner if inner.is_dir() else self.root

    def _entries(self, folder: Path, word: str, table: str, values: Values, split: str) -> Iterator[Entry]:
        volumes = self._volumes(folder)
        reports = self._rows("radiology_text_reports", f"{table}_reports.csv", _REPORT, volumes)
        labels_table = f"{word}_predicted_labels.csv"
        labels = self._rows("multi_abnormality_labels", labels_table, ("VolumeName",), volumes, optional=True)
        wanted = ("VolumeName", *_PLACE)
        places = {} if values == "HU" else self._rows("metadata", f"{table}_metadata.csv", wanted, volumes)
        without = [name for name in volumes if name not in reports]
        if without:
            logger.warning("%s: %d volumes have no report, such as %s", folder, len(without), without[0])
        for name, path in volumes.items():
            match = _VOLUME.fullmatch(name)
            assert match is not None  # `_volumes` has looked
            _, said = reports.get(name, ("", {}))
            where, place = places.get(name, ("", {}))
            yield Entry(
                dataset="CT-RATE",
                license="CC-BY-NC-SA-4.0",
                image_id=name.removesuffix(".nii.gz"),
                patient_id=match[1],
                split=split,
                files=(path,),
                read=partial(_read, path, match[1], values, where, {key: place.get(key, "") for key in _PLACE}),
                drafts=_drafts(said, labels.get(name)),
            )

    def _volumes(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.nii.gz"), key=lambda path: natural_order(path.name)):
            match = _VOLUME.fullmatch(path.name)
            if match is None:
                raise ValueError(f"{path}: its name is not split_patient_scan_reconstruction.nii.gz; move it elsewhere")
            if path.name in found:
                raise ValueError(f"{path}: {found[path.name]} has the same name; remove one")
            if self.reconstructions is None or int(match[2]) in self.reconstructions:
                found[path.name] = path
        return found

    def _rows(
        self, folder: str, name: str, columns: tuple[str, ...], volumes: Mapping[str, Path], *, optional: bool = False
    ) -> dict[str, tuple[str, dict[str, str]]]:
        """The rows of the volumes that are there, each with its place in the table."""
        path = next((one for one in (self._base / folder / name, self._base / name) if one.is_file()), None)
        if path is None:
            if optional:
                return {}
            raise FileNotFoundError(f"{self._base / folder / name}: no such table; download it from the data set")
        rows = {}
        for number, row in read_csv(path, columns):
            volume = row["VolumeName"]
            if volume in rows:
                raise BadTable(f"{at_row(path, number)}: {volume} has a row already; remove one")
            if volume in volumes:
                rows[volume] = (at_row(path, number), row)
        return rows


def _drafts(said: Mapping[str, str], labels: tuple[str, dict[str, str]] | None) -> tuple[Draft, ...]:
    words = {key: "" if value.lower() in _NOTHING else value for key, value in said.items()}
    parts = (("Findings", words.get("Findings_EN")), ("Impression", words.get("Impressions_EN")))
    text = "\n".join(f"{title}: {part}" for title, part in parts if part)
    if not text:
        return ()
    meta: dict[str, Any] = {}
    for key, column in (("clinical_information", "ClinicalInformation_EN"), ("technique", "Technique_EN")):
        if words.get(column):
            meta[key] = words[column]
    if labels is not None:
        meta["abnormalities"] = _abnormalities(*labels)
    return (
        Draft(task="report", template="m3d.report", text=text, meta=meta),
        Draft(task="retrieval", template="m3d.retrieval", text=text),
    )


def _abnormalities(where: str, row: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for name, value in row.items():
        if name != "VolumeName":
            if value not in ("0", "1", "0.0", "1.0"):
                raise BadTable(f"{where}: {name} is {value!r}; a label is 0 or 1")
            found[name] = int(value[0])
    return found


def _read(path: Path, patient_id: str, values: Values, where: str, place: Mapping[str, str]) -> Case:
    volume = read_volume(path)
    if values == "stored":
        if not where:
            raise ValueError(f"{path}: no row in the metadata table, so neither HU nor place are known; add it")
        volume = _placed(volume, where, place)
    _check_hounsfield(volume, path, values)
    return Case(
        id=path.name.removesuffix(".nii.gz"),
        patient_id=patient_id,
        volume=volume,
        labels=np.zeros(volume.shape, np.uint8),
        names={},
        source={"dataset": "CT-RATE", "license": "CC-BY-NC-SA-4.0", "region": "chest"},
    )


def _placed(volume: Volume, where: str, place: Mapping[str, str]) -> Volume:
    """HU and the DICOM place of stored values; the axes of the file are column, row and slice."""
    (slope,), (intercept,) = _numbers(place, "RescaleSlope", 1, where), _numbers(place, "RescaleIntercept", 1, where)
    (along_row, along_column), (between,) = (
        _numbers(place, "XYSpacing", 2, where),
        _numbers(place, "ZSpacing", 1, where),
    )
    position = _numbers(place, "ImagePositionPatient", 3, where)
    cosines = np.array(_numbers(place, "ImageOrientationPatient", 6, where)).reshape(2, 3)
    axes = np.column_stack([*cosines, np.cross(*cosines)]) * (along_row, along_column, abs(between))
    affine: npt.NDArray[np.float64] = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's patient axes are LPS
    try:
        return Volume(volume.array * np.float32(slope) + np.float32(intercept), affine)
    except BadScan as error:
        raise BadScan(f"{where}: {error}") from error


def _numbers(place: Mapping[str, str], column: str, count: int, where: str) -> list[float]:
    text = place[column].strip()
    try:
        found = json.loads(text if text.startswith("[") else f"[{text}]")
        numbers = [float(number) for number in found]
    except (ValueError, TypeError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{where}: {column} is {text!r}; {count} numbers are needed to place the volume")
    return numbers


def _check_hounsfield(volume: Volume, path: Path, values: Values) -> None:
    air, soft = np.mean(volume.array < -500), np.mean(np.abs(volume.array) <= 200)
    if min(air, soft) < _LEAST:
        other = "HU" if values == "stored" else "stored"
        raise BadScan(
            f"{path}: {air:.1%} of it is air and {soft:.1%} soft tissue, which no chest CT in HU has; "
            f"if most volumes are like that, this is the other release: set values: {other}"
        )
