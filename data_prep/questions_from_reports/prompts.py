"""The conversations with the language model, built from the versioned texts of ``prompts.yaml``.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from data_prep.questions_from_reports.questions import LETTERS, Question

__all__ = ["Message", "Prompts", "load_prompts"]

Message = dict[str, str]
SHIPPED = Path(__file__).with_name("prompts.yaml")
STAGES = ("write", "filter", "check")
SLOTS = {"write": {"report"}, "filter": {"report", "questions"}, "check": {"report", "questions"}}


@dataclass(frozen=True)
class Prompts:
    """The texts of one version; ``sha256`` tells any two apart."""

    version: str
    texts: Mapping[str, Any]
    sha256: str

    def write(self, report: str) -> list[Message]:
        """Ask for the five questions."""
        return self._messages("write", report=report)

    def filter(self, report: str, questions: Sequence[Question]) -> list[Message]:
        """Ask which questions the report supports; the answers are told."""
        shown = (f"{_shown(one)}\nanswer: {LETTERS[one.choice]}. {one.answer}" for one in questions)
        return self._messages("filter", report=report, questions="\n\n".join(shown))

    def check(self, report: str, questions: Sequence[Question]) -> list[Message]:
        """Ask for the answers; they are not told."""
        return self._messages("check", report=report, questions="\n\n".join(map(_shown, questions)))

    def again(self, problem: str) -> Message:
        """Ask for a reply in the right form."""
        return {"role": "user", "content": Template(self.texts["again"]).substitute(problem=problem)}

    def _messages(self, stage: str, *, report: str, questions: str = "") -> list[Message]:
        fenced = report.replace("</report>", "").replace("<report>", "")
        filled = Template(self.texts[stage]["user"]).substitute(report=fenced, questions=questions)
        return [{"role": "system", "content": self.texts[stage]["system"]}, {"role": "user", "content": filled}]


def load_prompts(path: Path | str | None = None) -> Prompts:
    """The shipped texts, or a file of the same form.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A text or a slot is missing.
    """
    path = SHIPPED if path is None else Path(path)
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    _check(texts, path)
    canonical = json.dumps(texts, sort_keys=True, ensure_ascii=False)
    return Prompts(texts["version"], texts, hashlib.sha256(canonical.encode()).hexdigest())


def _check(texts: Any, path: Path) -> None:  # noqa: ANN401 - whatever the file holds
    if not isinstance(texts, dict) or not isinstance(texts.get("version"), str):
        raise ValueError(f"{path}: needs `version: NAME`; start from the shipped prompts.yaml")
    wanted: list[tuple[str, Any, set[str]]] = [("again", texts.get("again"), {"problem"})]
    for stage in STAGES:
        part = texts.get(stage)
        part = part if isinstance(part, dict) else {}
        wanted += [(f"{stage}.system", part.get("system"), set()), (f"{stage}.user", part.get("user"), SLOTS[stage])]
    for name, text, slots in wanted:
        if not isinstance(text, str):
            raise ValueError(f"{path}: {name} is missing; start from the shipped prompts.yaml")
        found = Template(text)
        if not found.is_valid() or set(found.get_identifiers()) != slots:
            needs = ", ".join(f"${slot}" for slot in sorted(slots)) or "no slot"
            raise ValueError(f"{path}: {name} needs {needs}, and $$ where a dollar is meant")


def _shown(question: Question) -> str:
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return f"topic: {question.topic}\nquestion: {question.question}\n{options}"
