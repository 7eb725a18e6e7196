"""Boxes and masks by name and by description, and the plain statement that something is certainly not there.

Geometry is given by name: the boxes and masks of a record are those of the prepared labels.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from data_prep.derived.descriptions import by_facts, by_terms
from data_prep.derived.scene import Pose, Scene, draft
from data_prep.draft import Draft

__all__ = ["locating_drafts", "naming_drafts", "segmenting_drafts"]

SEVERAL = 8  # the most masks of one entry
GROUPS = 4  # of so many, where a scan has more
FROM_TERMS = {"description": "terms"}
FROM_FACTS = {"description": "facts"}


def locating_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """``rec.box3d``: where is what is named or described."""
    for name in scene.known:
        yield draft("rec.box3d", pose="any", subtask="name", slots={"object": name}, boxes=(name,))
    for name, text, pose, meta in _described(scene, rng):
        yield draft(
            "rec.box3d", pose=pose, subtask="description", slots={"description": text}, boxes=(name,), meta=meta
        )
    for name in scene.absent:
        yield draft("rec.box3d", pose="any", subtask="name", slots={"object": name}, boxes=())
        words = by_terms(scene, name, rng)
        if words:
            slots = {"description": words}
            yield draft("rec.box3d", pose="any", subtask="description", slots=slots, boxes=(), meta=FROM_TERMS)


def naming_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """``reg``: what is in a box, by name or with a description."""
    for name in scene.known:
        yield draft("reg", pose="any", subtask="name", boxes=(name,))
    for name, text, pose, meta in _described(scene, rng):
        yield draft("reg", pose=pose, subtask="description", slots={"description": text}, boxes=(name,), meta=meta)


def segmenting_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """``seg.sem`` for one, several or none, and ``seg.ref``."""
    for name in scene.known:
        yield draft("seg.sem", pose="any", subtask="single", slots={"object": name}, masks=(name,))
    for names in _groups(list(scene.known), rng):
        yield draft("seg.sem", pose="any", subtask="several", slots={"objects": names}, masks=tuple(names))
    for name, text, pose, meta in _described(scene, rng):
        yield draft("seg.ref", pose=pose, subtask="description", slots={"description": text}, masks=(name,), meta=meta)
    for name in scene.absent:
        yield draft("seg.sem", pose="any", subtask="single", slots={"object": name}, masks=())
        words = by_terms(scene, name, rng)
        if words:
            slots = {"description": words}
            yield draft("seg.ref", pose="any", subtask="description", slots=slots, masks=(), meta=FROM_TERMS)


def _described(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, Pose, dict[str, str]]]:
    """Name, description, its pose and where it comes from."""
    for name in scene.known:
        text = by_terms(scene, name, rng)
        if text:
            yield name, text, "any", FROM_TERMS
    for name, text, pose in by_facts(scene, rng):
        yield name, text, pose, FROM_FACTS


def _groups(names: list[str], rng: random.Random) -> Iterator[list[str]]:
    """All names together; of a long list some groups, drawn."""
    if 1 < len(names) <= SEVERAL:
        yield names
    elif names[1:]:
        for _ in range(GROUPS):
            drawn = set(rng.sample(names, rng.randint(2, SEVERAL)))
            yield [name for name in names if name in drawn]
