"""M3D-VQA: questions about the images of M3D-Cap, by plane, phase, organ, abnormality and location.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from data_prep.draft import Draft
from data_prep.sources.base import Entry
from data_prep.sources.m3d_cap import find_series, series_of
from data_prep.sources.m3d_volumes import (
    OnLeak,
    find_table,
    listed_entries,
    path_parts,
)
from data_prep.sources.tables import BadTable, OnBadRow, at_row, read_csv, settle_rows

__all__ = ["M3DVQA"]

DATASET = "M3D-VQA"
TOPICS: Mapping[str, str] = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
FOLDERS = ("M3D-VQA", "M3D_VQA")
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_LETTERS = "ABCD"
_CHOICES = tuple(f"Choice {letter}" for letter in _LETTERS)
_COLUMNS = ("Image Path", "Question Type", "Question", *_CHOICES, "Answer", "Answer Choice")
_YES_NO_COLUMNS = ("Image Path", "Question", "Answer")
_NOTHING = frozenset({"", "na", "n/a", "nan"})


@dataclass(frozen=True, slots=True)
class _Question:
    """One row: the options it offers, which of them is right, and what it is about."""

    question: str
    answer: str
    options: tuple[str, ...]
    choice: int
    subtask: str | None
    topic: str | None = None


@dataclass(slots=True)
class _Image:
    path: Path
    patient: str
    questions: dict[str, dict[_Question, set[str]]] = field(default_factory=dict)  # split -> row -> further test lists


@dataclass(frozen=True, kw_only=True)
class M3DVQA:
    """M3D-VQA as published; ``root`` is the data root that holds the tables' folder and the images of M3D-Cap.

    ::

        M3D-VQA/
            M3D_VQA_train.csv      Image Path, Text, Question Type (1 plane, 2 phase, 3 organ, 4 abnormality,
            M3D_VQA_val.csv        5 location), Question, Choice A, Choice B, Choice C, Choice D, Answer, Answer Choice
            M3D_VQA_test.csv
            M3D_VQA_test5k.csv     a part of the test rows: ``meta["subsets"]``
            M3D_VQA_yn_train.csv   Image Path, Question, Answer (yes or no), ...; also ..._val, ..._test where there
        M3D_Cap_npy/ or M3D_Cap/   the images, see `M3DCap`

    Tables that are not there are left out; one at least must be. A row becomes a closed and an open question. Choices
    that are empty or NA are no options: two-choice questions have two. Rows of one image make one entry; it has the
    data set and the id that `M3DCap` gives the image, so that both sources together store it once; its questions say
    that they are of M3D-VQA.

    A letter that does not name the answer's text, like any row that cannot be used, is an error with its row; with
    ``on_bad_row="skip"`` such rows are left out, counted in a warning and listed in ``rejected``.
    """

    name: ClassVar[str] = "m3d_vqa"

    root: Path
    license: str | None = None
    on_bad_row: OnBadRow = "error"
    on_leak: OnLeak = "error"
    rejected: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    def entries(self) -> Iterator[Entry]:
        """Every image that is asked about, with its questions, in the order of the tables.

        Raises:
            FileNotFoundError: No table is there, or none of the images.
            BadTable: A table cannot be used, or two share images or patients.
        """
        found: dict[str, _Image] = {}
        self.rejected.clear()
        for path, split, subset in self._tables():
            self._read(path, split, subset, found)
        settle_rows(self.name, self.rejected, on_bad_row=self.on_bad_row)
        yield from listed_entries(
            self.name,
            found,
            {image: set(one.questions) for image, one in found.items()},
            lambda image, split: tuple(
                draft for asked, subsets in found[image].questions[split].items() for draft in _drafts(asked, subsets)
            ),
            license=self.license,
            on_leak=self.on_leak,
        )

    def _tables(self) -> list[tuple[Path, str, str | None]]:
        """The tables that are there, with their split and the further list they stand for."""
        names = [(f"M3D_VQA_{word}.csv", split, None) for word, split in _SPLITS.items()]
        names += [(f"M3D_VQA_yn_{word}.csv", split, None) for word, split in _SPLITS.items()]
        wanted: list[tuple[str, str, str | None]] = [*names, ("M3D_VQA_test5k.csv", "test", "test5k")]
        found = [(find_table(self.root, (name,), FOLDERS), split, subset) for name, split, subset in wanted]
        tables = [(path, split, subset) for path, split, subset in found if path is not None]
        if not tables:
            raise FileNotFoundError(
                f"{self.root}: no M3D_VQA_train.csv, _val, _test or _yn_train in it nor in {', '.join(FOLDERS)}; "
                "check the root"
            )
        return tables

    def _read(self, path: Path, split: str, subset: str | None, found: dict[str, _Image]) -> None:
        yes_no = "_yn_" in path.name
        known: dict[str, _Image] = {}  # by the path as it stands: a table names each image many times
        for number, row in read_csv(path, _YES_NO_COLUMNS if yes_no else _COLUMNS):
            where = at_row(path, number)
            try:
                asked = _yes_or_no(row, where) if yes_no else _multiple_choice(row, where)
                one = known.get(row["Image Path"]) or self._image(row["Image Path"], where, found)
            except BadTable as error:
                self.rejected.append(str(error))
                continue
            known[row["Image Path"]] = one
            subsets = one.questions.setdefault(split, {}).setdefault(asked, set())
            if subset is not None:
                subsets.add(subset)

    def _image(self, text: str, where: str, found: dict[str, _Image]) -> _Image:
        parts = path_parts(text, where)
        image, patient = series_of(parts)
        if image not in found:
            found[image] = _Image(find_series(self.root, parts), patient)
        return found[image]


def _multiple_choice(row: Mapping[str, str], where: str) -> _Question:
    given = {letter: row[column] for letter, column in zip(_LETTERS, _CHOICES, strict=True) if _is(row[column])}
    options = tuple(given.values())
    if len(options) < 2:
        raise BadTable(f"{where}: {len(options)} choices; a question needs two")
    if len({_folded(option) for option in options}) < len(options):
        raise BadTable(f"{where}: two choices are the same ({', '.join(options)})")
    letter = _letter(row["Answer Choice"])
    if letter not in given:
        raise BadTable(f"{where}: Answer Choice {row['Answer Choice']!r} is none of {', '.join(given)}")
    if _folded(given[letter]) != _folded(row["Answer"], letter):
        raise BadTable(f"{where}: Answer Choice {letter} is {given[letter]!r}, but the Answer is {row['Answer']!r}")
    topic = TOPICS.get(row["Question Type"].removesuffix(".0"))
    if topic is None:
        raise BadTable(f"{where}: Question Type {row['Question Type']!r} is none of 1 to {len(TOPICS)}")
    return _Question(_asked(row, where), given[letter], options, list(given).index(letter), topic)


def _yes_or_no(row: Mapping[str, str], where: str) -> _Question:
    answer = _folded(row["Answer"])
    if answer not in ("yes", "no"):
        raise BadTable(f"{where}: the Answer {row['Answer']!r} is neither yes nor no")
    letter = _letter(row.get("Answer Choice", ""))
    chosen = row.get(f"Choice {letter}", "")
    if _is(chosen) and _folded(chosen) != answer:
        raise BadTable(f"{where}: Answer Choice {letter} is {chosen!r}, but the Answer is {row['Answer']!r}")
    topic = TOPICS.get(row.get("Question Type", "").removesuffix(".0"))
    return _Question(_asked(row, where), answer, ("yes", "no"), ("yes", "no").index(answer), "yes/no", topic)


def _drafts(asked: _Question, subsets: set[str]) -> tuple[Draft, Draft]:
    meta: dict[str, object] = {} if asked.topic is None else {"topic": asked.topic}
    if subsets:
        meta["subsets"] = sorted(subsets)
    slots = {"question": asked.question}
    closed = Draft(
        task="vqa.closed",
        dataset=DATASET,
        subtask=asked.subtask,
        template="m3d.vqa.closed",
        slots=slots,
        options=asked.options,
        choice=asked.choice,
        meta=meta,
    )
    return closed, Draft(
        task="vqa.open",
        dataset=DATASET,
        subtask=asked.subtask,
        template="m3d.vqa.open",
        slots=slots,
        text=asked.answer,
        meta=meta,
    )


def _asked(row: Mapping[str, str], where: str) -> str:
    if not _is(row["Question"]):
        raise BadTable(f"{where}: there is no Question")
    return row["Question"]


def _is(cell: str) -> bool:
    """Whether a cell says something; "None" does, it can be an answer."""
    return cell.lower() not in _NOTHING


def _letter(cell: str) -> str:
    found = re.fullmatch(r"\(?([A-Da-d])[.):]?", cell)
    return found[1].upper() if found else ""


def _folded(text: str, letter: str = "") -> str:
    """For comparing: without case, a full stop, or the answer's own letter in front."""
    if letter:
        text = re.sub(rf"^{letter}[.):]\s+", "", text)
    return " ".join(text.casefold().rstrip(".").split())
