"""Read every line of a store or a record file, note all that is wrong with it, and gather what it says by image.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from data_prep.record import NEEDS, Media, Record, explained
from data_prep.store import StoredImage
from data_prep.verify.facts import ImageFacts, ReportText
from data_prep.verify.findings import Findings
from data_prep.verify.words import Vocabulary, check_words

__all__ = ["Gathered", "Render", "digest", "gather_index", "gather_records"]

Render = Callable[[Record], str | None]
"""Tries to write a record's prompt and answer; says what is wrong, or None."""
_REPORT_TASKS = ("report", "retrieval")


@dataclass
class Gathered:
    """All that the lines said.

    ``rows`` (by key) and ``lines`` (by id, with the line's number) keep digests of what is said of an image, to compare
    them with the parts; ``seen`` has the line of every record by digests that leave its id out.
    """

    images: dict[str, ImageFacts] = field(default_factory=dict)
    indexed: bool = False
    num_records: int = 0
    num_broken: int = 0
    ids: dict[str, int] = field(default_factory=dict)
    entries: set[str] = field(default_factory=set)  # images that records are about
    reports: dict[tuple[str, str], ReportText] = field(default_factory=dict)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    has_parts: bool = False
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    lines: dict[str, dict[str, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    seen: dict[int, int] = field(default_factory=dict)


def digest(value: object) -> int:
    """The same for the same JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def gather_index(path: Path, gathered: Gathered, findings: Findings) -> None:
    """Read ``images.jsonl``."""
    gathered.indexed = True
    for where, text in _lines(path):
        try:
            row = json.loads(text)
            if gathered.has_parts:
                gathered.rows.setdefault(str(row["image_id"]), {key: digest(value) for key, value in row.items()})
            image = StoredImage.from_row(row, path.parent)
            if not isinstance(image.files, dict) or not all(isinstance(sum_, str) for sum_ in image.files.values()):
                raise ValueError("files must be paths with the sha256 of each")
        except ValidationError as error:
            for fault in _faults(error, Media):
                findings.error("schema", where, f"media.{fault}; prepare it again")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"needs the key {error}" if isinstance(error, KeyError) else str(error)
            findings.error("schema", where, f"{what}; prepare it again")
        else:
            if image.image_id in gathered.images:
                before = gathered.images[image.image_id].where
                findings.error("ids", where, f"image {image.image_id!r} stands at {before} too; prepare it again")
                continue
            facts = ImageFacts(
                media=image.media,
                where=where,
                names=image.names,
                masks=image.masks,
                scan_sha256=image.sha256,
                checksums=dict(image.files),
            )
            facts.patients[image.dataset, image.patient_id] = facts.splits[image.split] = where
            gathered.images[image.image_id] = facts
            gathered.vocabulary.add(image.names.values())


def gather_records(path: Path, gathered: Gathered, findings: Findings, *, render: Render | None = None) -> None:
    """Read a file of records; an index is read before it, so that records can be compared with it."""
    last = ""
    for where, text in _lines(path):
        if gathered.has_parts:
            _keep_line(text, where, gathered)
        try:
            record = Record.model_validate_json(text, strict=True)
        except ValidationError as error:
            gathered.num_broken += 1
            for fault in _faults(error, Record):
                findings.error("schema", where, fault)
            continue
        gathered.num_records += 1
        if record.image_id != last and record.image_id in gathered.entries:
            message = f"entries of image {record.image_id!r} stand further up, too; `write_records` sorts them by image"
            findings.warn("order", where, message)
        last = record.image_id
        _hear(record, where, gathered, findings, render)


def _hear(record: Record, where: str, gathered: Gathered, findings: Findings, render: Render | None) -> None:
    line = int(where.rpartition(":")[2])
    first = gathered.ids.setdefault(record.id, line)
    if first != line:
        findings.error("ids", where, f"id {record.id!r} is that of line {first}; give each record its own")
    else:
        _check_repeats(record, line, gathered.seen, where, findings)
    _check_task(record, where, findings, render)
    gathered.entries.add(record.image_id)
    for number, media in enumerate(record.media):
        _hear_of_image(record, number, media, where, gathered, findings)
    facts = gathered.images[record.image_id]
    for finding in check_words(record, where, gathered.vocabulary, facts.names):
        findings.add(finding)
    if record.task in _REPORT_TASKS and record.target.text is not None:
        by_rule = "derivation" in record.meta
        said = ReportText(where, record.image_id, record.split, record.target.text, by_rule)
        gathered.reports.setdefault((record.image_id, record.target.text), said)


def _keep_line(text: bytes, where: str, gathered: Gathered) -> None:
    """Keep what a line says, even if it breaks a rule; one that is no JSON object says nothing."""
    try:
        row = json.loads(text)
        gathered.lines[str(row["image_id"])][str(row["id"])] = (int(where.rpartition(":")[2]), digest(row))
    except (ValueError, KeyError, TypeError):
        return


def _check_repeats(record: Record, line: int, seen: dict[int, int], where: str, findings: Findings) -> None:
    row = json.loads(record.to_line())
    del row["id"]
    whole = digest(row)
    short = digest([row[key] for key in ("image_id", "lang", "task", "prompt", "target")])
    if whole in seen:
        message = f"record {record.id!r} says what line {seen[whole]} says under another id; drop one"
        findings.error("repeats", where, message)
    elif short in seen:
        message = f"record {record.id!r} has prompt and target of line {seen[short]}; drop one if it is the same"
        findings.warn("repeats", where, message)
    seen.setdefault(whole, line)
    seen.setdefault(short, line)


def _hear_of_image(
    record: Record, number: int, media: Media, where: str, gathered: Gathered, findings: Findings
) -> None:
    facts = gathered.images.get(media.image_id)
    if facts is None:
        facts = gathered.images[media.image_id] = ImageFacts(media=media, where=where)
        if gathered.indexed:
            message = f"image {media.image_id!r} does not stand in images.jsonl; prepare it again"
            findings.error("index", where, message)
    elif media != facts.media:
        differing = [name for name in Media.model_fields if getattr(media, name) != getattr(facts.media, name)]
        message = f"{', '.join(differing)} of image {media.image_id!r} differ from {facts.where}; correct one of them"
        findings.error("agreement", where, message)
    if media.image_id == record.image_id:
        mine = {patient for _, patient in facts.patients}
        if mine and record.patient_id not in mine:
            message = f"image {media.image_id!r} is of patient {record.patient_id!r}, at {facts.where} of {min(mine)!r}"
            findings.error("agreement", where, f"{message}; correct one of them")
        if record.patient_id not in mine:
            facts.patients[record.source.dataset, record.patient_id] = where
    facts.splits.setdefault(record.split, where)
    facts.hear(record, number, where)


def _check_task(record: Record, where: str, findings: Findings, render: Render | None) -> None:
    if record.task not in NEEDS:
        close = difflib.get_close_matches(record.task, NEEDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(NEEDS)}"
        findings.error("tasks", where, f"unknown task {record.task!r}; {hint}")
    elif render is not None and (problem := render(record)) is not None:
        findings.error("tasks", where, f"task {record.task} cannot be rendered: {problem}")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield f"{path.name}:{number}", text


def _faults(error: ValidationError, model: type[Record] | type[Media]) -> Iterator[str]:
    """Everything wrong with one line, in the words of `data_prep.record`."""
    for fault in error.errors(include_url=False):
        alone = ValidationError.from_exception_data(
            model.__name__,
            [{"type": fault["type"], "loc": fault["loc"], "input": fault["input"], "ctx": fault.get("ctx", {})}],
        )
        yield explained(alone, model)
