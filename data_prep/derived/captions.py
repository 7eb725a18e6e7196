"""Captions that tell one scan from others: its unusual sizes, proportions, offsets and what it cuts, with numbers.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from data_prep.derived import quarters
from data_prep.derived.places import direction, offset_mm
from data_prep.derived.report import ENDS, titled
from data_prep.derived.scene import Pose, Scene, draft, pose_of
from data_prep.derived.wording import choice_of, form, listed, millilitres, towards
from data_prep.draft import Draft

__all__ = ["caption_drafts"]

Told = tuple[int, str, Pose]  # how much it sets a scan apart (2 rare, 1 its own, 0 usual), the sentence, its pose

MOST = 3
NOTABLE_MM = 6.0
UNEVEN = 1.25
_SIZES = ("small", "", "", "large")


def caption_drafts(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """One caption of two to four sentences; none where there is nothing to tell."""
    told = [*_sizes(scene), *_sides(scene), *_proportions(scene, rng), *_offsets(scene, rng), *_field(scene)]
    rng.shuffle(told)
    told.sort(key=lambda one: one[0], reverse=True)
    if scene.known and not told:
        names = [f"the {name}" for name in list(scene.known)[:MOST]]
        told = [(0, f"What is labelled in it is {listed(names)}.", "fixed")]
    if told:
        said = [_opening(scene), *told[:MOST]]
        yield draft("retrieval", pose=pose_of(pose for *_, pose in said), text=" ".join(text for _, text, _ in said))


def _opening(scene: Scene) -> Told:
    if scene.length_mm is None:
        return 0, f"{titled(scene)}.", "any"
    return 0, f"{titled(scene)} of {round(scene.length_mm)} mm from top to bottom.", "fixed"


def _sizes(scene: Scene) -> Iterator[Told]:
    """Volumes of known spread; those of the outer quarters set a scan apart."""
    for name, bounds in quarters.VOLUME_ML.items():
        size = scene.whole[name].volume_ml if name in scene.whole else None
        if size is not None:
            word = _SIZES[choice_of(size, bounds)]
            if word:
                yield 1, f"The {name} {form(name, 'is', 'are')} {word} with {millilitres(size)}.", "any"
            else:
                yield 0, f"The {name} {form(name, 'measures', 'measure')} {millilitres(size)}.", "any"


def _sides(scene: Scene) -> Iterator[Told]:
    """Left and right structures of unequal size or height."""
    for names in scene.pairs.values():
        larger = scene.larger(*names, by=UNEVEN)
        if larger:
            smaller = next(name for name in names if name != larger)
            ratio = scene.known[larger].voxels / scene.known[smaller].voxels
            yield 1, _times(larger, smaller, ratio), "any"
        offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
        if offset is not None and abs(offset[2]) >= NOTABLE_MM:
            first, second = names if offset[2] > 0 else names[::-1]
            lie = form(first, "lies", "lie")
            yield 1, f"The {first} {lie} {round(abs(offset[2]))} mm higher than the {second}.", "fixed"


def _proportions(scene: Scene, rng: random.Random) -> Iterator[Told]:
    """How much larger one structure is than another, for two pairs of whole ones."""
    names = [name for name in scene.whole if name not in quarters.OPEN_ENDED]
    for _ in range(min(2, len(names) // 2)):
        small, large = sorted(rng.sample(names, 2), key=lambda name: scene.known[name].voxels)
        ratio = scene.known[large].voxels / scene.known[small].voxels
        yield 0, _times(large, small, ratio), "any"


def _times(large: str, small: str, ratio: float) -> str:
    return f"The {large} {form(large, 'is', 'are')} {ratio:.2f} times as large as the {small}."


def _offsets(scene: Scene, rng: random.Random) -> Iterator[Told]:
    """How one centre lies to another, for two pairs of whole structures."""
    names = list(scene.whole)
    for _ in range(min(2, len(names) // 2)):
        one, other = rng.sample(names, 2)
        place = direction(scene.known[one], scene.known[other])
        if place is not None and abs(place[1]) >= NOTABLE_MM:
            axis, offset = place
            how = f"{round(abs(offset))} mm {towards(axis, offset)}"
            yield 0, f"The centre of the {one} lies {how} that of the {other}.", "fixed"


def _field(scene: Scene) -> Iterator[Told]:
    """What runs out of the scan, and where; what is certainly missing."""
    ends: dict[str, list[str]] = {}
    for name, fact in scene.known.items():
        for edge in fact.edges[:1]:
            ends.setdefault(edge, []).append(name)
    for end, names in ends.items():
        verb = "run" if len(names) > 1 else form(names[0], "runs", "run")
        those = listed([f"the {name}" for name in names[:4]])
        yield 1, f"T{those[1:]} {verb} out of the scan at the {ENDS[end]}.", "fixed"
    if scene.absent:
        yield 2, f"It shows no {listed(scene.absent[:4], last='and no')}.", "any"
