"""What a system answered, one JSON line an answer, written as it goes; of this system or of any other.

Every process of a run adds to a file of its own in ``parts/``, which nobody else writes or removes; `gathered` reads
them all, and `gather` makes one file of them beside. A line that was cut off while it was written is passed over.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from data_prep.atomic import atomic_path
from data_prep.record import Record
from m3d.bench.kinds import TEXT, named

__all__ = [
    "PARTS",
    "SIGHTS",
    "UNPROMPTABLE",
    "DrawnMask",
    "Key",
    "Part",
    "Prediction",
    "Sight",
    "gather",
    "gathered",
    "match_names",
]

NAME, PARTS = "predictions.jsonl", "parts"
UNPROMPTABLE = "CannotBePrompted"
"""How the failure of a question begins that has nothing to point at: it says nothing of the model."""
Sight = Literal["seeing", "blind"]
SIGHTS: tuple[Sight, ...] = ("seeing", "blind")
Key = tuple[str, str]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Six = tuple[Finite, Finite, Finite, Finite, Finite, Finite]  # d0 h0 w0 d1 h1 w1


@dataclass(frozen=True, kw_only=True)
class DrawnMask:
    """A mask that was drawn: the ``name`` it was given, its ``file`` (NIfTI, on the grid that is judged).

    ``soft`` is for the released Dice: sum(p t), sum(p) and sum(t) of the probabilities on the model's own grid.
    ``steps`` are Dice on the way to it, where it was asked for in steps: of what was there before the first, which is
    nothing, or a mask that was given, and after each.
    """

    name: str
    file: str | None = None
    soft: tuple[Finite, Finite, Finite] | None = None
    steps: tuple[Finite, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer to the record ``id``; ``boxes`` are fractions of the image, ``failure`` says why there is none.

    ``by`` is the kind of prompt that masks were asked for with (`m3d.bench.kinds`).
    """

    id: str
    sight: Sight = "seeing"
    by: str = TEXT
    task: str = ""
    subtask: str | None = None
    image_id: str = ""
    patient_id: str = ""
    prompt: str = ""
    text: str = ""
    evidence: str = ""
    boxes: tuple[Six, ...] = ()
    masks: tuple[DrawnMask, ...] = ()
    likelihoods: tuple[Finite, ...] = ()
    failure: Annotated[str, Field(min_length=1)] | None = None
    seconds: Finite | None = None

    @property
    def key(self) -> Key:
        """What tells it from the others: the question, as `m3d.bench.kinds.named` calls it, and the sight."""
        return named(self.id, self.by), self.sight

    @classmethod
    def of(cls, record: Record, sight: Sight, by: str = TEXT, **said: Any) -> Prediction:  # noqa: ANN401 - its fields
        """An answer to a record."""
        return cls(
            id=record.id,
            sight=sight,
            by=by,
            task=record.task,
            subtask=record.subtask,
            image_id=record.image_id,
            patient_id=record.patient_id,
            **said,
        )

    def to_line(self) -> str:
        """One line of JSON, without what is not given."""
        row = {key: value for key, value in asdict(self).items() if value not in (None, (), "")}
        if self.by == TEXT:
            del row["by"]
        for mask in row.get("masks", ()):
            if not mask["steps"]:
                del mask["steps"]
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_row(cls, row: Any, where: str) -> Prediction:  # noqa: ANN401 - whatever a line holds
        """Read what `to_line` wrote, or another system's line: ``id`` and what it says is enough.

        Raises:
            ValueError: The line is no such object; the message names the field.
        """
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise ValueError(f'{where}: a prediction has the id of its record: {{"id": "...", "text": "..."}}')
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(row) - known):
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; a prediction has {', '.join(sorted(known))}")
        try:
            return _READ.validate_python({key: value for key, value in row.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {field}={first['input']!r}: {first['msg']}") from None


_READ = TypeAdapter(Prediction)


def match_names(asked: Sequence[str], said: Sequence[str]) -> list[int | None]:
    """Which of the masks that were drawn answers each that was asked for: by name, the last of several, then in order.

    What is drawn under another name still answers: whether the voxels are right is judged, not the words.
    """
    plain = [name.strip().lower() for name in said]
    found: list[int | None] = [None] * len(asked)
    for place, name in enumerate(asked):
        numbers = [number for number, one in enumerate(plain) if one == name.strip().lower() and number not in found]
        found[place] = numbers[-1] if numbers else None
    known = {name.strip().lower() for name in asked}
    rest = iter([number for number, one in enumerate(plain) if number not in found and one not in known])
    return [next(rest, None) if number is None else number for number in found]


class Part:
    """A file of this process alone that answers are added to, whole lines at a time, on disk before more are asked."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / PARTS / f"{rank:04d}-{uuid.uuid4().hex[:12]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("x", encoding="utf-8")

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Keep answers."""
        self._file.write("".join(f"{prediction.to_line()}\n" for prediction in predictions))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more will be added; an empty file goes."""
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()


def gathered(folder: Path) -> dict[Key, Prediction]:
    """All answers of a run, whole or begun; of two to the same question, as two runs at once may leave, the first.

    Raises:
        ValueError: A line is no prediction, or one file has two answers to a question.
    """
    found: dict[Key, Prediction] = {}
    for path in (folder / NAME, *sorted((folder / PARTS).glob("*.jsonl"))):
        own = set[Key]()
        for where, prediction in read_predictions(path) if path.is_file() else ():
            if prediction.key in own:
                question = prediction.key[0]
                raise ValueError(f"{where}: {question!r} ({prediction.sight}) is answered twice; keep one")
            own.add(prediction.key)
            found.setdefault(prediction.key, prediction)
    return found


def read_predictions(path: Path) -> Iterator[tuple[str, Prediction]]:
    """The lines of a file with their place; of a part, one that was cut off at its end is passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and path.parent.name == PARTS:
                return
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            yield where, Prediction.from_row(row, where)


def gather(folder: Path) -> dict[Key, Prediction]:
    """Make one file of all that a run has answered, sorted by record; the answers. The parts stay."""
    found = gathered(folder)
    with atomic_path(folder / NAME) as temporary:
        temporary.write_text("".join(found[key].to_line() + "\n" for key in sorted(found)), encoding="utf-8")
    return found
