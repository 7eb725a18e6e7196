"""The reports that questions are written from: entries of a record file, or a table with an image and its text.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.record import Record
from data_prep.records import read_records

__all__ = ["Report", "read_reports"]

COLUMNS = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One report; ``record`` is the entry that it was read from, where it was one."""

    id: str
    image_id: str
    text: str
    lang: str = "en"
    record: Record | None = None

    @property
    def sha256(self) -> str:
        """Of the text: a report that changed is asked about again."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_reports(path: Path | str) -> list[Report]:
    """The entries of task "report" of a ``.jsonl`` of records, or the rows of a ``.csv`` with the columns image, text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither, a line breaks a rule, or there is no report in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give records (.jsonl) or a table with image,text (.csv)")
    readers = {".jsonl": _from_records, ".csv": _from_table}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: {path.suffix!r} is neither .jsonl (records) nor .csv (columns image,text)")
    reports = list(readers[path.suffix.lower()](path))
    if not reports:
        raise ValueError(f"{path}: no report in it; records of task 'report' or rows with image,text are needed")
    return reports


def _from_records(path: Path) -> Iterator[Report]:
    for record in read_records(path):
        if record.task == "report":
            text = record.target.text or ""
            yield Report(id=record.id, image_id=record.image_id, text=text, lang=record.lang, record=record)


def _from_table(path: Path) -> Iterator[Report]:
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        names = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            raise ValueError(f"{path}:1: no column {missing[0]!r}; the columns image,text are needed")
        try:
            for row in rows:
                image, text = (" ".join((row[names[column]] or "").split()) for column in COLUMNS)
                if not image:
                    raise ValueError(f"{path}:{rows.line_num}: no image; each row names the image of its text")
                seen[image] = seen.get(image, 0) + 1
                name = image if seen[image] == 1 else f"{image}#{seen[image]}"
                yield Report(id=name, image_id=image, text=text)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{rows.line_num}: not a readable table ({error}); save it as UTF-8 CSV") from None
