"""How structures lie to each other: counterparts, offsets between centroids, contact.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from data_prep.case import Case
from data_prep.derived.facts import StructureFacts

__all__ = ["counterparts", "direction", "distance_mm", "offset_mm", "touching"]


def counterparts(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is named on both sides: noun ("kidney") -> names of the left and of the right one."""
    found = {}
    for name in names:
        words = name.split()
        if "left" in words:
            place = words.index("left")
            other = " ".join([*words[:place], "right", *words[place + 1 :]])
            if other in names and len(words) > 1:
                found[" ".join(words[:place] + words[place + 1 :])] = (name, other)
    return found


def offset_mm(one: StructureFacts, other: StructureFacts) -> tuple[float, float, float] | None:
    """From the centroid of ``other`` to that of ``one`` along R, A, S; None where the case is not placed."""
    if one.centroid_mm is None or other.centroid_mm is None:
        return None
    (r, a, s), (r0, a0, s0) = one.centroid_mm, other.centroid_mm
    return r - r0, a - a0, s - s0


def distance_mm(one: StructureFacts, other: StructureFacts) -> float | None:
    """Between the centroids."""
    offset = offset_mm(one, other)
    return None if offset is None else math.hypot(*offset)


def direction(one: StructureFacts, other: StructureFacts, *, share: float = 0.8) -> tuple[int, float] | None:
    """The axis (0 R, 1 A, 2 S) along which ``one`` lies off ``other``, and by how many mm.

    None where no axis makes up ``share`` of the distance, or the case is not placed.
    """
    offset = offset_mm(one, other)
    if offset is None or not any(offset):
        return None
    axis = max(range(3), key=lambda index: abs(offset[index]))
    return (axis, offset[axis]) if abs(offset[axis]) >= share * math.hypot(*offset) else None


def touching(case: Case) -> frozenset[frozenset[str]]:
    """Pairs of names that share a voxel (in two layers) or the face of one."""
    layers = case.layers
    pairs: set[tuple[int, int]] = set()
    for first, second in itertools.product(range(len(layers)), repeat=2):
        if first < second:
            pairs |= _met(layers[first], layers[second])
        for axis in range(3):
            one, other = (np.moveaxis(layers[index], axis, 0) for index in (first, second))
            pairs |= _met(one[:-1], other[1:])
    names = case.names
    return frozenset(frozenset((names[low], names[high])) for low, high in pairs)


def _met(one: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> set[tuple[int, int]]:
    """Pairs of different labels that lie on the same place of two arrays."""
    found: set[tuple[int, int]] = set()
    for plane, across in zip(one, other, strict=True):
        both = (plane != across) & (plane != 0) & (across != 0)
        if both.any():
            found |= _unique(zip(plane[both].tolist(), across[both].tolist(), strict=True))
    return found


def _unique(pairs: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in pairs}
