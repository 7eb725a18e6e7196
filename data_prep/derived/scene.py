"""What the rules know of a case: its facts, worked out once, and the choices that they are allowed to make of them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

from data_prep.case import Case
from data_prep.derived.facts import StructureFacts, facts, scan_length_mm
from data_prep.derived.places import counterparts, touching
from data_prep.draft import Draft
from data_prep.volume import closest_axes

__all__ = ["DERIVATION", "LARGER_BY", "Pose", "Scene", "draft", "pose_of", "some"]

DERIVATION = "masks+header/6"
Pose: TypeAlias = Literal["any", "fixed"]
"""Whether a statement stays true when the patient is turned or moved in the scan a little: "fixed" where it does not.

Sizes, densities and distances of whole structures do; what lies higher, how far something reaches along an axis, and
what the field of view cuts or leaves out does not.
"""
LARGER_BY = 1.1
_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Scene:
    """A case and its facts. ``whole`` are the structures of which nothing lies outside the scan."""

    case: Case
    known: dict[str, StructureFacts]

    @classmethod
    def of(cls, case: Case) -> Scene:
        """Work out the facts."""
        return cls(case, facts(case))

    @cached_property
    def whole(self) -> dict[str, StructureFacts]:
        """Structures that neither a crop nor the scan's edge has cut, as far as the labels tell."""
        return {name: fact for name, fact in self.known.items() if fact.whole}

    @cached_property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """What is there on both sides and whole: noun -> names of the left and of the right one.

        Not what is numbered: "the larger of the two ribs 12" is no English.
        """
        return {noun: names for noun, names in self.twins.items() if not noun[-1].isdigit()}

    @cached_property
    def twins(self) -> dict[str, tuple[str, str]]:
        """The `pairs` with the numbered ones, whose names tell as much about each other."""
        return counterparts(list(self.whole))

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """Names that are certainly not in the scan; none where the labels are not complete."""
        return tuple(n for n in self.case.names.values() if n not in self.known) if self.case.complete else ()

    @cached_property
    def touching(self) -> frozenset[frozenset[str]]:
        """Pairs of structures that share a voxel or the face of one."""
        return touching(self.case)

    @cached_property
    def length_mm(self) -> float | None:
        """How long the scan is along the body."""
        return scan_length_mm(self.case) if self.case.placed else None

    def percent_down(self, name: str) -> float | None:
        """How far below the top of the scan a centroid lies, in percent of the scan's length."""
        at, volume = self.known[name].centroid_mm, self.case.volume
        if at is None:
            return None
        axis, sign = next((i, s) for i, (patient, s) in enumerate(closest_axes(volume.affine)) if patient == 2)
        part = (float(volume.to_voxel([at])[0, axis]) + 0.5) / volume.shape[axis]
        return 100 * (1 - part if sign > 0 else part)

    def larger(self, first: str, second: str, *, by: float = LARGER_BY) -> str | None:
        """The clearly larger one of two; voxels of one scan are of one size, so this needs no spacing."""
        one, other = self.known[first].voxels, self.known[second].voxels
        if max(one, other) < by * min(one, other):
            return None
        return first if one > other else second


def draft(task: str, *, pose: Pose, meta: Mapping[str, Any] | None = None, **more: Any) -> Draft:  # noqa: ANN401 (the fields of a Draft)
    """A draft that says that it was derived, and whether the patient may be moved under it."""
    fixed = {"pose": pose} if pose == "fixed" else {}
    return Draft(task=task, template=f"m3d.{task}", meta={"derivation": DERIVATION, **(meta or {}), **fixed}, **more)


def pose_of(poses: Iterable[Pose]) -> Pose:
    """That of a text of several statements: fixed if any of them is."""
    return "fixed" if "fixed" in set(poses) else "any"


def some(items: Sequence[_Item], rng: random.Random, most: int) -> list[_Item]:
    """At most so many of the items, drawn, in their own order."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in sorted(rng.sample(range(len(items)), most))]
