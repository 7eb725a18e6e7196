"""Every family of derived questions, and what becomes of a question: a closed and an open entry.

A family belongs here only if the answer varies between patients who are asked the same; ``quarters`` says what was left
out for that, and `benchmarks/derived_questions.py` measures how far the usual answer gets on the OpenKBP training
patients.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from data_prep.derived import questions_place as place
from data_prep.derived import questions_scan as scan
from data_prep.derived import questions_size as size
from data_prep.derived.asked import Family, Question
from data_prep.derived.measures import evidence_of
from data_prep.derived.scene import Pose, Scene, draft
from data_prep.draft import Draft

__all__ = ["FAMILIES", "question_drafts", "questions"]

FAMILIES: tuple[tuple[Family, Pose], ...] = (  # each with whether its answers outlast a small turn or shift
    (size.larger, "any"),
    (size.volume, "any"),
    (scan.length, "fixed"),
    (scan.cut, "fixed"),
    (size.comparison, "any"),
    (size.extreme, "any"),
    (size.extent, "fixed"),
    (size.longest, "fixed"),
    (size.asymmetry, "any"),
    (place.higher, "fixed"),
    (place.forward, "fixed"),
    (place.sideways, "fixed"),
    (place.closer, "fixed"),
    (place.distance, "any"),
    (place.height, "fixed"),
    (place.side, "any"),
    (place.touch, "fixed"),
    (scan.edge, "fixed"),
    (scan.missing, "fixed"),
    (scan.present, "fixed"),
    (scan.count, "fixed"),
    (scan.density, "any"),
    (scan.denser, "any"),
)


def questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """What can be asked of a scan."""
    for question, _ in _posed(scene, rng):
        yield question


def _posed(scene: Scene, rng: random.Random) -> Iterator[tuple[Question, Pose]]:
    for family, pose in FAMILIES:
        for question in family(scene, rng):
            yield question, pose


def question_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """Each question twice: with options, and openly."""
    for one, pose in _posed(scene, rng):
        slots = {"question": one.text}
        measured: dict[str, Any] = {"value": one.value, "quantity": one.quantity, "unit": one.unit}
        measured["evidence"] = evidence_of(scene, one.evidence)
        yield draft(
            "vqa.closed",
            pose=pose,
            subtask=one.subtask,
            slots=slots,
            options=one.options,
            choice=one.choice,
            **measured,
        )
        yield draft("vqa.open", pose=pose, subtask=one.subtask, slots=slots, text=one.answer, **measured)
