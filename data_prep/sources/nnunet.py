"""nnU-Net and Medical Segmentation Decathlon: data sets described by a ``dataset.json``.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np

from data_prep.case import Case, Unit
from data_prep.read import read_volume
from data_prep.sources.base import Entry
from data_prep.sources.label_files import Labels, label_map, overlapping, stem_of
from data_prep.sources.names import natural_name
from data_prep.sources.patterns import natural_order
from data_prep.sources.splits import DEFAULT_SHARES, check_shares, split_by_hash
from data_prep.sources.tables import BadTable, read_json
from data_prep.volume import BadScan, Volume

__all__ = ["NNUNet"]

_MR = {"mri", "mr", "t1", "t1w", "t1ce", "t1gd", "t1c", "t2", "t2w", "flair", "adc", "dwi", "swi", "pd", "cine-mri"}
_CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True, kw_only=True)
class NNUNet:
    """A data set of nnU-Net (version 2) or of the Medical Segmentation Decathlon.

    Layout::

        root/dataset.json
        root/imagesTr/<case>_0000.nii.gz   nnU-Net: one file a channel; or <case>.nii.gz, 4D where there are several
        root/labelsTr/<case>.nii.gz
        root/imagesTs/, root/labelsTs/     test scans; used where they have labels, or with `unlabelled`

    ``dataset.json`` of the Decathlon: ``labels {"0": "background", "1": name}``, ``modality {"0": "CT"}``, ``training
    [{"image", "label"}]``, ``test [...]``. Of nnU-Net: ``labels {"background": 0, name: 1}``, ``channel_names``,
    ``file_ending``, and ``dataset {case: {"images", "label"}}`` where the files lie elsewhere below the root. A label
    that is a list of values is a region; regions overlap and are kept as such. Voxels to be ignored stay unlabelled.

    ``channel`` is the one that is read. Its name gives modality and unit (HU for CT, arbitrary for all else), unless
    ``modality`` and ``unit`` do. ``complete`` may be true only if the data set annotates every named structure in every
    case. ``patients`` is a regular expression whose first group in a case's name is the patient; otherwise each case is
    one. ``region`` ("abdomen") is said in derived reports. Training cases are split by a hash of the patient, as the
    published test cases have no public labels.
    """

    name: ClassVar[str] = "nnunet"

    root: Path
    dataset: str | None = None
    license: str | None = None
    channel: int = 0
    complete: bool = False
    modality: str | None = None
    unit: Unit | None = None
    region: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    patients: str | None = None
    split: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    unlabelled: bool = False

    def __post_init__(self) -> None:
        check_shares(self.split, f"nnunet {self.root}")

    def entries(self) -> Iterator[Entry]:
        """Training cases, then test cases, each in natural order."""
        described = _Described.read(self.root / "dataset.json", self)
        known: set[str] = set()
        for case, image, label, is_test in described.cases():
            if case in known:
                raise BadTable(f"{described.path}: the case {case!r} is listed twice; remove one")
            known.add(case)
            patient = self._patient(case)
            yield Entry(
                dataset=described.dataset,
                license=described.license,
                image_id=case,
                patient_id=patient,
                split="test" if is_test else split_by_hash(patient, self.split),
                files=(image, described.path) if label is None else (image, label, described.path),
                read=partial(_read, case, patient, image, label, described),
            )
        if not known:
            raise FileNotFoundError(
                f"{described.path}: lists no case, and labelsTr is empty; unpack the data set whole"
            )

    def _patient(self, case: str) -> str:
        if self.patients is None:
            return case
        match = re.search(self.patients, case)
        if match is None or not match.groups() or not match[1]:
            raise ValueError(
                f"{self.root}: patients={self.patients!r} finds no patient in {case!r}; it needs a group ()"
            )
        return match[1]


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What ``dataset.json`` says, in one form for both of its kinds."""

    path: Path
    source: NNUNet
    dataset: str
    license: str | None
    regions: Mapping[str, tuple[int, ...]]
    ignored: tuple[int, ...]
    channel_name: str
    num_channels: int
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, source: NNUNet) -> _Described:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
            raise BadTable(f"{path}: no `labels`; this is no dataset.json of nnU-Net or of the Decathlon")
        regions, ignored = _labels(path, content["labels"], source.rename)
        channels = content.get("channel_names", content.get("modality", {}))
        if not isinstance(channels, dict) or str(source.channel) not in channels:
            raise BadTable(f"{path}: channel {source.channel} is not in channel_names or modality: {channels}")
        return cls(
            path=path,
            source=source,
            dataset=source.dataset or str(content.get("name") or source.root.resolve().name),
            license=source.license or content.get("licence") or content.get("license"),
            regions=regions,
            ignored=ignored,
            channel_name=str(channels[str(source.channel)]),
            num_channels=len(channels),
            content=content,
        )

    @property
    def modality(self) -> str:
        """CT, MR, or what the channel is called."""
        word = self.channel_name.lower()
        return self.source.modality or ("CT" if word == "ct" else "MR" if word in _MR else self.channel_name)

    @property
    def unit(self) -> Unit:
        """HU where it is a CT."""
        return self.source.unit or ("HU" if self.modality == "CT" else "arbitrary")

    @property
    def ending(self) -> str:
        """The suffix of all files."""
        return str(self.content.get("file_ending", ".nii.gz"))

    def cases(self) -> Iterator[tuple[str, Path, Path | None, bool]]:
        """Case, scan, label map, and whether it is one of the test cases."""
        root = self.path.parent
        if isinstance(self.content.get("dataset"), dict):
            for case, files in sorted(self.content["dataset"].items(), key=lambda item: natural_order(item[0])):
                images = files["images"]
                yield (
                    case,
                    self._inside(images[min(self.source.channel, len(images) - 1)]),
                    self._inside(files["label"]),
                    False,
                )
        elif isinstance(self.content.get("training"), list):
            for one in self.content["training"]:
                image, label = self._inside(one["image"]), self._inside(one["label"])
                yield stem_of(label), self._channel(image), label, False
        else:
            yield from self._beside(root / "imagesTr", root / "labelsTr", is_test=False)
        yield from self._beside(root / "imagesTs", root / "labelsTs", is_test=True)

    def _beside(self, images: Path, labels: Path, *, is_test: bool) -> Iterator[tuple[str, Path, Path | None, bool]]:
        named = {self._stem(path): path for path in self._files(labels)}
        cases = set(named)
        if self.source.unlabelled:
            cases |= {_CHANNEL.sub("", self._stem(path)) for path in self._files(images)}
        for case in sorted(cases, key=natural_order):
            yield case, self._channel(images / f"{case}{self.ending}"), named.get(case), is_test

    def _files(self, folder: Path) -> list[Path]:
        return [path for path in folder.glob(f"*{self.ending}") if not path.name.startswith(".")]

    def _stem(self, path: Path) -> str:
        return path.name.removesuffix(self.ending)

    def _channel(self, path: Path) -> Path:
        """The file of the channel; the one without a number only where that is how the data set has it."""
        numbered = path.with_name(f"{self._stem(path)}_{self.source.channel:04d}{self.ending}")
        return path if path.exists() and not numbered.exists() else numbered

    def _inside(self, relative: object) -> Path:
        path = Path(str(relative))
        if path.is_absolute() or ".." in path.parts:
            raise BadTable(
                f"{self.path}: {str(relative)!r} leaves the folder of the data set; copy or link the file into it"
            )
        return self.path.parent / path


def _labels(
    path: Path, labels: Mapping[str, Any], rename: Mapping[str, str]
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Names with their values, and the values that are to be ignored; the Decathlon has values with their names."""
    regions: dict[str, tuple[int, ...]] = {}
    ignored: tuple[int, ...] = ()
    for key, said in labels.items():
        name, values = (str(said), key) if isinstance(said, str) else (key, said)
        try:
            numbers = tuple(int(value) for value in (values if isinstance(values, list) else [values]))
        except (TypeError, ValueError) as error:
            raise BadTable(f"{path}: labels: {key!r}: {said!r} is no name with its value; correct it") from error
        if numbers == (0,):
            continue
        if name.lower() == "ignore":
            ignored = numbers
            continue
        word = rename.get(name) or natural_name(name)
        if word in regions:
            raise BadTable(f"{path}: labels: two are called {word!r}; tell them apart with the option `rename`")
        regions[word] = numbers
    return regions, ignored


def _read(case: str, patient: str, image: Path, label: Path | None, described: _Described) -> Case:
    source = described.source
    volume = _read_scan(image, source.channel, described.num_channels)
    names: Mapping[int, str] = {}
    labels: Labels = np.zeros(volume.shape, np.uint8)
    if label is not None:
        known = {value: name for name, values in described.regions.items() for value in values}
        remedy = f"add it to `labels` in {described.path}"
        labels = label_map(label, volume, image, known, remedy=remedy, unnamed=described.ignored)
        if all(len(values) == 1 for values in described.regions.values()):
            names = known
        else:
            labels, names = overlapping(labels, described.regions)
    return Case(
        id=case,
        patient_id=patient,
        volume=volume,
        labels=labels,
        names=names,
        complete=source.complete,
        modality=described.modality,
        unit=described.unit,
        source={"dataset": described.dataset, "license": described.license, "region": source.region},
    )


def _read_scan(path: Path, channel: int, num_channels: int) -> Volume:
    """A scan; of a 4D NIfTI, as the Decathlon has it for several channels, the one channel."""
    if num_channels == 1 or _CHANNEL.search(stem_of(path)) or not path.name.endswith((".nii", ".nii.gz")):
        return read_volume(path)
    try:
        image: Any = nib.load(path)
        if len(image.shape) != 4:
            return read_volume(path)
        if channel >= image.shape[3]:
            raise BadScan(f"{path}: channel {channel} is not among its {image.shape[3]}; correct the option `channel`")
        return Volume(np.asarray(image.dataobj[..., channel], dtype=np.float32), image.affine)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise BadScan(f"{path}: cannot be read: truncated or damaged ({error})") from error
