"""M3D-Seg: 25 public data sets of CTs with masks under one layout, read by the names of their classes.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml

from data_prep.case import Case, Unit, layered
from data_prep.formats import one_line
from data_prep.sources.base import Entry
from data_prep.sources.m3d_volumes import (
    OnLeak,
    identify,
    locate,
    path_parts,
    read_array,
    read_norm01,
    settle_splits,
    three_axes,
    unplaced,
    warn_missing,
)
from data_prep.sources.tables import BadTable, OnBadRow, read_json, settle_rows
from data_prep.volume import BadScan, Volume

__all__ = ["M3DSeg", "SegClass", "SegDataset", "seg_datasets"]

Mask = npt.NDArray[np.bool_]

FOLDERS = ("M3D_Seg_npy", "M3D_Seg", "M3D-Seg", "M3D-Seg/M3D_Seg_npy", "M3D-Seg/M3D_Seg")
_SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation", "test": "test"}
_PREPARED = re.compile(r"mask_(\d+)\.npy")
_RAW = re.compile(r"(?:mask_|.+\.)\((\d+), ?(\d+), ?(\d+), ?(\d+)\)\.npz")
_BROKEN = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SegClass:
    """A class of a data set: what we call it and what is published."""

    name: str
    published: str


@dataclass(frozen=True, kw_only=True)
class SegDataset:
    """One of the data sets; ``name`` is None where nothing says what the code stands for."""

    code: str
    name: str | None
    region: str
    classes: tuple[SegClass, ...]


@functools.cache
def seg_datasets() -> Mapping[str, SegDataset]:
    """The data sets by code, from ``m3d_seg_datasets.yaml``."""
    table = yaml.safe_load(Path(__file__).with_name("m3d_seg_datasets.yaml").read_text(encoding="utf-8"))
    found = {}
    for code, row in table.items():
        pairs = [one if isinstance(one, dict) else {"name": one, "published": one} for one in row["classes"]]
        assert len(pairs) == row["num_classes"], f"m3d_seg_datasets.yaml, {code}: {len(pairs)} classes"
        classes = tuple(SegClass(**pair) for pair in pairs)
        found[code] = SegDataset(code=code, name=row["name"], region=row["region"], classes=classes)
    return found


@dataclass(slots=True)
class _Image:
    path: Path
    splits: set[str] = field(default_factory=set)
    masks: dict[int, Path] = field(default_factory=dict)  # prepared: one file a class
    packed: Path | None = None  # raw: one file for all classes


@dataclass(frozen=True, kw_only=True)
class M3DSeg:
    """M3D-Seg as published, prepared or raw; ``root`` is its folder or the data root.

    ::

        M3D_Seg_npy/<code>/                           prepared
            <code>.json                               {"train": [{"image": ".../<code>/<case>/image.npy",
                                                                  "label": ".../<code>/<case>/masks/mask_2.npy"}, ...],
                                                       "test": [...]}, one item a class
            <case>/image.npy                          float (1, 32, 256, 256) in [0, 1]
            <case>/masks/mask_<class>.npy             bool (1, 32, 256, 256), or one zero (1, 1, 1, 1): nothing drawn
        M3D_Seg/<code>/                               raw
            <code>.json                               one item a case
            <case>/image.npy                          (1, X, Y, Z), scaled by its foreground's mean and deviation
            <case>/mask_(C, X, Y, Z).npz              scipy CSR matrix, C x XYZ

    ``codes`` chooses data sets ("0003", in quotes: YAML reads 0010 as the number 8); None takes all that are there.
    What a code and its classes mean is in ``m3d_seg_datasets.yaml``; masks of classes with one name are joined. A case
    is a patient. Masks may overlap, and go into as many layers as that needs.

    A mask without voxels says nothing: most of the data sets draw only part of their classes in each case. Such classes
    are not among the names of the case, ``complete`` is False, and ``source["empty_masks"]`` lists them.

    ``rejected`` holds, after `entries`, the rows that ``on_bad_row="skip"`` left out.
    """

    name: ClassVar[str] = "m3d_seg"

    root: Path
    codes: tuple[str, ...] | None = None
    license: str | None = None
    on_bad_row: OnBadRow = "error"
    on_leak: OnLeak = "error"
    rejected: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        for code in self.codes or ():
            if code not in seg_datasets():
                raise ValueError(f"m3d_seg: unknown code {code!r}; codes are '0000' to '0025', in quotes")

    def entries(self) -> Iterator[Entry]:
        """Every listed image with all its masks, by code and in the order of the lists.

        Raises:
            FileNotFoundError: A list is not there, or none of its images is.
            BadTable: A list cannot be used, or shares images between splits.
        """
        self.rejected.clear()
        for path in self._lists():
            yield from self._entries(path, seg_datasets()[path.stem])

    def _lists(self) -> list[Path]:
        places = [self.root, *(self.root / folder for folder in FOLDERS)]
        lists = []
        for code in self.codes or seg_datasets():
            found = [place / code / f"{code}.json" for place in places if (place / code / f"{code}.json").is_file()]
            if self.codes is not None and not found:
                raise FileNotFoundError(f"{self.root}: no {code}/{code}.json in it nor in {', '.join(FOLDERS)}")
            lists += found[:1]
        if not lists:
            raise FileNotFoundError(
                f"{self.root}: no <code>/<code>.json in it nor in {', '.join(FOLDERS)}; check the root"
            )
        return lists

    def _entries(self, path: Path, dataset: SegDataset) -> Iterator[Entry]:
        found: dict[str, _Image] = {}
        rejected: list[str] = []
        for where, split, row in _rows(path):
            try:
                _take(row, where, split, path.parent.parent, dataset, found)
            except BadTable as error:
                rejected.append(str(error))
        self.rejected.extend(rejected)
        settle_rows(str(path), rejected, on_bad_row=self.on_bad_row)
        warn_missing(str(path), [one.path for one in found.values()])
        listed = {case: one.splits for case, one in found.items()}
        splits = settle_splits(str(path), listed, {case: case for case in found}, on_leak=self.on_leak)
        for case, split in splits.items():
            one = found[case]
            prepared = tuple((number, one.masks[number]) for number in sorted(one.masks))
            read = (
                partial(_read_prepared, one.path, masks=prepared, case=case, code=dataset.code)
                if one.packed is None
                else partial(_read_raw, one.path, packed=one.packed, case=case, code=dataset.code)
            )
            yield Entry(
                dataset=f"M3D-Seg:{dataset.name or dataset.code}",
                license=self.license,
                image_id=case,
                patient_id=case,
                split=split,
                files=(one.path, *(mask for _, mask in prepared), *(() if one.packed is None else (one.packed,))),
                read=read,
            )


def _rows(path: Path) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    lists = read_json(path)
    if not isinstance(lists, dict) or not any(isinstance(lists.get(key), list) and lists[key] for key in _SPLITS):
        raise BadTable(f"{path}: no list train or test with anything in it; was the download cut short?")
    for key, split in _SPLITS.items():
        for number, row in enumerate(lists.get(key) or ()):
            where = f"{path}, {key}[{number}]"
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("image", "label")):
                raise BadTable(f'{where}: an item {{"image": path, "label": path}} is needed')
            yield where, split, row


def _take(
    row: Mapping[str, str], where: str, split: str, root: Path, dataset: SegDataset, found: dict[str, _Image]
) -> None:
    """Add one item of a list to its image."""
    image, label = (path_parts(row[key], where) for key in ("image", "label"))
    case = identify(image[-1].removesuffix(".npy") if len(image) < 3 or image[-2] == "ct" else image[-2])
    prepared, raw = _PREPARED.fullmatch(label[-1]), _RAW.fullmatch(label[-1])
    if not prepared and not raw:
        raise BadTable(f"{where}: {label[-1]!r} is neither mask_<class>.npy nor mask_(C, X, Y, Z).npz")
    classes = len(dataset.classes)
    if prepared and int(prepared[1]) >= classes:
        raise BadTable(f"{where}: {label[-1]} is no class of {dataset.code}, which has {classes}, counted from 0")
    if raw and int(raw[1]) != classes:
        raise BadTable(f"{where}: {label[-1]} has {raw[1]} classes, {dataset.code} has {classes}")
    path, mask = (
        locate(image, roots=(root,)),
        locate(label, roots=(root,)),
    )  # lists hold paths of the machine that prepared them
    one = found.setdefault(case, _Image(path))
    if one.path != path:
        raise BadTable(f"{where}: case {case} was listed before with {one.path}")
    known = one.masks.setdefault(int(prepared[1]), mask) if prepared else one.packed or mask
    if known != mask:
        raise BadTable(f"{where}: the masks of {case} were listed before as {known}")
    if raw:
        one.packed = mask
    one.splits.add(split)


def _read_prepared(image: Path, *, masks: tuple[tuple[int, Path], ...], case: str, code: str) -> Case:
    """A prepared case: an image in [0, 1] and one mask file a class."""
    volume = read_norm01(image)
    drawn: dict[str, Mask] = {}
    empty: set[str] = set()
    for number, path in masks:
        name = seg_datasets()[code].classes[number].name
        mask = _read_mask(path, volume)
        if mask is None:
            empty.add(name)
        else:
            drawn[name] = drawn[name] | mask if name in drawn else mask
    labels, names = layered(drawn) if drawn else (np.zeros(volume.shape, np.uint8), {})
    return _case(volume, labels, names, empty - set(drawn), case, unit="norm01")


def _read_mask(path: Path, volume: Volume) -> Mask | None:
    """A mask on the image's voxels, None where nothing is drawn."""
    array = read_array(path)
    if array.size == 1 and not array.any():
        return None
    mask = three_axes(array, path)
    if mask.shape != volume.shape:
        raise BadScan(f"{path}: the mask has shape {mask.shape}, the image {volume.shape}; prepare the case again")
    if mask.dtype != bool:
        odd = sorted(set(np.unique(mask).tolist()) - {0, 1})
        if odd:
            raise BadScan(f"{path}: a mask has 0 and 1, this one has {odd[:3]}; is it a label map?")
    mask = np.asarray(mask, bool)
    return mask if mask.any() else None


def _read_raw(image: Path, *, packed: Path, case: str, code: str) -> Case:
    """A raw case: ``(1, X, Y, Z)`` and all masks as one sparse matrix, with the axes that a volume has here."""
    array = three_axes(read_array(image), image)
    volume = unplaced(array.transpose(2, 1, 0), image)
    drawn: dict[str, list[npt.NDArray[np.integer[Any]]]] = {}
    for one, voxels in zip(seg_datasets()[code].classes, _read_packed(packed, array.shape), strict=True):
        if voxels.size:
            drawn.setdefault(one.name, []).append(voxels)
    labels, names = _unpack({name: np.concatenate(parts) for name, parts in drawn.items()}, array.shape)
    empty = {one.name for one in seg_datasets()[code].classes} - set(drawn)
    return _case(volume, labels, names, empty, case, unit="arbitrary")


def _unpack(
    masks: Mapping[str, npt.NDArray[np.integer[Any]]], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.integer[Any]], dict[int, str]]:
    """What `layered` does, from flat indices: a hundred whole masks of a CT would not fit into memory."""
    kind = np.uint8 if len(masks) < 256 else np.uint16
    layers = [np.zeros(math.prod(shape), kind)]
    for value, voxels in enumerate(masks.values(), start=1):
        free = next((layer for layer in layers if not layer[voxels].any()), None)
        if free is None:
            free = np.zeros(math.prod(shape), kind)
            layers.append(free)
        free[voxels] = value
    turned = np.stack(layers).reshape(-1, *shape).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(turned), dict(enumerate(masks, start=1))


def _read_packed(path: Path, shape: tuple[int, ...]) -> list[npt.NDArray[np.integer[Any]]]:
    """The flat indices of each class's voxels: the rows of a CSR matrix."""
    from scipy import sparse

    said = _RAW.fullmatch(path.name)
    assert said is not None, "the list was checked"
    classes, *sides = map(int, said.groups())
    if tuple(sides) != shape:
        raise BadScan(f"{path}: its name says {tuple(sides)}, the image has {shape}; download the case again")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is the root right, and the download whole?")
    try:
        matrix: Any = sparse.load_npz(path)  # never loads pickles
        if matrix.shape != (classes, math.prod(shape)):
            raise BadScan(f"{path}: a matrix of {classes} x {math.prod(shape)} is needed, this is {matrix.shape}")
        matrix = matrix.tocsr()
        matrix.check_format(full_check=True)
    except BadScan:
        raise
    except _BROKEN as error:
        raise BadScan(f"{path}: not a sparse matrix, or a damaged one ({one_line(error, path)})") from error
    if matrix.dtype.kind not in "biuf":
        raise BadScan(f"{path}: {matrix.dtype} is no type of a mask")
    rows = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    return [matrix.indices[first:stop][matrix.data[first:stop] != 0] for first, stop in rows]


def _case(
    volume: Volume,
    labels: npt.NDArray[np.integer[Any]],
    names: Mapping[int, str],
    empty: set[str],
    case: str,
    *,
    unit: Unit,
) -> Case:
    if empty:
        logger.debug("%s: %d masks are empty, which says nothing: %s", case, len(empty), ", ".join(sorted(empty)))
    return Case(
        id=case,
        patient_id=case,
        volume=volume,
        labels=labels,
        names=names,
        modality="CT",
        unit=unit,
        placed=False,
        source={"empty_masks": tuple(sorted(empty))},
    )
