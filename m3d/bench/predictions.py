"""What a system answered, one JSON line an answer, written as it goes; of this system or of any other.

A run in several processes, or one that was killed and begun again, leaves several files of lines in ``parts/``;
`gathered` reads them all, and `gather` makes one file of them. A line that was cut off while written is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from data_prep.atomic import atomic_path

__all__ = ["SIGHTS", "DrawnMask", "Key", "Part", "Prediction", "gather", "gathered", "match_names"]

NAME = "predictions.jsonl"
Sight = Literal["seeing", "blind"]
SIGHTS: tuple[Sight, ...] = ("seeing", "blind")
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class DrawnMask:
    """A mask that was drawn: the ``name`` it was given, its ``file`` (NIfTI, on the grid that is judged).

    ``soft`` is for the released Dice: sum(p t), sum(p) and sum(t) of the probabilities on the model's own grid.
    """

    name: str
    file: str | None = None
    soft: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer to the record ``id``; ``boxes`` are fractions of the image, ``failure`` says why there is none."""

    id: str
    sight: Sight = "seeing"
    task: str = ""
    subtask: str | None = None
    image_id: str = ""
    patient_id: str = ""
    prompt: str = ""
    text: str = ""
    evidence: str = ""
    boxes: tuple[tuple[float, ...], ...] = ()
    masks: tuple[DrawnMask, ...] = ()
    likelihoods: tuple[float, ...] = ()
    failure: str | None = None
    seconds: float | None = None

    @property
    def key(self) -> Key:
        """What tells it from the others."""
        return self.id, self.sight

    def to_line(self) -> str:
        """One line of JSON, without what is not given."""
        row = {key: value for key, value in asdict(self).items() if value not in (None, (), "")}
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
        if row.get("sight", "seeing") not in SIGHTS:
            raise ValueError(f"{where}: sight {row['sight']!r} is none of {', '.join(SIGHTS)}")
        try:
            masks = tuple(_mask(mask) for mask in row.get("masks") or ())
            boxes = tuple(tuple(float(side) for side in box) for box in row.get("boxes") or ())
            likelihoods = tuple(float(one) for one in row.get("likelihoods") or ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if any(len(box) != 6 for box in boxes):
            raise ValueError(f"{where}: a box is six fractions of the image, d0 h0 w0 d1 h1 w1")
        texts = {key: str(row[key] or "") for key in ("text", "prompt", "evidence") if key in row}
        return replace(cls(**{**row, **texts, "masks": (), "boxes": boxes, "likelihoods": likelihoods}), masks=masks)


def _mask(row: dict[str, Any]) -> DrawnMask:
    soft = row.get("soft")
    numbers = None if soft is None else tuple(float(one) for one in soft)
    if numbers is not None and len(numbers) != 3:
        raise ValueError("soft: three sums are needed, of p*t, p and t")
    return DrawnMask(name=str(row.get("name", "")), file=row.get("file"), soft=numbers)


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
    """A file that answers are added to, whole lines at a time, on disk before the next is begun."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / "parts" / f"{rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Keep answers."""
        self._file.write("".join(f"{prediction.to_line()}\n" for prediction in predictions))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more will be added."""
        self._file.close()


def _drop_cut_line(path: Path) -> None:
    kept = path.read_bytes() if path.is_file() else b""
    whole = kept.rfind(b"\n") + 1
    if whole < len(kept):
        with path.open("r+b") as file:
            file.truncate(whole)


def gathered(folder: Path) -> dict[Key, Prediction]:
    """All answers of a run, whole or begun; of two to the same question the first.

    Raises:
        ValueError: A line is no prediction.
    """
    found: dict[Key, Prediction] = {}
    for path in (folder / NAME, *sorted((folder / "parts").glob("*.jsonl"))):
        for prediction in read_predictions(path) if path.is_file() else ():
            found.setdefault(prediction.key, prediction)
    return found


def read_predictions(path: Path) -> Iterator[Prediction]:
    """The lines of a file; one that was cut off at its end is passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and path.parent.name == "parts":
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            yield Prediction.from_row(row, f"{path}:{number}")


def gather(folder: Path) -> dict[Key, Prediction]:
    """Make one file of a run's parts, sorted by record; the answers."""
    found = gathered(folder)
    with atomic_path(folder / NAME) as temporary:
        lines = (found[key].to_line() + "\n" for key in sorted(found))
        temporary.write_text("".join(lines), encoding="utf-8")
    for path in (folder / "parts").glob("*.jsonl"):
        path.unlink()
    if (folder / "parts").is_dir():
        (folder / "parts").rmdir()
    return found
