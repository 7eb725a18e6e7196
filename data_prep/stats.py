"""What a store holds, in numbers: how dense it is, how long its texts are, which structures and answers it has.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_prep.record import Media, Record
from data_prep.records import read_records
from data_prep.verify.arrays import is_numpy, read_array
from data_prep.verify.pool import spread
from data_prep.verify.words import count_words

__all__ = ["Spread", "Statistics", "gather_statistics"]

SCHEMA: Final = "m3d.stats/1"
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Spread:
    """How many values there are, and how they lie."""

    n: int
    mean: float
    low: float
    median: float
    high: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, p10, median, p90, high = np.percentile(values, [0, 10, 50, 90, 100]).tolist()
        return cls(len(values), float(np.mean(values)), low, median, high, p10, p90)

    def to_dict(self) -> dict[str, float]:
        """Rounded for reading."""
        return {name: round(value, 3) for name, value in vars(self).items()}


@dataclass
class Statistics:
    """Counts and raw values; `to_dict` and `to_markdown` sum them up.

    Words are those of what is asked (question, description) and of what is to be said. ``voxels`` and ``millilitres``
    are by structure, one value an image; ``answers`` by kind of question (task and subtask), without regard to case,
    and ``spellings`` has them as they are written.
    """

    source: str
    records: Counter[str] = field(default_factory=Counter)  # by split
    images: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    patients: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    tasks: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    by_image: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    asked_words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    said_words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    spellings: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    positions: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    asked_for: Counter[str] = field(default_factory=Counter)  # records that box or draw a structure
    absent: int = 0
    media: dict[str, Media] = field(default_factory=dict)
    masks: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)  # image -> file -> label -> name
    voxels: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    millilitres: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def splits(self) -> list[str]:
        """Those that there are, in their usual order."""
        return [split for split in _SPLITS if split in self.records]

    def add(self, record: Record) -> None:
        """Count one record."""
        self.records[record.split] += 1
        self.images[record.split].add(record.image_id)
        self.patients[record.split].add(record.patient_id)
        self.tasks[record.task][record.split] += 1
        self.by_image[record.image_id][record.task] += 1
        asked = [record.prompt.text, *(record.prompt.slots.get(key) for key in ("question", "description"))]
        if record.task != "reg" and any(asked):
            self.asked_words[record.task].append(count_words(" ".join(str(text) for text in asked if text)))
        self._add_answer(record)
        for number, media in enumerate(record.media):
            self.media.setdefault(media.image_id, media)
            for mask in record.target.masks or ():
                if mask.media == number and mask.path is not None and mask.label is not None:
                    self.masks.setdefault(media.image_id, {}).setdefault(mask.path, {})[mask.label] = mask.name
        placed = {one.name for one in (*(record.target.boxes or ()), *(record.target.masks or ())) if one.name}
        self.asked_for.update(placed)
        self.absent += not placed and (record.target.boxes == () or record.target.masks == ())

    def _add_answer(self, record: Record) -> None:
        target = record.target
        answer = target.text
        if target.options is not None and target.choice is not None:
            answer = target.options[target.choice]
            self.positions[_kind(record)][target.choice] += 1
        if record.task == "reg":
            answer = str(record.prompt.slots.get("description", "")) or next((b.name for b in target.boxes or ()), None)
        if answer is None:
            return
        self.said_words[record.task].append(count_words(answer))
        if record.task.startswith("vqa"):
            written = " ".join(answer.split()).rstrip(".")
            self.answers[_kind(record)][written.casefold()] += 1
            self.spellings[written.casefold()][written] += 1

    @property
    def entries(self) -> Spread:
        """Records an image."""
        return Spread.of([sum(tasks.values()) for tasks in self.by_image.values()])

    @property
    def kinds(self) -> Spread:
        """Different tasks an image."""
        return Spread.of([len(tasks) for tasks in self.by_image.values()])

    def majority(self, *kinds: str) -> tuple[str, float]:
        """The most frequent answer to some kinds of questions together, as it is written, and how often it is right."""
        counts = sum((self.answers[kind] for kind in kinds), Counter[str]())
        answer, times = counts.most_common(1)[0]
        return self.spellings[answer].most_common(1)[0][0], times / counts.total()

    @property
    def questions(self) -> dict[str, list[str]]:
        """The kinds that ask for one thing, with and without options, under the name of it."""
        found: dict[str, list[str]] = defaultdict(list)
        for kind in sorted(self.answers):
            task, _, subtask = kind.partition(" ")
            found[subtask or task].append(kind)
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, schema ``m3d.stats/1``."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "splits": {
                split: {
                    "images": len(self.images[split]),
                    "patients": len(self.patients[split]),
                    "records": self.records[split],
                }
                for split in self.splits
            },
            "tasks": {task: dict(counts) for task, counts in sorted(self.tasks.items())},
            "density": {"entries_per_image": self.entries.to_dict(), "tasks_per_image": self.kinds.to_dict()},
            "words": {"asked": _spreads(self.asked_words), "said": _spreads(self.said_words)},
            "structures": {name: self._structure(name) for name in self.structure_names},
            "absent_targets": self.absent,
            "answers": {kind: self._balance(kind) for kind in sorted(self.answers)},
            "media": self._media(),
        }

    @property
    def structure_names(self) -> list[str]:
        """Those with voxels or records, most frequent first."""
        names = {*self.asked_for, *self.voxels}
        return sorted(names, key=lambda name: (-len(self.voxels.get(name, ())), -self.asked_for[name], name))

    def _structure(self, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"records": self.asked_for[name], "images": len(self.voxels.get(name, ()))}
        if self.voxels.get(name):
            facts["voxels"] = Spread.of(self.voxels[name]).to_dict()
        if self.millilitres.get(name):
            facts["ml"] = Spread.of(self.millilitres[name]).to_dict()
        return facts

    def _balance(self, kind: str) -> dict[str, Any]:
        answer, rate = self.majority(kind)
        facts = {
            "records": self.answers[kind].total(),
            "different_answers": len(self.answers[kind]),
            "majority": answer,
            "majority_rate": round(rate, 4),
        }
        if self.positions[kind]:
            facts["positions"] = {
                "ABCDEFGHIJ"[at : at + 1] or str(at): n for at, n in sorted(self.positions[kind].items())
            }
        return facts

    def _media(self) -> dict[str, Any]:
        placed = [media.spacing_mm for media in self.media.values() if media.spacing_mm is not None]
        axes = list(zip(*(spacing for spacing in placed if len(spacing) == 3), strict=True))
        return {
            "shapes": _counted(" x ".join(map(str, media.shape)) for media in self.media.values()),
            "modalities": _counted(media.modality for media in self.media.values()),
            "units": _counted(media.intensity.unit for media in self.media.values()),
            "orientations": _counted(media.orient or "not known" for media in self.media.values()),
            "spacing_mm": {axis: Spread.of(values).to_dict() for axis, values in zip("DHW", axes, strict=False)},
            "without_spacing": len(self.media) - len(placed),
        }

    def to_markdown(self, structures: int = 40) -> str:
        """Tables to read and to keep beside the data."""
        facts = self.to_dict()
        splits = [[split, *values.values()] for split, values in facts["splits"].items()]
        tasks = [[task, *(counts.get(split, 0) for split in self.splits)] for task, counts in facts["tasks"].items()]
        words = [
            [f"{task}, {what}", *_row(one)] for what in ("asked", "said") for task, one in facts["words"][what].items()
        ]
        density = [[name.replace("_", " "), *_row(one)] for name, one in facts["density"].items()]
        shown = list(facts["structures"].items())[:structures]
        named = [[name, one["images"], one["records"], *_row(one.get("ml"), one.get("voxels"))] for name, one in shown]
        answers = [
            [kind, one["records"], one["different_answers"], f"{one['majority']} ({one['majority_rate']:.0%})"]
            for kind, one in facts["answers"].items()
        ]
        spread = ["mean", "10 %", "median", "90 %", "max"]
        media = [[what, ", ".join(f"{key} ({n})" for key, n in facts["media"][what].items())] for what in _MEDIA]
        media += [
            [f"spacing {axis} (mm)", f"{s['low']:g} to {s['high']:g}"]
            for axis, s in facts["media"]["spacing_mm"].items()
        ]
        return "\n\n".join(
            [
                f"# What {self.source} holds",
                _table(["split", "images", "patients", "records"], splits),
                _table(["task", *self.splits], tasks),
                "## Density\n\n" + _table(["an image has", *spread], density),
                "## Words\n\n" + _table(["task", *spread], words),
                "## Structures (mL, or voxels where the spacing is not known)\n\n"
                + _table(["name", "images", "records", *spread], named),
                "## Answers\n\n" + _table(["question", "records", "different", "most frequent"], answers),
                "## Images\n\n" + _table(["", ""], media),
            ]
        ) + "\n"  # fmt: skip


_MEDIA = ("shapes", "modalities", "units", "orientations")


def gather_statistics(
    source: Path | str, *, root: Path | str | None = None, workers: int | None = None, fast: bool = False
) -> Statistics:
    """Count what a store's folder or a file of records holds; ``fast`` opens no mask.

    Raises:
        FileNotFoundError: There are no records.
        RecordError: A line breaks a rule; `data_prep.verify` finds all that do.
        ValueError: There is no record, or a mask cannot be read.
    """
    source = Path(source)
    path = source / "records.jsonl" if source.is_dir() else source
    statistics = Statistics(str(source))
    for record in read_records(path):
        statistics.add(record)
    if not statistics.media:
        raise ValueError(f"{path} holds no record; run `m3d data prepare` to its end")
    if not fast:
        folder = Path(root) if root is not None else path.parent
        jobs = list(statistics.masks.items())
        for image_id, counts in zip(statistics.masks, spread(partial(_count, root=folder), jobs, workers), strict=True):
            spacing = statistics.media[image_id].spacing_mm
            for name, voxels in counts.items():
                statistics.voxels[name].append(voxels)
                if spacing is not None and len(spacing) == 3:
                    statistics.millilitres[name].append(voxels * float(np.prod(spacing)) / 1000)
    return statistics


def _count(job: tuple[str, Mapping[str, Mapping[int, str]]], root: Path) -> dict[str, int]:
    """Voxels by name in the mask files of one image."""
    counts: dict[str, int] = {}
    for path, names in job[1].items():
        if not is_numpy(path):
            continue
        try:
            labels = read_array(root / path)
        except ValueError as error:
            raise ValueError(f"{root / path}: {error}; `m3d data verify` finds all such files") from error
        found = dict(zip(*(some.tolist() for some in np.unique(labels, return_counts=True)), strict=True))
        for label, name in names.items():
            if found.get(label):
                counts[name] = counts.get(name, 0) + found[label]
    return counts


def _kind(record: Record) -> str:
    return f"{record.task} {record.subtask}" if record.subtask else record.task


def _spreads(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {name: Spread.of(some).to_dict() for name, some in sorted(values.items())}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _row(*spreads: Mapping[str, float] | None) -> list[str]:
    """Of the first that there is."""
    one = next((spread for spread in spreads if spread), None)
    return [f"{one[key]:.4g}" if one else "" for key in ("mean", "p10", "median", "p90", "high")]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "|".join("---" if at == 0 else "---:" for at in range(len(head))) + "|"]
    lines += ["| " + " | ".join(str(value).replace("|", "/") for value in row) + " |" for row in rows]
    return "\n".join(lines)
