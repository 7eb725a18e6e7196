"""What a structure is, without its name: from the term dictionary, and from facts that only it fulfils in its scan.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_prep.derived import quarters
from data_prep.derived.places import offset_mm
from data_prep.derived.scene import Pose, Scene
from data_prep.derived.wording import about, form, is_plural, plural, towards
from data_prep.terms import Term, find

__all__ = ["by_facts", "by_terms"]

ALIKE = 1.3  # volumes within this ratio are not told apart by words
NOTABLE_MM = 4.0
NEAR_MM = 30.0
ALONG = 0.8  # of the distance, for one word to say the direction


def by_terms(scene: Scene, name: str, rng: random.Random) -> str | None:
    """A description from the dictionary that fits no other structure of the scan; None where there is none."""
    term = _term(name)
    others = [_term(other) for other in scene.known if other != name]
    if term is None or any(other is not None and other.name == term.name for other in others):
        return None
    taken = {text for other in others if other is not None for text in other.descriptions}
    free = [text for text in term.descriptions if text not in taken]
    return rng.choice(free) if free else None


def by_facts(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, Pose]]:
    """Names with descriptions that hold for them alone and their pose; at most one of each kind a structure."""
    for noun in scene.pairs:
        for name, text in _by_size(scene, noun):
            yield name, text, "any"
        for name, text in _by_height(scene, noun):
            yield name, text, "fixed"
    for name, found in _by_place(scene).items():
        yield name, rng.choice(found), "fixed"


def _by_size(scene: Scene, noun: str) -> Iterator[tuple[str, str]]:
    names = scene.pairs[noun]
    larger = scene.larger(*names)
    if larger:
        smaller = next(name for name in names if name != larger)
        both = f"the two groups of {noun}" if is_plural(noun) else f"the two {plural(noun)}"
        yield larger, f"The larger of {both}."
        yield smaller, f"The smaller of {both}."


def _by_height(scene: Scene, noun: str) -> Iterator[tuple[str, str]]:
    names = scene.pairs[noun]
    offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
    for axis, words in ((2, ("higher", "lower")), (1, ("further forward", "further back"))):
        if offset is not None and abs(offset[axis]) >= NOTABLE_MM:
            ordered = names if offset[axis] > 0 else names[::-1]
            for name, word in zip(ordered, words, strict=True):
                yield name, f"The {noun} that {form(noun, 'lies', 'lie')} {word}."


def _by_place(scene: Scene) -> dict[str, list[str]]:
    """What is of its size on a side of another structure, alone; for each at most two such places, the nearest."""
    names = [name for name, fact in scene.known.items() if fact.centroid_mm is not None]
    places = np.array([scene.known[name].centroid_mm for name in names]).reshape(-1, 3)
    alike = _alike(scene, names)
    twins = [set(pair) for pair in scene.twins.values()]
    found: dict[str, list[tuple[float, str]]] = {}
    for anchor, other in enumerate(names):
        offsets = places - places[anchor]  # (structures, R A S)
        for index in np.flatnonzero(_clear(offsets)).tolist() if other in scene.whole else ():
            name, axis = names[index], int(np.abs(offsets[index]).argmax())
            if name not in scene.whole or name in quarters.OPEN_ENDED or {name, other} in twins:
                continue  # "to the right of the left parotid" would say which one it is
            rivals = alike[index] & (offsets[:, axis] * offsets[index, axis] > 0)
            if rivals.sum() == 1:  # itself
                offset, size = float(offsets[index, axis]), scene.known[name].volume_ml or 0.0
                near = "just " if abs(offset) <= NEAR_MM else ""
                words = f"The structure of about {about(size)} mL {near}{towards(axis, offset)} the {other}."
                found.setdefault(name, []).append((abs(offset), words))
    return {name: [words for _, words in sorted(some)[:2]] for name, some in found.items()}


def _clear(offsets: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which offsets are notable and lie along one axis for the most part: ``(N, 3) -> (N,)``."""
    longest = np.abs(offsets).max(axis=1)
    return np.asarray((longest >= NOTABLE_MM) & (longest >= ALONG * np.linalg.norm(offsets, axis=1)))


def _alike(scene: Scene, names: list[str]) -> npt.NDArray[np.bool_]:
    """Which pairs of structures words do not tell apart by size; what is cut may be of any: ``(N, N)``."""
    sizes = np.array([scene.known[name].voxels for name in names], float)
    cut = np.array([name not in scene.whole for name in names], bool)
    ratios = sizes[:, None] / sizes[None]
    return np.asarray((np.maximum(ratios, 1 / ratios) < ALIKE) | cut[None])


@functools.cache
def _term(name: str) -> Term | None:
    try:
        return find(name)
    except ValueError:
        return None
