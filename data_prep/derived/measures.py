"""What can be measured of structures in a scan, by name: the evidence that an answer rests on.

The rules measure the truth's masks with it, and `m3d.Scan` those that a model has drawn, so both mean the same.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from data_prep.derived.places import distance_mm, offset_mm
from data_prep.derived.scene import Scene
from data_prep.derived.wording import measured
from data_prep.draft import Measured

__all__ = ["BELOW_TOP", "CLOSER", "DENSER", "EXTENTS", "FORWARD", "HIGHER", "LARGER", "LEFT", "MEASURES",
           "RIGHT", "Asked", "Measure", "evidence_of", "measure", "percent_larger"]  # fmt: skip

Asked = tuple[str, tuple[str, ...]]
"""The name of a measure, and of the structures that it is taken of."""


@dataclass(frozen=True)
class Measure:
    """``of`` takes it of so many structures of a scene, in ``unit``; None where it cannot be known.

    One that ``compares`` has a positive value where its name holds for the first structure beside the second, a
    negative one where it holds for the second. What is said names the one that it holds for: a small language model
    answers with a name that it reads, where it chose by chance between two values, or by a sign.
    """

    num_names: int
    unit: str
    of: Callable[[Scene, Sequence[str]], float | None]
    compares: bool = False

    def said(self, value: float, names: Sequence[str]) -> str:
        """A value of it, taken of ``names``, in words: "24 mL", "left parotid by 12 percent"."""
        if not self.compares:
            return measured(value, self.unit)
        return f"{names[int(value < 0)]} by {measured(abs(value), self.unit)}"


def _extent(axis: int) -> Callable[[Scene, Sequence[str]], float | None]:
    def of(scene: Scene, names: Sequence[str]) -> float | None:
        extent = scene.known[names[0]].extent_mm
        return None if extent is None else extent[axis]

    return of


def _offset(axis: int, sign: int = 1) -> Callable[[Scene, Sequence[str]], float | None]:
    """How much further along R, A or S the first of two lies, or against it."""

    def of(scene: Scene, names: Sequence[str]) -> float | None:
        offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
        return None if offset is None else sign * offset[axis]

    return of


def percent_larger(scene: Scene, names: Sequence[str]) -> float:
    """By how many percent of the larger one two differ in volume; below 0 where the first is smaller."""
    one, other = (scene.known[name].voxels for name in names)
    return 100 * (one - other) / max(one, other)


def _denser(scene: Scene, names: Sequence[str]) -> float | None:
    one, other = (scene.known[name].mean_hu for name in names)
    return None if one is None or other is None else one - other


def _closer(scene: Scene, names: Sequence[str]) -> float | None:
    """By how much the first lies closer to the third than the second does."""
    one, other = (distance_mm(scene.known[name], scene.known[names[2]]) for name in names[:2])
    return None if one is None or other is None else other - one


MEASURES: dict[str, Measure] = {
    "scan length": Measure(0, "mm", lambda scene, names: scene.length_mm),
    "volume": Measure(1, "mL", lambda scene, names: scene.known[names[0]].volume_ml),
    "density": Measure(1, "HU", lambda scene, names: scene.known[names[0]].mean_hu),
    "width": Measure(1, "mm", _extent(0)),
    "depth": Measure(1, "mm", _extent(1)),
    "height": Measure(1, "mm", _extent(2)),
    "below the top": Measure(1, "%", lambda scene, names: scene.percent_down(names[0])),
    "distance": Measure(2, "mm", lambda scene, names: distance_mm(*(scene.known[name] for name in names))),
    "larger": Measure(2, "%", percent_larger, compares=True),
    "denser": Measure(2, "HU", _denser, compares=True),
    "further right": Measure(2, "mm", _offset(0), compares=True),
    "further left": Measure(2, "mm", _offset(0, -1), compares=True),
    "further forward": Measure(2, "mm", _offset(1), compares=True),
    "higher": Measure(2, "mm", _offset(2), compares=True),
    "closer": Measure(3, "mm", _closer, compares=True),  # to the third
}
BELOW_TOP = "below the top"  # a share of the scan's length
LARGER, DENSER, CLOSER = "larger", "denser", "closer"
RIGHT, LEFT, FORWARD, HIGHER = "further right", "further left", "further forward", "higher"
EXTENTS = ("width", "depth", "height")  # along R, A, S


def measure(scene: Scene, name: str, structures: Sequence[str]) -> float | None:
    """Take a measure; None where a structure is not in the scene, or it cannot be known.

    Raises:
        KeyError: There is no such measure.
        ValueError: It is taken of another number of structures.
    """
    one = MEASURES[name]
    if len(structures) != one.num_names:
        raise ValueError(f"{name} is measured of {one.num_names} structures, not of {', '.join(structures) or 'none'}")
    return one.of(scene, structures) if all(structure in scene.known for structure in structures) else None


def evidence_of(scene: Scene, asked: Iterable[Asked]) -> tuple[Measured, ...] | None:
    """What was asked for, measured; None where anything of it is not known, or nothing was asked for."""
    found = []
    for name, structures in asked:
        value = measure(scene, name, structures)
        if value is None:
            return None
        found.append(Measured(name, structures, round(value, 2), MEASURES[name].unit))
    return tuple(found) or None
