"""A multiple-choice question of one of the five topics of M3D-VQA, and what is kept of one that was turned down.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["LETTERS", "TOPICS", "Question", "Rejected"]

TOPICS: Mapping[str, int] = {"plane": 1, "phase": 2, "organ": 3, "abnormality": 4, "location": 5}
"""The topics, with the number that the published tables have in "Question Type"."""
LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Four options, one of them true."""

    topic: str
    question: str
    options: tuple[str, ...]
    choice: int

    @property
    def answer(self) -> str:
        """The true option."""
        return self.options[self.choice]

    def shuffled(self, seed: str) -> tuple[Question, list[int]]:
        """The same question with its options in an order drawn by ``seed``, and that order."""
        order = list(range(len(self.options)))
        random.Random(seed).shuffle(order)
        options = tuple(self.options[index] for index in order)
        return replace(self, options=options, choice=order.index(self.choice)), order

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "options": list(self.options)}


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A question, a topic or a whole report (``topic`` None) that gave nothing, with the stage and the reason."""

    stage: str
    reason: str
    topic: str | None = None
    question: Question | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        written = None if self.question is None else self.question.to_dict()
        return {"topic": self.topic, "stage": self.stage, "reason": self.reason, "question": written}
