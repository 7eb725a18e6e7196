"""One question with its options, before it becomes a closed and an open entry.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from data_prep.derived.measures import Asked
from data_prep.derived.scene import Scene
from data_prep.derived.wording import choice_of, measured, ranges

__all__ = ["MOST", "Family", "Question", "named", "ranged", "yes_or_no"]

MOST = 4  # of one family in one scan, so that a scan of a hundred structures does not ask a thousand times


@dataclass(frozen=True, kw_only=True)
class Question:
    """``subtask`` is the family; ``text`` names whatever the options name, so that it can be asked openly too.

    Who is asked openly cannot know the ranges: there the answer is the value, where there is one. ``evidence`` is what
    to measure to know it.
    """

    subtask: str
    text: str
    options: tuple[str, ...]
    choice: int
    value: float | None = None
    quantity: str | None = None
    unit: str | None = None
    evidence: tuple[Asked, ...] = ()

    @property
    def answer(self) -> str:
        """What is said to the open question."""
        if self.value is None or self.unit is None:
            return self.options[self.choice]
        return measured(self.value, self.unit)


Family: TypeAlias = Callable[[Scene, random.Random], Iterator[Question]]


def named(
    subtask: str,
    text: str,
    names: Sequence[str],
    answer: str,
    rng: random.Random,
    evidence: Sequence[Asked] = (),
) -> Question:
    """Names to choose from, in an order that says nothing."""
    options = list(names)
    rng.shuffle(options)
    chosen = options.index(answer)
    return Question(subtask=subtask, text=text, options=tuple(options), choice=chosen, evidence=tuple(evidence))


def ranged(
    subtask: str,
    text: str,
    value: float,
    bounds: Sequence[float],
    *,
    quantity: str,
    unit: str,
    evidence: Asked,
) -> Question:
    """Ranges to choose from, in their own order; the value itself goes along."""
    return Question(
        subtask=subtask,
        text=text,
        options=ranges(bounds, unit),
        choice=choice_of(value, bounds),
        value=round(value, 2),
        quantity=quantity,
        unit=unit,
        evidence=(evidence,),
    )


def yes_or_no(subtask: str, text: str, *, answer: bool) -> Question:
    """Yes comes first, as people say it."""
    return Question(subtask=subtask, text=text, options=("yes", "no"), choice=int(not answer))
