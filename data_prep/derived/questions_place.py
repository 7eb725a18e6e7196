"""Questions on where structures lie, asked only where anatomy leaves the answer open.

The brainstem is above the larynx in everybody; which parotid lies higher, or whether the larynx lies left or right of
the brainstem, is told by the scan alone.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from data_prep.boxes import Box
from data_prep.derived import quarters
from data_prep.derived.asked import MOST, Question, named, ranged, yes_or_no
from data_prep.derived.measures import CLOSER, FORWARD, HIGHER, LEFT, RIGHT
from data_prep.derived.places import distance_mm, offset_mm
from data_prep.derived.scene import Scene, some
from data_prep.derived.wording import among, form

__all__ = ["closer", "distance", "forward", "height", "higher", "side", "sideways", "touch"]

NOTABLE_MM = 4.0
FINDINGS = frozenset(
    "abscess aneurysm bleeding calcification cyst edema effusion embolism finding haemorrhage hematoma hemorrhage "
    "infarct infection lesion mass metastasis nodule oedema plaque pneumothorax polyp stone stroke tumor tumour".split()
)


def higher(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The higher one of a left and a right structure."""
    yield from _counterparts(scene, rng, "higher", 2, HIGHER)


def forward(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The one further forward of a left and a right structure."""
    yield from _counterparts(scene, rng, "forward", 1, FORWARD)


def _counterparts(scene: Scene, rng: random.Random, family: str, axis: int, how: str) -> Iterator[Question]:
    open_ = [(noun, names) for noun, names in scene.pairs.items() if not quarters.says(noun, quarters.HEIGHT_KNOWN)]
    for noun, names in some(open_, rng, MOST):
        offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
        if offset is not None and abs(offset[axis]) >= NOTABLE_MM:
            text, answer = f"Which {noun} {form(noun, 'lies', 'lie')} {how}?", names[int(offset[axis] < 0)]
            yield named(family, text, names, answer, rng, [(how, names)])


def sideways(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Which of two structures near the midline lies further to one side."""
    found = []
    for pair in itertools.combinations(scene.whole, 2):
        offset = offset_mm(scene.known[pair[0]], scene.known[pair[1]])
        if offset is not None and abs(offset[0]) >= NOTABLE_MM and _both_in_the_middle(scene, *pair):
            found.append((pair, offset[0]))
    for pair, right_mm in some(found, rng, MOST):
        asked = rng.choice(("left", "right"))
        answer = pair[int((right_mm > 0) != (asked == "right"))]
        names = rng.sample(pair, 2)
        text = f"Which has its centre further to the patient's {asked}, {among(names)}?"
        yield named("sideways", text, names, answer, rng, [({"left": LEFT, "right": RIGHT}[asked], tuple(names))])


def _both_in_the_middle(scene: Scene, first: str, second: str) -> bool:
    if {first, second} <= quarters.SEVEN:
        return any({first, second} == set(pair) for pair in quarters.SIDEWAYS)
    return all(
        scene.known[name].side == "midline" and quarters.says(name, quarters.MIDLINE) for name in (first, second)
    )


def closer(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Which one of a left and a right structure lies closer to one in the middle."""
    found = []
    for (noun, names), middle in itertools.product(scene.pairs.items(), scene.whole):
        fact = scene.known[middle]
        left, right = (distance_mm(scene.known[name], fact) for name in names)
        if fact.side != "midline" or left is None or right is None or abs(left - right) < NOTABLE_MM:
            continue
        fair = middle in quarters.CLOSER if middle in quarters.SEVEN else quarters.says(middle, quarters.MIDLINE)
        if fair:
            found.append((noun, names, middle, names[int(right < left)]))
    for noun, names, middle, answer in some(found, rng, MOST):
        text = f"Which {noun} {form(noun, 'lies', 'lie')} closer to the {middle}?"
        yield named("closer", text, names, answer, rng, [(CLOSER, (*names, middle))])


def distance(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How far apart two centres are."""
    found = []
    for pair, bounds in quarters.DISTANCE_MM.items():
        if set(pair) <= set(scene.whole):
            apart = distance_mm(scene.known[pair[0]], scene.known[pair[1]])
            if apart is not None:
                found.append((pair, bounds, apart))
    for (first, second), bounds, apart in some(found, rng, MOST):
        text = f"How far apart are the centres of the {first} and the {second}?"
        quantity = f"distance between {first} and {second}"
        evidence = "distance", (first, second)
        yield ranged("distance", text, apart, bounds, quantity=quantity, unit="mm", evidence=evidence)


def height(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How far down the scan a structure lies, in percent of its length; it depends on what was scanned."""
    at = {name: percent for name in scene.whole if (percent := scene.percent_down(name)) is not None}
    measured = [name for name in at if name in quarters.HEIGHT_PERCENT]
    others = [name for name in at if name not in quarters.SEVEN]
    for name in [*some(measured, rng, MOST), *some(others, rng, MOST // 2)]:
        text = f"How far below the top of the scan is the centre of the {name}, in percent of the scan's length?"
        bounds = quarters.HEIGHT_PERCENT.get(name, quarters.THIRDS)
        quantity, evidence = f"height of the {name}", ("below the top", (name,))
        yield ranged("height", text, at[name], bounds, quantity=quantity, unit="%", evidence=evidence)


def side(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The side of a finding; an organ's own side is no secret, and neither is one that the name tells."""
    sides = ("left", "right")
    names = [name for name, fact in scene.known.items() if fact.side in sides and set(name.lower().split()) & FINDINGS]
    for name in some([name for name in names if not set(name.split()) & set(sides)], rng, MOST):
        text = f"On which side of the patient's midline {form(name, 'does', 'do')} the {name} lie?"
        yield named("side", text, sides, str(scene.known[name].side), rng)


def touch(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Whether two close structures touch; as many that do as that do not."""
    close = [
        pair
        for pair in itertools.combinations(scene.whole, 2)
        if not set(pair) <= quarters.SEVEN and _within_reach(scene.known[pair[0]].box, scene.known[pair[1]].box)
    ]
    touching = [pair for pair in close if frozenset(pair) in scene.touching] if close else []
    apart = [pair for pair in close if pair not in touching]
    fair = min(len(touching), len(apart), MOST // 2)
    for pair in [*some(touching, rng, fair), *some(apart, rng, fair)]:
        first, second = rng.sample(pair, 2)
        text = f"{form(first, 'Does', 'Do')} the {first} touch the {second}?"
        yield yes_or_no("touch", text, answer=pair in touching)


def _within_reach(one: Box, other: Box, *, gap: float = 2.0) -> bool:
    """Whether two boxes overlap, or nearly so, along every axis."""
    ends = zip(one.lo, one.hi, other.lo, other.hi, strict=True)
    return all(low < high2 + gap and low2 < high + gap for low, high, low2, high2 in ends)
