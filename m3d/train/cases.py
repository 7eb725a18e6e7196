"""Cases as training reads them: prepared once through the checkpoint's own `Preprocess`, in memory or in a store.

A store's cases are read when they are shown, a few lines of text and two small arrays at a time. What stays in memory
is one `Entry` a record, which is all that is needed to draw what to say of an image.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.case import Case
from data_prep.prepare import Job, prepare_case
from data_prep.preprocess import Preprocess
from data_prep.record import Record, parse
from data_prep.store import Store, StoredImage, unpack

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]
CHARACTERS_A_BOX = 45


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a record without reading it: its task, about how long it is, how many masks and images.

    ``fixed`` says that it is true of this pose only, so that a turned or shifted picture would make it false.
    """

    task: str
    subtask: str
    characters: int
    masks: int = 0
    images: int = 1
    fixed: bool = False

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Entry":
        """The entry of a record's JSON."""
        prompt, target = raw["prompt"], raw["target"]
        boxes, masks = target.get("boxes") or (), target.get("masks") or ()
        said = [prompt.get("text"), prompt.get("slots"), target.get("text"), target.get("options")]
        names = [one["name"] for one in (*boxes, *masks)]
        names += [word for one in target.get("evidence") or () for word in (one["measure"], *one["names"])]
        characters = _characters([*said, names]) + CHARACTERS_A_BOX * len(boxes)
        subtask = sys.intern(raw.get("subtask") or "")
        fixed = holds_in_one_pose(raw.get("meta") or {})
        return cls(sys.intern(raw["task"]), subtask, characters, len(masks), len(raw["media"]), fixed)


def holds_in_one_pose(meta: Mapping[str, Any]) -> bool:
    """Whether a record's truth depends on how the patient lies and what the field of view shows."""
    return bool(meta.get("pose") == "fixed")


def _characters(said: Any) -> int:  # noqa: ANN401  (whatever a slot holds)
    if isinstance(said, str):
        return len(said)
    if isinstance(said, Mapping):
        return _characters(list(said.values()))
    return sum(map(_characters, said)) if isinstance(said, (list, tuple)) else 0


class TrainingCase(ABC):
    """A scan on the model's grid and its records, wherever they are kept."""

    image: StoredImage

    @property
    @abstractmethod
    def entries(self) -> Sequence[Entry]:
        """One a record, in the order of `records_at`'s numbers."""

    @abstractmethod
    def records_at(self, numbers: Sequence[int]) -> list[Record]:
        """Some of the records."""

    @abstractmethod
    def read(self) -> Arrays:
        """The image ``(D, H, W)`` as it is kept, and its label maps ``(L, D, H, W)``."""

    @property
    def id(self) -> str:
        """The id of the image."""
        return self.image.image_id

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the grid in mm, ones where it is not known."""
        d, h, w = self.image.media.spacing_mm or (1.0, 1.0, 1.0)
        return d, h, w

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Image in [0, 1] ``(D, H, W)`` and label maps ``(L, D, H, W)``."""
        return to_tensors(self.read())

    def mask(self, labels: Tensor, name: str) -> Tensor:
        """The voxels of a structure in label maps of this case, ``(L, D, H, W) -> (D, H, W)`` bool.

        Raises:
            ValueError: The image has no label of that name.
        """
        for value, known in self.image.names.items():
            if known == name:
                return (labels == value).any(dim=0)
        raise ValueError(f"{self.id}: no label is named {name!r}; it has {', '.join(self.image.names.values())}")


def to_tensors(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Kept arrays as tensors: the image in [0, 1] and the label maps."""
    return torch.from_numpy(unpack(arrays[0])), torch.from_numpy(arrays[1])


@dataclass(frozen=True, eq=False)
class PreparedCase(TrainingCase):
    """A case in memory: ``array`` (D, H, W) as a store keeps it, ``labels`` (L, D, H, W), and its records."""

    image: StoredImage
    array: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    records: tuple[Record, ...]

    @cached_property
    def entries(self) -> Sequence[Entry]:
        """One a record."""
        return [Entry.of(json.loads(record.to_line())) for record in self.records]

    def records_at(self, numbers: Sequence[int]) -> list[Record]:
        """Some of the records."""
        return [self.records[number] for number in numbers]

    def read(self) -> Arrays:
        """The image and its label maps."""
        return self.array, self.labels


@dataclass(frozen=True, eq=False)
class StoredCase(TrainingCase):
    """A case in a store: voxels and records are read from its files whenever they are asked for."""

    image: StoredImage
    outline: list[Entry] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)

    @property
    def entries(self) -> Sequence[Entry]:
        """One a record."""
        return self.outline

    @property
    def path(self) -> Path:
        """The file of the records."""
        return self.image.root / "records.jsonl"

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, read now."""
        return tuple(self.records_at(range(len(self.lines))))

    @property
    def array(self) -> npt.NDArray[Any]:
        """The image as kept, read now."""
        return self.image.array()

    @property
    def labels(self) -> npt.NDArray[Any]:
        """The label maps, read now."""
        return self.image.labels()

    def records_at(self, numbers: Sequence[int]) -> list[Record]:
        """Read some of the records."""
        found = []
        with self.path.open("rb") as file:
            for line, offset in (self.lines[number] for number in numbers):
                file.seek(offset)
                found.append(parse(file.readline(), f"{self.path}:{line}"))
        return found

    def read(self) -> Arrays:
        """Read the image and its label maps."""
        return self.image.array(), self.image.labels()


def prepare(case: Case, job: Job, *, split: str = "train") -> PreparedCase:
    """Put a case on the model's grid, with the records that the job derives."""
    done = prepare_case(case, job, split=split)
    return PreparedCase(done.image, done.array, done.labels, tuple(done.records))


def stored(root: Path | str, split: str, *, preprocess: Preprocess | None = None) -> list[StoredCase]:
    """The images of a split of a store; reads its index and the outline of its records, no voxels.

    Raises:
        FileNotFoundError: The folder is no store.
        ValueError: It was not prepared by ``preprocess``, has no image in the split, or a line is no record.
    """
    store = Store(root)
    if preprocess is not None and store.preprocess != preprocess:
        raise ValueError(f"{store.root} was prepared differently; compare its preprocess.json with the model's")
    cases = {image.image_id: StoredCase(image) for image in store.images.values() if image.split == split}
    if not cases:
        known = sorted({image.split for image in store.images.values()})
        raise ValueError(f"{store.root}: no image is in split {split!r}; it has {', '.join(known) or 'none at all'}")
    offset, path = 0, store.root / "records.jsonl"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                _file_away(cases, line, f"{path}:{number}", (number, offset))
            offset += len(line)
    return list(cases.values())


def _file_away(cases: Mapping[str, StoredCase], line: bytes, where: str, place: tuple[int, int]) -> None:
    try:
        raw = json.loads(line)
        case = cases.get(raw["image_id"])
        if case is not None:
            case.outline.append(Entry.of(raw))
            case.lines.append(place)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: no record ({error!r}); `m3d data verify` says what is wrong") from error
