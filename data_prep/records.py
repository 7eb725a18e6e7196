"""Files of records: one JSON line an entry, written so that all entries of an image are consecutive lines.

The image-centric view (all that is known of a scan) is then one slice of the file, which `RecordFile` finds without
keeping more than an index in memory. It also finds it in files that are not sorted.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data_prep.atomic import atomic_path
from data_prep.record import Record, RecordError, parse

__all__ = ["ImageEntry", "RecordFile", "check_together", "read_records", "write_records"]


def read_records(path: Path | str) -> Iterator[Record]:
    """Read and check a file, line by line; blank lines are passed over.

    Raises:
        FileNotFoundError: There is none.
        RecordError: A line breaks a rule, or does not go with the lines before it; the message has its number.
    """
    yield from (record for _, _, record in check_together(_lines(Path(path)), Path(path)))


def write_records(path: Path | str, records: Iterable[Record]) -> int:
    """Write records sorted by image, then by id, whole or not at all; their number.

    Raises:
        RecordError: Two have one id, or disagree about an image.
    """
    path = Path(path)
    ordered = sorted(records, key=lambda record: (record.image_id, record.id))
    numbered = ((number, 0, record) for number, record in enumerate(ordered, start=1))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for _, _, record in check_together(numbered, path):
            file.write(record.to_line() + "\n")
    return len(ordered)


@dataclass(frozen=True)
class ImageEntry:
    """One image of a record file: where its lines are, and how many entries it has of each task."""

    image_id: str
    patient_id: str
    split: str
    lines: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)


class RecordFile:
    """The image-centric view of a file: which images there are, and the entries of one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @cached_property
    def images(self) -> dict[str, ImageEntry]:
        """Every image, by its first line; reads and checks the whole file once."""
        found: dict[str, ImageEntry] = {}
        for line, offset, record in check_together(_lines(self.path), self.path):
            entry = found.setdefault(record.image_id, ImageEntry(record.image_id, record.patient_id, record.split))
            entry.lines.append(line)
            entry.offsets.append(offset)
            entry.tasks[record.task] += 1
        return found

    def of(self, image_id: str) -> list[Record]:
        """All entries of an image, in file order.

        Raises:
            KeyError: The file has no such image.
        """
        if image_id not in self.images:
            raise KeyError(f"{self.path} has no image {image_id!r}")
        entry, records = self.images[image_id], []
        with self.path.open("rb") as file:
            for line, offset in zip(entry.lines, entry.offsets, strict=True):
                if file.tell() != offset:
                    file.seek(offset)
                records.append(parse(file.readline(), f"{self.path}:{line}"))
        return records


def check_together(lines: Iterable[tuple[int, int, Record]], path: Path) -> Iterator[tuple[int, int, Record]]:
    """Pass (line, offset, record) on, refusing what no single line can show.

    Raises:
        RecordError: An id is given twice, or two lines disagree about an image.
    """
    ids: dict[str, int] = {}
    images: dict[str, tuple[int, Record]] = {}
    for line, offset, record in lines:
        if record.id in ids:
            raise RecordError(f"{path}:{line}: id {record.id!r} is that of line {ids[record.id]}; each needs its own")
        ids[record.id] = line
        known, first = images.setdefault(record.image_id, (line, record))
        differs = _disagreement(first, record)
        if differs is not None:
            raise RecordError(f"{path}:{line}: {differs} of image {record.image_id!r} differs from line {known}")
        yield line, offset, record


def _disagreement(first: Record, other: Record) -> str | None:
    if first.patient_id != other.patient_id:
        return "patient_id"
    if first.split != other.split:
        return "split"
    one, two = ({media.image_id: media for media in record.media}[record.image_id] for record in (first, other))
    return "media" if one != two else None


def _lines(path: Path) -> Iterator[tuple[int, int, Record]]:
    """Line number, byte offset and record of every line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of records; `m3d data prepare` writes one")
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, offset, parse(text, f"{path}:{number}")
            offset += len(text)
