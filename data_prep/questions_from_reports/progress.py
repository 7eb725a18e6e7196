"""The folder of a job: what is finished, what was asked, and the files that are made of it.

``progress.jsonl`` holds a line for each finished report and is all that a rerun needs; ``ledger.jsonl`` a line for each
call; ``settings.json`` what the answers depend on. ``questions.jsonl`` and ``rejects.jsonl`` are made from the
progress, in the order of the reports, so they are the same however often the job was stopped.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_prep.atomic import atomic_path
from data_prep.questions_from_reports.ledger import AppendLog, Spending
from data_prep.questions_from_reports.questions import TOPICS, Question, Rejected
from data_prep.questions_from_reports.reports import Report

__all__ = ["QUESTIONS", "REJECTS", "SCHEMA", "Folder", "Summary", "export", "question_row"]

SCHEMA = "m3d.written-question/1"
QUESTIONS, REJECTS, PROGRESS, LEDGER, SETTINGS = (
    "questions.jsonl", "rejects.jsonl", "progress.jsonl", "ledger.jsonl", "settings.json",
)  # fmt: skip


@dataclass
class Summary:
    """What a folder holds now; ``unfinished`` names the reports that a rerun will ask again, with the reason."""

    reports: int = 0
    finished: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    unfinished: dict[str, str] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)

    def count(self, row: Mapping[str, Any]) -> None:
        """Add a finished report."""
        self.finished += 1
        self.kept.update(question["topic"] for question in row["questions"])
        self.rejected.update(reject["stage"] for reject in row["rejects"])


class Folder:
    """The open files of a job. A half-written last line is dropped when they are opened."""

    def __init__(self, root: Path, *, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.root = root
        self.progress = AppendLog(root / PROGRESS)
        try:
            self._agree(settings, restart)
            self.ledger = AppendLog(root / LEDGER)
        except BaseException:
            self.progress.close()
            raise
        self._done = {row["report_id"]: row for row in self.progress.rows}

    def _agree(self, settings: Mapping[str, Any], restart: bool) -> None:
        """Questions of two models or wordings are not mixed in one file."""
        path = self.root / SETTINGS
        if restart:
            self.progress.clear()
        elif self.progress.rows:
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            other = [name for name in settings if before.get(name) != settings[name]]
            if other:
                was, now = before.get(other[0]), settings[other[0]]
                raise ValueError(
                    f"{path}: {other[0]} was {was!r} and is now {now!r}; use another --out, or --force to start over"
                )
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")

    def finished(self, report: Report) -> dict[str, Any] | None:
        """What came of a report; None where it, or its present text, was not asked about yet."""
        row = self._done.get(report.id)
        return row if row is not None and row["sha256"] == report.sha256 else None

    def finish(self, report: Report, questions: Sequence[Mapping[str, Any]], rejected: Sequence[Rejected]) -> None:
        """Keep what came of a report, for good."""
        row = {
            "report_id": report.id,
            "image_id": report.image_id,
            "sha256": report.sha256,
            "questions": list(questions),
            "rejects": [reject_row(report, one) for one in rejected],
        }
        self.progress.append(row)
        self._done[report.id] = row

    def close(self) -> None:
        """Let go of the files."""
        self.progress.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def question_row(report: Report, question: Question, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A line of ``questions.jsonl``."""
    return {
        "schema": SCHEMA,
        "id": f"{report.id}/{question.topic}",
        "report_id": report.id,
        "image_id": report.image_id,
        "lang": report.lang,
        "topic": question.topic,
        "question_type": TOPICS[question.topic],
        "question": question.question,
        "options": list(question.options),
        "choice": question.choice,
        "provenance": dict(provenance),
    }


def reject_row(report: Report, rejected: Rejected) -> dict[str, Any]:
    """A line of ``rejects.jsonl``."""
    return {"report_id": report.id, "image_id": report.image_id, **rejected.to_dict()}


def export(root: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``questions.jsonl`` and ``rejects.jsonl`` of finished reports, each whole or not at all."""
    kept = list(rows)
    for name, key in ((QUESTIONS, "questions"), (REJECTS, "rejects")):
        with atomic_path(root / name) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in _lines(kept, key))


def _lines(rows: Iterable[Mapping[str, Any]], key: str) -> Iterator[str]:
    for row in rows:
        yield from (json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in row[key])
