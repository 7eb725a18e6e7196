"""What is judged, a line of ``samples.jsonl``, and what comes of it, a line of ``judge.jsonl``."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3d.bench.judge_words import PROMPT_SHA256

__all__ = ["TEXT_TASKS", "Answer", "Verdict", "read_answers", "verdict_row", "warn_of_others"]

log = logging.getLogger(__name__)
TEXT_TASKS = ("report", "vqa.open", "reg")
SAMPLES, PREDICTIONS = "samples.jsonl", "predictions.jsonl"
_NEEDED = ("id", "sight", "task", "patient_id", "reference")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was answered beside its reference; ``answer`` is "" where there is none, whatever the reason."""

    id: str
    sight: str
    task: str
    patient_id: str
    group: str
    answer: str
    reference: str

    @property
    def name(self) -> tuple[str, str]:
        """What tells two lines of a file apart."""
        return self.id, self.sight

    def key(self, judge: str) -> str:
        """What the verdict depends on: the prompts, the judge and both texts."""
        parts = [PROMPT_SHA256, judge, self.reference, self.answer]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A score, or None for a refusal; tokens are of all ``attempts``, None where the endpoint did not count them."""

    score: float | None
    raw: str = ""
    attempts: int = 0
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


def verdict_row(one: Answer, verdict: Verdict, *, model: str, key: str, source: str) -> dict[str, Any]:
    """A line of ``judge.jsonl``; ``source`` is ``asked``, ``cache`` or ``empty``."""
    return {
        "id": one.id,
        "sight": one.sight,
        "task": one.task,
        "patient_id": one.patient_id,
        "group": one.group,
        "score": verdict.score,
        "refused": verdict.score is None,
        "raw": verdict.raw,
        "model": model,
        "prompt_sha256": PROMPT_SHA256,
        "prompt_tokens": verdict.prompt_tokens,
        "completion_tokens": verdict.completion_tokens,
        "attempts": verdict.attempts,
        "from": source,
        "key": key,
    }


def read_answers(folder: Path, tasks: Sequence[str]) -> list[Answer]:
    """All answers of ``folder`` that have a reference, seeing and blind; there are some of ``tasks``.

    Raises:
        FileNotFoundError: The run is not scored yet.
        ValueError: There are none of ``tasks``, or a line cannot be judged.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `m3d bench score {folder}` first, which writes it")
    found: dict[tuple[str, str], Answer] = {}
    for number, row in _rows(path):
        if not str(row.get("reference") or "").strip():
            continue
        one = _answer(row, f"{path}:{number}")
        if one.name in found:
            raise ValueError(f"{path}:{number}: {one.id} ({one.sight}) stands there twice; score {folder} again")
        found[one.name] = one
    there = sorted({one.task for one in found.values()})
    if not set(there) & set(tasks):
        raise ValueError(f"{path}: no answer of {', '.join(tasks)}; it has {', '.join(there) or 'none at all'}")
    return list(found.values())


def warn_of_others(folder: Path, tasks: Sequence[str], found: Iterable[Answer]) -> None:
    """Say how many answers to questions of ``tasks`` are not among those found."""
    paths = [path for path in (folder / SAMPLES, folder / PREDICTIONS) if path.is_file()]
    rows = (row for path in paths for _, row in _rows(path) if row.get("task") in tasks)
    others = {(row.get("id"), row.get("sight", "seeing")) for row in rows} - {one.name for one in found}
    if others:
        log.warning(
            "%d answers are not judged: %s lacks them or their reference; `m3d bench score %s` writes it again",
            *(len(others), SAMPLES, folder),
        )


def _answer(row: dict[str, Any], where: str) -> Answer:
    missing = [name for name in _NEEDED if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; score the folder again")
    text = str(row.get("text") or "")
    return Answer(
        id=row["id"],
        sight=row["sight"],
        task=row["task"],
        patient_id=row["patient_id"],
        group=str(row.get("group") or ""),
        answer="" if row.get("failure") is not None or not text.strip() else text,
        reference=row["reference"],
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: not a JSON object; remove that line, or write the file again")
            yield number, row
