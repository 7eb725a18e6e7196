"""Questions on the scan: how far it reaches, what it cuts, what is in it, how dense that is.

What is not in it is asked only where labels are complete: a missing contour is no missing organ.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from data_prep.derived import quarters
from data_prep.derived.asked import MOST, Question, named, ranged, yes_or_no
from data_prep.derived.measures import DENSER
from data_prep.derived.scene import Scene, some
from data_prep.derived.wording import among, form, listed

__all__ = ["count", "cut", "denser", "density", "edge", "length", "missing", "present"]

NOTABLE_HU = 5.0
SIMILAR_HU = 40.0  # beyond it anatomy, not the picture, tells the denser one


def length(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How long the scan is."""
    if scene.length_mm is not None:
        text = "How long is the scan from top to bottom?"
        yield ranged("length", text, scene.length_mm, quarters.LENGTH_MM, quantity="length of the scan", unit="mm",
            evidence=("scan length", ()),
        )  # fmt: skip


def cut(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Whether a structure runs out of the scan; elsewhere than in complete labels a contour may just end."""
    if not scene.case.complete:
        return
    cord = "spinal cord"
    out = [name for name, fact in scene.known.items() if not fact.whole]
    fair = min(len(out), len(scene.whole), MOST // 2)
    asked = [cord] if cord in scene.known else [*some(out, rng, fair), *some(list(scene.whole), rng, fair)]
    for name in asked:
        text = f"{form(name, 'Does', 'Do')} the {name} run out of the scan?"
        yield yes_or_no("cut", text, answer=not scene.known[name].whole)


def edge(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """At which end a structure runs out of the scan, where anatomy and field of view leave both open."""
    ends = {"superior": "top", "inferior": "bottom"}
    found = []
    for name, fact in scene.known.items():
        reached = [ends[one] for one in fact.edges if one in ends]
        if len(reached) == 1 and name not in quarters.END_KNOWN and not quarters.says(name, quarters.END_KNOWN_WORDS):
            found.append((name, reached[0]))
    for name, end in some(found, rng, MOST):
        text = f"At which end {form(name, 'does', 'do')} the {name} run out of the scan?"
        yield named("edge", text, tuple(ends.values()), end, rng)


def missing(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Which one of up to four structures is not there."""
    if scene.absent and len(scene.known) > 1:
        answer = rng.choice(scene.absent)
        names = [answer, *rng.sample(list(scene.known), min(3, len(scene.known)))]
        rng.shuffle(names)
        yield named("missing", f"Which is not in this scan: {among(names)}?", names, answer, rng)


def present(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Whether a structure is there; as many that are as that are not."""
    fair = min(len(scene.absent), len(scene.known), MOST // 2)
    for name in [*some(scene.absent, rng, fair), *some(list(scene.known), rng, fair)]:
        text = f"{form(name, 'Is', 'Are')} the {name} in this scan?"
        yield yes_or_no("present", text, answer=name in scene.known)


def count(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How many of four structures are there; each possible number is as likely."""
    most, least = min(4, len(scene.known)), max(0, 4 - len(scene.absent))
    if not scene.absent or least > most:
        return
    number = rng.randint(least, most)
    names = [*rng.sample(list(scene.known), number), *rng.sample(scene.absent, 4 - number)]
    rng.shuffle(names)
    text = f"How many of these are in the scan: {listed([f'the {name}' for name in names])}?"
    yield Question(subtask="count", text=text, options=("0", "1", "2", "3", "4"), choice=number)


def density(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The mean HU."""
    known = {name: fact.mean_hu for name, fact in scene.whole.items() if fact.mean_hu is not None}
    for name in some([name for name in known if name in quarters.MEAN_HU], rng, MOST):
        text, quantity = f"How dense {form(name, 'is', 'are')} the {name} on average, in HU?", f"mean HU of the {name}"
        bounds, evidence = quarters.MEAN_HU[name], ("density", (name,))
        yield ranged("density", text, known[name], bounds, quantity=quantity, unit="HU", evidence=evidence)


def denser(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The denser one of two structures of similar density."""
    known = {name: fact.mean_hu for name, fact in scene.whole.items() if fact.mean_hu is not None}
    found = []
    for first, second in itertools.combinations(known, 2):
        apart = abs(known[first] - known[second])
        if {first, second} <= quarters.SEVEN:
            fair = any({first, second} == set(pair) for pair in quarters.DENSER)
        else:
            fair = apart <= SIMILAR_HU
        if fair and apart >= NOTABLE_HU:
            found.append((first, second))
    for pair in some(found, rng, MOST):
        names = rng.sample(pair, 2)
        answer = max(pair, key=lambda name: known[name])
        text = f"Which is denser on average, in HU, {among(names)}?"
        yield named("denser", text, names, answer, rng, [(DENSER, tuple(names))])
