"""The scans that are asked about and their truth: on their own grid or, where only a store is at hand, on its grid."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.boxes import Box, box_of_mask, to_norm
from data_prep.case import Case
from data_prep.prepare.job import image_id
from data_prep.preprocess import Prepared, Preprocess
from data_prep.record import Record
from data_prep.sources.base import Entry
from data_prep.sources.registry import build_source
from data_prep.steps import Axis, Lattice, View
from data_prep.store import StoredImage, unpack
from data_prep.volume import BadScan, Volume, array_sha256
from m3d.bench.config import BenchConfig, TaskConfig
from m3d.bench.kinds import TEXT, named
from m3d.train.cases import StoredCase, stored

__all__ = ["BenchCase", "Grid", "Opened", "Question", "chosen", "find_cases", "group_of"]

Grid = Literal["scan", "store"]


@dataclass(frozen=True, eq=False)
class Question:
    """A record that is asked by one kind of prompt (`m3d.bench.kinds`)."""

    record: Record
    by: str = TEXT

    @property
    def name(self) -> str:
        """What tells it from other questions."""
        return named(self.record.id, self.by)

    @property
    def row(self) -> str:
        """Which row of the table it is counted in."""
        return named(self.record.task, self.by)


@dataclass(frozen=True, eq=False)
class BenchCase:
    """One scan of a run and what it is asked: ``entry`` reads the scan itself, where there is a source.

    ``prompts`` are the kinds of prompt of a task; by text alone where it says none.
    """

    stored: StoredCase
    records: tuple[Record, ...]
    entry: Entry | None = None
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of the image."""
        return self.stored.id

    @property
    def questions(self) -> list[Question]:
        """All that a model answers about it; retrieval is asked by its own way."""
        asked = [record for record in self.records if record.task != "retrieval"]
        return [Question(record, by) for record in asked for by in self.prompts.get(record.task, (TEXT,))]

    def open(self) -> Opened:
        """Read the scan and its truth.

        Raises:
            BadScan: A file is broken, or not the scan that the store was prepared from.
        """
        image = self.stored.image
        if self.entry is None:
            return Opened(image, Volume(image.values(), image.affine), image.labels(), image.names, None)
        try:
            case = self.entry.read()
        except (OSError, EOFError, ValueError) as error:
            raise BadScan(f"{self.id}: the scan cannot be read ({error})") from error
        if array_sha256(case.volume.array) != image.sha256:
            raise BadScan(f"{self.id}: the scan is not the one that {image.root} was prepared from; prepare it again")
        return Opened(image, case.volume, case.layers, dict(case.names), case)


@dataclass(frozen=True, eq=False)
class Opened:
    """A scan at hand: ``volume`` and ``labels`` (L, D, H, W) on the grid that is judged."""

    image: StoredImage
    volume: Volume
    labels: npt.NDArray[Any]
    names: Mapping[int, str]
    case: Case | None

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm along the axes; None where it is not known."""
        d, h, w = self.volume.spacing
        return (d, h, w) if self.image.placed else None

    def prepared(self, preprocess: Preprocess) -> Prepared:
        """The scan as the model sees it; what a store keeps already lies on the model's grid."""
        if self.case is not None:
            return preprocess.apply(self.volume)
        shape, limits = self.image.media.shape, self.image.media.intensity
        d, h, w = shape
        whole = View((d, h, w), (0, 1, 2), (slice(0, d), slice(0, h), slice(0, w)))
        axes = tuple(Axis(size=side, grid=side, step=1.0, start=0) for side in (d, h, w))
        return Prepared(
            array=unpack(self.image.array()),
            affine=self.volume.affine,
            source=self.volume,
            intensity={"kind": "window", "lo": limits.lo, "hi": limits.hi, "min": limits.lo, "max": limits.hi},
            steps=(whole, whole, Lattice(axes)),  # type: ignore[arg-type]  # three of them
            warnings=self.image.warnings,
        )

    def mask(self, record: Record, number: int) -> npt.NDArray[np.bool_]:
        """The voxels of a record's mask.

        Raises:
            ValueError: The scan has no label of that name.
        """
        assert record.target.masks is not None
        name = record.target.masks[number].name
        for value, known in self.names.items():
            if known == name:
                return np.asarray((self.labels == value).any(axis=0))
        raise ValueError(
            f"record {record.id}: no label of the scan is named {name!r}; it has {', '.join(self.names.values())}"
        )

    def boxes(self, record: Record) -> tuple[tuple[float, ...], ...]:
        """A record's boxes as fractions of the scan: those of its labels on its own grid, else those of the record."""
        found = []
        for truth in record.target.boxes or ():
            box = Box(truth.lo, truth.hi, truth.frame, truth.name)
            if self.case is not None and truth.frame == "voxel":
                box = self._on_scan(box, alone=len(record.target.boxes or ()) == 1)
            norm = to_norm(box, self.volume.shape)
            found.append((*norm.lo, *norm.hi))
        return tuple(found)

    def _on_scan(self, box: Box, *, alone: bool) -> Box:
        values = [value for value, name in self.names.items() if name == box.name]
        mask = np.asarray(np.isin(self.labels, values).any(axis=0)) if alone and values else None
        return box_of_mask(mask, box.name) if mask is not None and mask.any() else self.image.way.box_to_scan(box)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of the grid that is judged."""
        return self.volume.shape


def find_cases(config: BenchConfig, data: Path, preprocess: Preprocess | None) -> list[BenchCase]:
    """The scans of a run, and the records that each is asked; reads tables, no voxels.

    Raises:
        FileNotFoundError, ValueError: There is no such store, it is not the model's, or nothing in it is asked for.
    """
    images = stored(data, config.split, preprocess=preprocess)[: config.most_scans]
    entries = _entries(config)
    wanted = chosen(config, [record for image in images for record in _asked(image, config)])
    cases, prompts = [], {name: task.prompts for name, task in config.tasks.items()}
    for image in images:
        records = wanted.get(image.id, ())
        if not records:
            continue
        if entries is not None and image.id not in entries:
            raise ValueError(f"scans: the source has no {image.id}, which {data} has; is it the one of that store?")
        cases.append(BenchCase(image, tuple(records), None if entries is None else entries[image.id], prompts))
    if not cases:
        raise ValueError(f"{data}: no record of {config.split!r} is asked for; `m3d data stats {data}` counts them")
    if config.blind == "shuffled" and len({case.stored.image.patient_id for case in cases}) < 2:
        raise ValueError(f"{data}: blind: shuffled needs scans of two patients; take blind: zeros")
    return cases


def _entries(config: BenchConfig) -> dict[str, Entry] | None:
    if config.scans is None:
        return None
    source = build_source(config.scans, root=Path(config.root))
    return {image_id(entry): entry for entry in source.entries()}


def _asked(image: StoredCase, config: BenchConfig) -> Iterator[Record]:
    numbers = [number for number, entry in enumerate(image.entries) if entry.task in config.tasks]
    for record in image.records_at(numbers):
        if _fits(record, config.tasks[record.task]):
            yield record


def _fits(record: Record, task: TaskConfig) -> bool:
    """Whether a task's choice has this record."""
    if task.datasets and record.source.dataset not in task.datasets:
        return False
    if task.subsets and not set(record.meta.get("subsets") or ()) & set(task.subsets):
        return False
    if task.subtasks and (record.subtask or "") not in task.subtasks:
        return False
    return not task.names or bool({one.name for _, one in record.target.placed} & set(task.names))


def chosen(config: BenchConfig, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records that are asked, by image: all of a task, or as many as its ``most``, drawn with the seed."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    found: dict[str, list[Record]] = {}
    for task, some in by_task.items():
        most = config.tasks[task].most
        if most is not None and most < len(some):
            drawn = random.Random(f"{config.seed}/{task}").sample(range(len(some)), most)
            some = [some[number] for number in sorted(drawn)]
        for record in some:
            found.setdefault(record.image_id, []).append(record)
    return found


def group_of(record: Record) -> str:
    """What a record is counted with: its structure, or the family of its question."""
    if record.task.startswith("vqa"):
        return record.subtask or ""
    if record.task in ("report", "retrieval"):
        return ""
    names = {one.name for _, one in record.target.placed}
    return "absent" if not names else names.pop() if len(names) == 1 else "several"
