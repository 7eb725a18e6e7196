"""A report of what masks and header tell: length, volumes, sides compared, relative places, what is cut or missing.

The sentences up to those on what is missing are older than the rest and keep their order and wording, because models
have learned them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.derived import quarters
from data_prep.derived.measures import FORWARD, HIGHER, LARGER, RIGHT, Asked, evidence_of, percent_larger
from data_prep.derived.places import offset_mm
from data_prep.derived.scene import Pose, Scene, draft, pose_of
from data_prep.derived.wording import form, is_plural, listed, millilitres, tens, towards
from data_prep.draft import Draft

__all__ = ["ENDS", "report_drafts", "titled"]

Said = tuple[str, Pose]

NOTABLE_MM = 4.0
MOST_VOLUMES = 6
MOST_COMPARED = 4
MOST_CUT = 6
ENDS = {"superior": "top", "inferior": "bottom", "left": "patient's left", "right": "patient's right",
        "anterior": "front", "posterior": "back"}  # fmt: skip
_ANY: Pose = "any"
_FIXED: Pose = "fixed"


def report_drafts(scene: Scene) -> Iterator[Draft]:
    """One report of a scan."""
    said = [
        _headline(scene),
        *((text, _ANY) for text in _volumes(scene)),
        *((text, _ANY) for text in _larger(scene)),
        *((text, _FIXED) for text in _cut(scene)),
        *((f"There {form(name, 'is', 'are')} no {name} in this scan.", _ANY) for name in scene.absent),
        *_compared(scene),
        *((text, _FIXED) for text in _off_centre(scene)),
    ]
    evidence = evidence_of(scene, _evidence(scene))
    text = " ".join(text for text, _ in said)
    yield draft("report", pose=pose_of(pose for _, pose in said), text=text, evidence=evidence)


def titled(scene: Scene) -> str:
    """What kind of scan it is, with its region where the source says it: "Head and neck CT"."""
    region, modality = str(scene.case.source.get("region") or ""), scene.case.modality
    return f"{region[:1].upper()}{region[1:]} {modality}" if region else modality


def _headline(scene: Scene) -> Said:
    if scene.length_mm is None:
        return f"{titled(scene)}.", _ANY
    return f"{titled(scene)}, {tens(scene.length_mm)} mm from top to bottom.", _FIXED


def _evidence(scene: Scene) -> Iterator[Asked]:
    """All that its sentences rest on, also where a measure turned out too small for a sentence."""
    if scene.length_mm is not None:
        yield "scan length", ()
    yield from (("volume", (name,)) for name in _sizes(scene))
    for names in _uneven(scene):
        yield from ((how, names) for how in (LARGER, HIGHER, FORWARD))
    sideways = [pair for pair in quarters.SIDEWAYS if set(pair) <= set(scene.whole)]
    yield from ((RIGHT, pair) for pair in sideways)


def _volumes(scene: Scene) -> Iterator[str]:
    for name, size in _sizes(scene).items():
        yield f"The {name} {form(name, 'measures', 'measure')} {millilitres(size)}."


def _sizes(scene: Scene) -> dict[str, float]:
    """The volumes of the usual structures; in other regions of the largest ones."""
    sizes = {name: fact.volume_ml for name, fact in scene.whole.items() if fact.volume_ml is not None}
    names = set(quarters.REPORTED)
    if not _usual(scene):
        names = set(sorted(sizes, key=lambda name: sizes[name], reverse=True)[:MOST_VOLUMES])
    return {name: size for name, size in sizes.items() if name in names}


def _cut(scene: Scene) -> Iterator[str]:
    """What runs out of the scan: one by one, or together where it is much."""
    cut = [name for name, fact in scene.known.items() if not fact.whole]
    if _usual(scene) or len(cut) <= MOST_CUT:
        yield from (f"The {name} {form(name, 'runs', 'run')} out of the scan." for name in cut)
        return
    for edge, end in ENDS.items():
        names = [name for name in cut if scene.known[name].edges[:1] == (edge,)]
        if names:
            more = [f"{len(names) - MOST_CUT} more"] if len(names) > MOST_CUT else []
            verb = "run" if len(names) > 1 else form(names[0], "runs", "run")
            those = listed([*(f"the {name}" for name in names[:MOST_CUT]), *more])
            yield f"T{those[1:]} {verb} out of the scan at the {end}."


def _usual(scene: Scene) -> bool:
    """Whether it is a scan of the structures that the usual sentences are about."""
    return not set(quarters.REPORTED).isdisjoint(scene.known)


def _larger(scene: Scene) -> Iterator[str]:
    pairs = _uneven(scene)
    for names in pairs:
        larger = scene.larger(*names)
        if larger:
            yield f"The {larger} {'are the larger ones' if is_plural(larger) else 'is the larger one'}."


def _uneven(scene: Scene) -> list[tuple[str, str]]:
    """Left and right structures, the most different first, when there are many."""
    return sorted(scene.pairs.values(), key=lambda names: abs(percent_larger(scene, names)), reverse=True)[
        :MOST_COMPARED
    ]


def _compared(scene: Scene) -> Iterator[Said]:
    """Left and right: by how much they differ in volume, height and depth."""
    for names in _uneven(scene):
        small, large = sorted(names, key=lambda name: scene.known[name].voxels)
        if scene.larger(*names):
            have, percent = form(small, "has", "have"), round(percent_larger(scene, (large, small)))
            yield f"The {small} {have} {percent} percent less volume than the {large}.", _ANY
        else:
            yield f"The {names[0]} and the {names[1]} are of similar size.", _ANY
        offset = offset_mm(scene.known[names[0]], scene.known[names[1]])
        for axis, how in ((2, "higher"), (1, "further forward")):
            if offset is not None and abs(offset[axis]) >= NOTABLE_MM:
                first, second = names if offset[axis] > 0 else names[::-1]
                lie, apart = form(first, "lies", "lie"), round(abs(offset[axis]))
                yield f"The {first} {lie} {apart} mm {how} than the {second}.", _FIXED


def _off_centre(scene: Scene) -> Iterator[str]:
    """Structures of the midline whose centres lie beside each other."""
    for one, other in quarters.SIDEWAYS:
        if one in scene.whole and other in scene.whole:
            offset = offset_mm(scene.known[one], scene.known[other])
            if offset is not None and abs(offset[0]) >= NOTABLE_MM:
                side = towards(0, offset[0])
                yield f"The centre of the {one} lies {round(abs(offset[0]))} mm {side} that of the {other}."
