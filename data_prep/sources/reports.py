"""A table of reports, questions and answers beside one's own scans: what each row says becomes drafts.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.draft import Draft
from data_prep.sources.splits import split_named
from data_prep.sources.tables import BadTable, at_row, read_csv

__all__ = ["Said", "finder", "read_column", "read_reports"]

KEYS = ("id", "image")
Find = Callable[[str, str], str]


@dataclass(kw_only=True)
class Said:
    """All that a table says of one image."""

    drafts: list[Draft] = field(default_factory=list)
    patient: str | None = None
    split: str | None = None


def finder(aliases: Mapping[str, str]) -> Find:
    """Look up images by id, file name or path; the second argument says where, should there be none."""

    def find(word: str, where: str) -> str:
        found = aliases.get(word) or aliases.get(word.removeprefix("./"))
        if found is None:
            close = difflib.get_close_matches(word, list(aliases), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it names a scan by id, file name or path below root"
            raise BadTable(f"{where}: no scan {word!r}; {hint}")
        return found

    return find


def read_reports(path: Path, find: Find) -> dict[str, Said]:
    """Reports and questions by image.

    Columns: ``id`` or ``image``; ``text`` (a report) and/or ``question``, ``answer``, ``options`` (separated by ``|``;
    the answer is one of them, or its letter); ``patient``, ``split``, ``lang``, ``topic`` as wanted. An image may have
    any number of rows.

    Raises:
        BadTable: A row names no scan, says nothing, contradicts another, or has an answer that is no option.
    """
    said: dict[str, Said] = {}
    for number, row in read_csv(path, ()):
        where = at_row(path, number)
        image = find(_key(row, where), where)
        one = said.setdefault(image, Said())
        split = row.get("split") or None
        one.patient = _same(one.patient, row.get("patient") or None, f"{where}: patient")
        one.split = _same(one.split, None if split is None else split_named(split, where), f"{where}: split")
        drafts = _drafts(row, where)
        if not drafts and not one.patient and not one.split:
            raise BadTable(f"{where}: neither text nor question; fill one of them, or remove the row")
        one.drafts.extend(drafts)
    return said


def read_column(path: Path, column: str, find: Find) -> dict[str, str]:
    """One column by image, such as the patient of each.

    Raises:
        BadTable: A row names no scan, is empty, or contradicts another.
    """
    values: dict[str, str] = {}
    for number, row in read_csv(path, (column,)):
        where = at_row(path, number)
        image = find(_key(row, where), where)
        if not row[column]:
            raise BadTable(f"{where}: no {column}; fill it in")
        values[image] = _same(values.get(image), row[column], f"{where}: {column}") or ""
    return values


def _key(row: Mapping[str, str], where: str) -> str:
    for name in KEYS:
        if row.get(name):
            return row[name]
    raise BadTable(f"{where}: no scan is named; fill in a column {' or '.join(map(repr, KEYS))}")


def _same(old: str | None, new: str | None, what: str) -> str | None:
    if old is not None and new is not None and old != new:
        raise BadTable(f"{what} {new!r}, but another row of this image has {old!r}; correct one")
    return old if new is None else new


def _drafts(row: Mapping[str, str], where: str) -> list[Draft]:
    drafts, lang = [], row.get("lang") or "en"
    if row.get("text"):
        drafts.append(Draft(task="report", template="m3d.report", text=row["text"], lang=lang))
        drafts.append(Draft(task="retrieval", template="m3d.retrieval", text=row["text"], lang=lang))
    question, answer = row.get("question"), row.get("answer")
    if bool(question) != bool(answer):
        raise BadTable(f"{where}: a question and its answer go together; one of them is empty")
    if question and answer:
        options = tuple(option.strip() for option in row.get("options", "").split("|") if option.strip())
        topic, slots = row.get("topic") or None, {"question": question}
        if options:
            choice = _choice(answer, options, where)
            drafts.append(
                Draft(
                    task="vqa.closed",
                    template="m3d.vqa.closed",
                    subtask=topic,
                    slots=slots,
                    options=options,
                    choice=choice,
                    lang=lang,
                )
            )
        else:
            drafts.append(
                Draft(task="vqa.open", template="m3d.vqa.open", subtask=topic, slots=slots, text=answer, lang=lang)
            )
    return drafts


def _choice(answer: str, options: Collection[str], where: str) -> int:
    """Which option an answer is: its words, or its letter where no option is that letter."""
    lowered = [option.lower() for option in options]
    if len(options) < 2 or len(set(lowered)) != len(lowered):
        raise BadTable(f"{where}: options {' | '.join(options)!r}: at least two that differ are needed")
    if answer.lower() in lowered:
        return lowered.index(answer.lower())
    letter = answer.strip(" .()").upper()
    if len(letter) == 1 and letter in string.ascii_uppercase[: len(lowered)]:
        return string.ascii_uppercase.index(letter)
    raise BadTable(f"{where}: the answer {answer!r} is none of the options {' | '.join(options)!r}, nor a letter")
