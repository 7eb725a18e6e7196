"""M3D-RefSeg: lesions in CTs of TotalSegmentator, each with questions that only its mask answers.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data_prep.case import Case, Unit
from data_prep.draft import Draft
from data_prep.read import read_volume
from data_prep.sources.base import Entry
from data_prep.sources.m3d_volumes import (
    OnLeak,
    find_table,
    identify,
    locate,
    path_parts,
    read_array,
    read_norm01,
    settle_splits,
    three_axes,
    warn_missing,
)
from data_prep.sources.tables import BadTable, OnBadRow, at_row, read_csv, read_json, settle_rows
from data_prep.volume import BadScan, Volume

__all__ = ["M3DRefSeg", "lesion"]

DATASET = "M3D-RefSeg"
FOLDERS = (
    "M3D_RefSeg_npy",
    "M3D_RefSeg",
    "M3D-RefSeg",
    "M3D-RefSeg/M3D_RefSeg_npy",
    "M3D-RefSeg/M3D_RefSeg",
)
SEG = "[SEG]"
_COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
_TRAIN, _TEST = ("M3D_RefSeg_train.csv", "M3D_RefSeg.csv"), ("M3D_RefSeg_test.csv",)
_KINDS = {"0": "description", "1": "reasoning"}
_MARK = re.compile(r"[<\[]\s*seg\s*[>\]]", re.IGNORECASE)
_HIGHEST = np.iinfo(np.uint16).max
_AIR = -200.0  # a CT in HU has air in it

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Image:
    image: Path
    mask: Path
    asked: dict[str, list[tuple[int, Draft]]] = field(default_factory=dict)  # split -> lesion and what is asked of it


@dataclass(frozen=True, kw_only=True)
class M3DRefSeg:
    """M3D-RefSeg as published, prepared or raw; ``root`` is its folder or the data root.

    ::

        M3D_RefSeg_npy/                           prepared
            M3D_RefSeg_train.csv                  or M3D_RefSeg.csv: Image, Mask, Mask_ID, Question_Type
            M3D_RefSeg_test.csv                   (0 description, 1 reasoning), Question, Answer with one [SEG]
            <case>/ct.npy, mask.npy               float (1, 32, 256, 256) in [0, 1], and whole numbers: Mask_ID
        M3D_RefSeg/                               raw
            <case>/ct.nii.gz, mask.nii.gz         with spacing and place, which the prepared files have lost
            <case>/text.json                      {"<Mask_ID>": "what is there", ...}

    Prepared files that are not there are looked for as raw ones. Without a table, the raw folders are listed with what
    ``text.json`` says of each lesion, all in ``split``; only ``text.json`` is read, whatever other texts lie beside it.

    The lesion of ``Mask_ID`` 3 is called "lesion 3": unique within its image, of no meaning outside of it. Questions of
    a table stand in the slot ``question`` as they are, texts of lesions in ``description``. ``<SEG>``, ``[seg]`` and
    the like become ``[SEG]``; an answer must have exactly one. A lesion that is asked about and has no voxel left is
    said in a warning and keeps its name in the case.

    ``rejected`` holds, after `entries`, the rows that ``on_bad_row="skip"`` left out.
    """

    name: ClassVar[str] = "m3d_refseg"

    root: Path
    split: str = "train"
    license: str | None = None
    on_bad_row: OnBadRow = "error"
    on_leak: OnLeak = "error"
    rejected: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    def entries(self) -> Iterator[Entry]:
        """Every image with its questions, in the order of the tables, or of the folders' names.

        Raises:
            FileNotFoundError: There are neither tables nor folders, or none of the images.
            BadTable: A table cannot be used, or two share images.
        """
        self.rejected.clear()
        tables = [(find_table(self.root, _TRAIN, FOLDERS), "train"), (find_table(self.root, _TEST, FOLDERS), "test")]
        found: dict[str, _Image] = {}
        for path, split in tables:
            if path is not None:
                self._read_table(path, split, found)
        if not any(path for path, _ in tables):
            self._read_folders(found)
        settle_rows(self.name, self.rejected, on_bad_row=self.on_bad_row)
        warn_missing(self.name, [one.image for one in found.values()])
        listed = {case: set(one.asked) for case, one in found.items()}
        splits = settle_splits(self.name, listed, {case: case for case in found}, on_leak=self.on_leak)
        for case, split in splits.items():
            one = found[case]
            lesions = tuple(sorted({number for number, _ in one.asked[split]}))
            yield Entry(
                dataset=DATASET,
                license=self.license,
                image_id=case,
                patient_id=case,
                split=split,
                files=(one.image, one.mask),
                read=partial(_read_case, one.image, mask_path=one.mask, lesions=lesions, case=case),
                drafts=tuple(draft for _, draft in one.asked[split]),
            )

    def _read_table(self, path: Path, split: str, found: dict[str, _Image]) -> None:
        for number, row in read_csv(path, _COLUMNS):
            where = at_row(path, number)
            try:
                asked = _question(row, where)
                image, mask = (self._locate(row[key], where) for key in ("Image", "Mask"))
                case = identify(image.parent.name)
                one = found.setdefault(case, _Image(image, mask))
                if (one.image, one.mask) != (image, mask):
                    raise BadTable(f"{where}: {case} was listed before with {one.image} and {one.mask}")
            except BadTable as error:
                self.rejected.append(str(error))
                continue
            one.asked.setdefault(split, []).append(asked)

    def _locate(self, text: str, where: str) -> Path:
        return locate(path_parts(text, where), roots=(self.root, self.root / "M3D-RefSeg"), raw_suffix=".nii.gz")

    def _read_folders(self, found: dict[str, _Image]) -> None:
        places = [self.root, *(self.root / folder for folder in FOLDERS)]
        folders = [path.parent for place in places for path in sorted(place.glob("*/ct.nii.gz"))]
        if not folders:
            raise FileNotFoundError(
                f"{self.root}: no M3D_RefSeg_train.csv, no M3D_RefSeg.csv and no <case>/ct.nii.gz in it nor in "
                f"{', '.join(FOLDERS)}; check the root"
            )
        for folder in folders:
            try:
                texts = _lesion_texts(folder)
            except (BadTable, FileNotFoundError) as error:
                self.rejected.append(str(error))
                continue
            asked = [(number, _description(number, text)) for number, text in texts.items()]
            one = _Image(folder / "ct.nii.gz", folder / "mask.nii.gz", {self.split: asked})
            if found.setdefault(identify(folder.name), one) is not one:
                self.rejected.append(f"{folder}: another folder has this name; remove one")


def lesion(number: int) -> str:
    """The name of the structure with a ``Mask_ID``."""
    return f"lesion {number}"


def _question(row: Mapping[str, str], where: str) -> tuple[int, Draft]:
    kind = _KINDS.get(row["Question_Type"].removesuffix(".0"))
    if kind is None:
        raise BadTable(f"{where}: Question_Type {row['Question_Type']!r} is neither 0 (description) nor 1 (reasoning)")
    number = _mask_id(row["Mask_ID"], where)
    answer, marks = _MARK.subn(SEG, row["Answer"])
    if marks != 1:
        raise BadTable(f"{where}: the Answer has {marks} {SEG}, one is needed: {row['Answer'][:60]!r}")
    if not row["Question"]:
        raise BadTable(f"{where}: there is no Question")
    slots = {"question": row["Question"]}
    draft = Draft(
        task="seg.ref", subtask=kind, template="m3d.seg.ref", slots=slots, text=answer, masks=(lesion(number),)
    )
    return number, draft


def _description(number: int, text: str) -> Draft:
    slots = {"description": text}
    return Draft(task="seg.ref", subtask="description", template="m3d.seg.ref", slots=slots, masks=(lesion(number),))


def _mask_id(text: str, where: str) -> int:
    digits = text.strip().removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and 0 < int(digits) <= _HIGHEST):
        raise BadTable(f"{where}: Mask_ID {text!r} is no whole number from 1 on")
    return int(digits)


def _lesion_texts(folder: Path) -> dict[int, str]:
    path = folder / "text.json"
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in folder.glob("text*"))) or "no other text"
        raise FileNotFoundError(f"{path}: no such file ({others} is there); download the case again")
    texts = read_json(path)
    if (
        not isinstance(texts, dict)
        or not texts
        or not all(isinstance(text, str) and text.strip() for text in texts.values())
    ):
        raise BadTable(f'{path}: {{"<Mask_ID>": "what is there", ...}} is needed')
    return {_mask_id(key, str(path)): text.strip() for key, text in texts.items()}


def _read_case(image: Path, *, mask_path: Path, lesions: tuple[int, ...], case: str) -> Case:
    """One case; every lesion that is asked about has a name, whether or not it kept voxels."""
    raw = not image.name.endswith(".npy")
    volume = read_volume(image) if raw else read_norm01(image)
    labels = _read_raw_mask(mask_path, volume) if raw else _read_mask(mask_path, volume)
    there = set(np.unique(labels).tolist()) - {0}
    gone = [number for number in lesions if number not in there]
    if gone and not there & set(lesions):
        raise BadScan(
            f"{mask_path}: none of the lesions {gone[:5]} that are asked about is in it; it has {sorted(there)[:5]}"
        )
    if gone:
        logger.warning("%s: no voxel of Mask_ID %s", mask_path, ", ".join(map(str, gone)))
    unit: Unit = "norm01" if not raw else "HU" if volume.range[0] < _AIR else "arbitrary"
    return Case(
        id=case,
        patient_id=case,
        volume=volume,
        labels=labels,
        names={number: lesion(number) for number in sorted(there | set(lesions))},
        modality="CT",
        unit=unit,
        placed=raw,
        source={"empty_masks": tuple(map(lesion, gone))},
    )


def _read_mask(path: Path, volume: Volume) -> npt.NDArray[np.integer[Any]]:
    return _labels(three_axes(read_array(path), path), path, volume)


def _read_raw_mask(path: Path, volume: Volume) -> npt.NDArray[np.integer[Any]]:
    mask = read_volume(path)
    if not np.allclose(mask.affine, volume.affine, atol=1e-3):
        raise BadScan(f"{path}: lies elsewhere than the ct.nii.gz beside it; download the case again")
    return _labels(mask.array, path, volume)


def _labels(array: npt.NDArray[Any], path: Path, volume: Volume) -> npt.NDArray[np.integer[Any]]:
    if array.shape != volume.shape:
        raise BadScan(f"{path}: the mask has shape {array.shape}, the image {volume.shape}; prepare the case again")
    low, high = float(array.min()), float(array.max())
    if not (0 <= low and high <= _HIGHEST and np.array_equal(array, np.rint(array))):
        raise BadScan(
            f"{path}: whole numbers from 0 on are needed (0 nothing, else Mask_ID), it has {low:g} to {high:g}"
        )
    return array.astype(np.uint8 if high < 256 else np.uint16)
