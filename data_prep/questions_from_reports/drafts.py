"""From written questions to what training takes: drafts of a scan, or records beside the report they came from.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.draft import Draft
from data_prep.questions_from_reports.progress import SCHEMA
from data_prep.record import Prompt, Record, Target

__all__ = ["read_written", "to_drafts", "to_records"]


def read_written(path: Path | str) -> Iterator[dict[str, Any]]:
    """The lines of a ``questions.jsonl``.

    Raises:
        ValueError: A line is of another kind.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or row.get("schema") != SCHEMA:
                raise ValueError(f"{path}:{number}: no written question ({SCHEMA}); `m3d data write-vqa` writes them")
            yield row


def to_drafts(row: Mapping[str, Any]) -> list[Draft]:
    """The closed and the open form of a written question; ``meta`` says by what and from which report it was made."""
    provenance, options = row["provenance"], tuple(row["options"])
    meta = {
        "derivation": provenance["method"],
        "synth": {
            "method": provenance["method"],
            "generator": provenance["generator"],
            "parents": [row["report_id"]],
        },
    }
    asked: dict[str, Any] = {
        "subtask": row["topic"],
        "slots": {"question": row["question"]},
        "lang": row["lang"],
        "text": options[row["choice"]],
        "meta": meta,
    }
    return [
        Draft(task="vqa.closed", template="m3d.vqa.closed", options=options, choice=row["choice"], **asked),
        Draft(task="vqa.open", template="m3d.vqa.open", **asked),
    ]


def to_records(row: Mapping[str, Any], report: Record) -> list[Record]:
    """The same two as records of the image that ``report`` is about."""
    records = []
    for draft in to_drafts(row):
        form = draft.task.removeprefix("vqa.")
        changed: dict[str, Any] = {
            "id": f"{row['id']}/{form}",
            "lang": draft.lang,
            "task": draft.task,
            "subtask": draft.subtask,
            "prompt": Prompt(template=draft.template, slots=dict(draft.slots)),
            "target": Target(text=draft.text, options=draft.options, choice=draft.choice),
            "meta": dict(draft.meta),
        }
        kept: dict[str, Any] = {
            name: getattr(report, name) for name in ("image_id", "patient_id", "split", "source", "media")
        }
        records.append(Record(**kept, **changed))
    return records
