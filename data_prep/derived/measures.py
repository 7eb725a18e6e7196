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

__all__ = ["BELOW_TOP", "CLOSER", "DENSER", "EXTENTS", "LARGER", "MEASURES", "OFFSETS", "Asked", "Measure",
           "evidence_of", "measure", "percent_larger"]  # fmt: skip

Asked = tuple[str, tuple[str, ...]]
"""The name of a measure, and of the structures that it is taken of."""


@dataclass(frozen=True)
class Measure:
    """``of`` takes it of so many structures of a scene, in ``unit``; None where it cannot be known.

    ``compares``: what a positive and a negative value say of the first structure, beside the second. A small language
    model chooses by such a word where it does not by a sign, nor by two numbers side by side. ``flips``: the value has
    the other sign in the mirrored scan.
    """

    num_names: int
    unit: str
    of: Callable[[Scene, Sequence[str]], float | None]
    compares: tuple[str, str] | None = None
    flips: bool = False

    def said(self, value: float) -> str:
        """A value of it in words: "24 mL", "12 percent larger", "3 mm lower"."""
        if self.compares is None:
            return measured(value, self.unit)
        return f"{measured(abs(value), self.unit)} {self.compares[int(value < 0)]}"


def _extent(axis: int) -> Callable[[Scene, Sequence[str]], float | None]:
    def of(scene: Scene, names: Sequence[str]) -> float | None:
        extent = scene.known[names[0]].extent_mm
        return None if extent is None else extent[axis]

    return of


def _offset(axis: int) -> Callable[[Scene, Sequence[str]], float | None]:
    """How much further along R, A or S the first of two lies."""

    def of(scene: Scene, names: Sequence[str]) -> float | None:
        offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
        return None if offset is None else offset[axis]

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
    "compared in size": Measure(2, "%", percent_larger, ("larger", "smaller")),
    "compared in density": Measure(2, "HU", _denser, ("denser", "less dense")),
    "compared from side to side": Measure(2, "mm", _offset(0), ("further right", "further left"), flips=True),
    "compared from back to front": Measure(2, "mm", _offset(1), ("further forward", "further back")),
    "compared in level": Measure(2, "mm", _offset(2), ("higher", "lower")),
    "compared in distance": Measure(3, "mm", _closer, ("closer", "further away")),
}
BELOW_TOP = "below the top"  # a share of the scan's length
LARGER, DENSER, CLOSER = "compared in size", "compared in density", "compared in distance"
EXTENTS = ("width", "depth", "height")  # along R, A, S
OFFSETS = ("compared from side to side", "compared from back to front", "compared in level")  # along R, A, S


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
