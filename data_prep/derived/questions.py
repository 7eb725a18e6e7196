"""Every family of derived questions, and what becomes of a question: a closed and an open entry.

A family belongs here only if the answer varies between patients who are asked the same: on the OpenKBP training
patients the usual answer to a question is right in less than three of four (``quarters`` says what was left out).

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from data_prep.derived import questions_place as place
from data_prep.derived import questions_scan as scan
from data_prep.derived import questions_size as size
from data_prep.derived.asked import Family, Question
from data_prep.derived.scene import Scene, draft
from data_prep.draft import Draft

__all__ = ["FAMILIES", "question_drafts", "questions"]

FAMILIES: tuple[Family, ...] = (
    size.larger,
    size.volume,
    scan.length,
    scan.cut,
    size.comparison,
    size.extreme,
    size.extent,
    size.longest,
    size.asymmetry,
    place.higher,
    place.forward,
    place.sideways,
    place.closer,
    place.distance,
    place.height,
    place.side,
    place.touch,
    scan.edge,
    scan.missing,
    scan.present,
    scan.count,
    scan.density,
    scan.denser,
)


def questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """What can be asked of a scan."""
    for family in FAMILIES:
        yield from family(scene, rng)


def question_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """Each question twice: with options, and openly."""
    for one in questions(scene, rng):
        slots = {"question": one.text}
        yield draft("vqa.closed", subtask=one.subtask, slots=slots, options=one.options, choice=one.choice)
        yield draft(
            "vqa.open",
            subtask=one.subtask,
            slots=slots,
            text=one.options[one.choice],
            value=one.value,
            quantity=one.quantity,
            unit=one.unit,
        )
