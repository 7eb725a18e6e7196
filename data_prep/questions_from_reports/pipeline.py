"""One report's way: five questions are written, filtered by rules and by the model, then answered blind as a check.

After the steps of M3D-VQA (arXiv 2404.00578). Every question that does not come through leaves its stage and reason.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data_prep.questions_from_reports.asking import Asker
from data_prep.questions_from_reports.endpoints import AskedTooMuch
from data_prep.questions_from_reports.filters import fault
from data_prep.questions_from_reports.parse import (
    Unreadable,
    read_answers,
    read_questions,
    read_verdicts,
    sounds_refused,
)
from data_prep.questions_from_reports.prompts import Message, Prompts
from data_prep.questions_from_reports.questions import LETTERS, Question, Rejected
from data_prep.questions_from_reports.reports import Report

__all__ = ["Checked", "Pipeline", "first_fault"]

T = TypeVar("T")
KEPT_OF_A_REPLY = 4000


@dataclass(frozen=True)
class Checked:
    """A question that came through, and how the second pass saw it."""

    question: Question
    check: dict[str, Any]


class _Lost(Exception):
    """The model gave nothing usable at a stage."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The steps with their settings; a report whose model could not be reached raises what `Asker.ask` raises."""

    asker: Asker
    prompts: Prompts
    seed: int = 0
    reasks: int = 2

    async def __call__(self, report: Report) -> tuple[list[Checked], list[Rejected]]:
        """Take a report through all steps."""
        bad = first_fault(report)
        if bad is not None:
            return [], [Rejected(stage="input", reason=bad)]
        try:
            written, rejected = await self._ask("write", report, self.prompts.write(report.text), read_questions)
        except _Lost as error:
            return [], [Rejected(stage="write", reason=str(error))]
        questions = []
        for question in written:
            broken = fault(question)
            if broken is None:
                questions.append(question.shuffled(f"{self.seed}/{report.id}/{question.topic}")[0])
            else:
                rejected.append(Rejected(stage="rules", topic=question.topic, reason=broken, question=question))
        questions = await self._filter(report, questions, rejected)
        return await self._check(report, questions, rejected), rejected

    async def _filter(self, report: Report, questions: list[Question], rejected: list[Rejected]) -> list[Question]:
        """Drop what the model, told the answers, does not find in the report."""
        if not questions:
            return []
        messages = self.prompts.filter(report.text, questions)
        try:
            verdicts = await self._ask("filter", report, messages, read_verdicts)
        except _Lost as error:
            rejected += _all_of(questions, "filter", str(error))
            return []
        kept = []
        for question in questions:
            keep, why = verdicts.get(question.topic, (False, "no verdict on it"))
            if keep:
                kept.append(question)
            else:
                rejected += _all_of([question], "filter", f"not supported: {why or 'no reason given'}")
        return kept

    async def _check(self, report: Report, questions: list[Question], rejected: list[Rejected]) -> list[Checked]:
        """Keep what the model, not told the answers, answers from the report as they were written."""
        if not questions:
            return []
        shown = [question.shuffled(f"{self.seed}/{report.id}/{question.topic}/check") for question in questions]
        turned = [question for question, _ in shown]
        messages = self.prompts.check(report.text, turned)
        try:
            answers = await self._ask("check", report, messages, lambda text: read_answers(text, turned))
        except _Lost as error:
            rejected += _all_of(questions, "check", str(error))
            return []
        kept = []
        for question, (asked, order) in zip(questions, shown, strict=True):
            said = answers.get(asked.topic)
            if said == asked.choice:
                kept.append(Checked(question, {"verdict": "agreed", "order": order, "answer": LETTERS[said]}))
                continue
            reason = "no answer to it" if said is None else f"answered {asked.options[said]!r}, not {asked.answer!r}"
            if said is None and asked.topic in answers:
                reason = "the report does not settle it"
            rejected += _all_of([question], "check", reason)
        return kept

    async def _ask(self, stage: str, report: Report, messages: list[Message], read: Callable[[str], T]) -> T:
        """Ask until the reply can be read; what was wrong is told with each further try."""
        problem = ""
        for attempt in range(self.reasks + 1):
            seed = _seed(self.seed, report.id, stage, attempt)
            try:
                reply = await self.asker.ask(messages, report=report.id, stage=stage, seed=seed)
            except AskedTooMuch as error:
                raise _Lost(str(error)) from None
            if reply.refused is not None:
                raise _Lost(f"refusal: {_short(reply.refused)}")
            try:
                return read(reply.text)
            except Unreadable as error:
                if sounds_refused(reply.text):
                    raise _Lost(f"refusal: {_short(reply.text)}") from None
                problem = str(error)
            said = {"role": "assistant", "content": reply.text[:KEPT_OF_A_REPLY] or "(empty)"}
            messages = [*messages[:2], said, self.prompts.again(problem)]
        raise _Lost(f"broken JSON in all of {self.reasks + 1} replies: {problem}")


def first_fault(report: Report) -> str | None:
    """Why nothing can be asked about a report; None where it can."""
    return None if report.text.strip() else "the report is empty"


def _all_of(questions: Sequence[Question], stage: str, reason: str) -> list[Rejected]:
    return [Rejected(stage=stage, topic=one.topic, reason=reason, question=one) for one in questions]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4]) >> 1


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."
