"""Questions on how large structures are: by ranges where quartiles were measured, else in comparison.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from data_prep.derived import quarters
from data_prep.derived.asked import MOST, Question, named, ranged
from data_prep.derived.measures import EXTENTS, LARGER, percent_larger
from data_prep.derived.scene import LARGER_BY, Scene, some
from data_prep.derived.wording import among, form, plural

__all__ = ["asymmetry", "comparison", "extent", "extreme", "larger", "longest", "volume"]

COMPARABLE = 1.5  # beyond this ratio anatomy, not the picture, tells which of two structures is larger
IN_REACH = 2.5  # and so with the largest or smallest of four
CLEARLY_LONGER = 1.05
NEARLY_ROUND = 1.25  # beyond it anatomy tells the longest side
_HOW = ("wide", "deep", "tall")
_ALONG = ("left to right", "front to back", "top to bottom")


def larger(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The larger one of a left and a right structure."""
    open_ = [(noun, names) for noun, names in scene.pairs.items() if not quarters.says(noun, quarters.UNEVEN_KNOWN)]
    for noun, names in some(open_, rng, MOST):
        answer = scene.larger(*names)
        if answer:
            text = f"Which {noun} {form(noun, 'is', 'are')} larger?"
            yield named("larger", text, names, answer, rng, [(LARGER, names)])


def comparison(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The larger one of two structures of similar size that are not each other's counterpart."""
    pairs = [pair for pair in itertools.combinations(scene.whole, 2) if _comparable(scene, *pair)]
    for pair in some(pairs, rng, MOST):
        answer = scene.larger(*pair)
        assert answer
        names = rng.sample(pair, 2)
        text = f"Which is larger, {among(names)}?"
        yield named("comparison", text, names, answer, rng, [(LARGER, tuple(names))])


def _comparable(scene: Scene, first: str, second: str) -> bool:
    pair = {first, second}
    if pair <= quarters.SEVEN:
        if not any(pair == set(varied) for varied in quarters.LARGER):
            return False
    elif pair & quarters.OPEN_ENDED or all(quarters.says(name, quarters.SERIES) for name in pair):
        return False
    elif pair in map(set, scene.twins.values()):
        return False
    elif scene.larger(first, second, by=COMPARABLE):
        return False
    return scene.larger(first, second) is not None


def extreme(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The largest and the smallest of four structures that are neighbours in size."""
    for which in ("largest", "smallest"):
        settled = quarters.OPEN_ENDED | quarters.LARGEST_KNOWN
        pool = [name for name in scene.whole if name not in settled and not quarters.says(name, quarters.SERIES)]
        pool.sort(key=lambda name: scene.known[name].voxels, reverse=which == "largest")
        fours = [pool[start : start + 4] for start in range(len(pool) - 3)]
        for four in some([four for four in fours if _stands_out(scene, four)], rng, MOST // 2):
            names = rng.sample(four, 4)
            text, evidence = f"Which is the {which}: {among(names)}?", [("volume", (name,)) for name in names]
            yield named(which, text, names, four[0], rng, evidence)


def _stands_out(scene: Scene, four: list[str]) -> bool:
    """Whether the first differs clearly from the second, but not as clearly as anatomy alone would make it."""
    one, other = (scene.known[name].voxels for name in four[:2])
    return LARGER_BY <= max(one, other) / min(one, other) <= IN_REACH


def volume(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The volume in mL."""
    found = [(name, fact.volume_ml) for name, fact in scene.whole.items() if fact.volume_ml is not None]
    known = dict(found)
    for name, bounds in quarters.VOLUME_ML.items():
        if name in known:
            text, quantity = f"How large {form(name, 'is', 'are')} the {name}?", f"volume of the {name}"
            evidence = "volume", (name,)
            yield ranged("volume", text, known[name], bounds, quantity=quantity, unit="mL", evidence=evidence)


def extent(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The width, depth or height in mm."""
    known = {name: fact.extent_mm for name, fact in scene.whole.items() if fact.extent_mm is not None}
    asked = [(name, axis) for name in known if name in quarters.EXTENT_MM for axis in range(3)]
    for name, axis in some(asked, rng, MOST):
        size, bounds = known[name], quarters.EXTENT_MM[name][axis]
        text = f"How {_HOW[axis]} {form(name, 'is', 'are')} the {name} from {_ALONG[axis]}?"
        quantity = f"extent of the {name}, {_ALONG[axis]}"
        evidence = EXTENTS[axis], (name,)
        yield ranged("extent", text, size[axis], bounds, quantity=quantity, unit="mm", evidence=evidence)


def longest(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The direction of the largest extent, where it is clear but not a matter of course."""
    found = []
    for name, fact in scene.whole.items():
        if fact.extent_mm and name not in quarters.LONGEST_KNOWN and not quarters.says(name, quarters.SERIES):
            _, second, first = sorted(fact.extent_mm)
            if CLEARLY_LONGER <= first / second <= NEARLY_ROUND:
                found.append((name, fact.extent_mm.index(first)))
    for name, axis in some(found, rng, MOST):
        text = f"In which direction {form(name, 'does', 'do')} the {name} extend furthest?"
        yield named("longest", text, _ALONG, _ALONG[axis], rng, [(extent, (name,)) for extent in EXTENTS])


def asymmetry(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """By how many percent a left and a right structure differ in volume."""
    for noun, bounds in quarters.ASYMMETRY_PERCENT.items():
        if noun in scene.pairs:
            text = f"By how many percent of the larger one do the {plural(noun)} differ in volume?"
            percent, quantity = abs(percent_larger(scene, scene.pairs[noun])), f"asymmetry of the {plural(noun)}"
            evidence = LARGER, scene.pairs[noun]
            yield ranged("asymmetry", text, percent, bounds, quantity=quantity, unit="%", evidence=evidence)
