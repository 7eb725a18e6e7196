"""Records derived from a case's masks and header by rule: a report, questions, boxes and masks.

Nothing here is a radiologist's word, and every record says so in ``meta["derivation"]``. A structure that was not
contoured is never called absent; only a case whose labels are complete (a phantom) can say "there is no ...".

Part of m3d-lamed; import through `m3d`.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from data_prep.case import Case
from data_prep.derive import StructureFacts, facts
from data_prep.record import Record

DERIVATION = "masks+header/1"
LARGER_BY = 1.1
VOLUME_QUARTERS_ML: Mapping[str, Sequence[float]] = {
    "mandible": (45, 60, 75),
    "brainstem": (20, 25, 30),
    "right parotid": (16, 22, 30),
    "left parotid": (16, 22, 30),
}
LENGTH_QUARTERS_MM = (180, 240, 300)


def derived_records(case: Case, rng: random.Random, *, split: str = "train") -> list[Record]:
    """Every record that the rules give for a case; ``rng`` orders the options of closed questions."""
    known = facts(case)
    drafts = [*_report(case, known), *_questions(case, known, rng), *_geometry(case, known)]
    return [
        Record(
            id=f"{case.id}/{number:02d}",
            image_id=case.id,
            patient_id=case.patient_id,
            split=split,
            meta={"derivation": DERIVATION},
            **draft,
        )
        for number, draft in enumerate(drafts)
    ]


def scan_length_mm(case: Case) -> float:
    """From the first slice to the last along the body's long axis, in mm."""
    axis = next(i for i, code in enumerate(case.volume.orientation) if code in "SI")
    return case.volume.shape[axis] * case.volume.spacing[axis]


def _larger_parotid(known: Mapping[str, StructureFacts]) -> str | None:
    if not {"left parotid", "right parotid"} <= set(known):
        return None
    left, right = known["left parotid"], known["right parotid"]
    if left.cut or right.cut or left.touches_edge or right.touches_edge:
        return None
    small, large = sorted([left.volume_ml, right.volume_ml])
    if large < LARGER_BY * small:
        return None
    return "left parotid" if left.volume_ml > right.volume_ml else "right parotid"


def _whole(fact: StructureFacts) -> bool:
    return not (fact.cut or fact.touches_edge)


def _report(case: Case, known: Mapping[str, StructureFacts]) -> Iterator[dict[str, Any]]:
    words = [f"Head and neck CT, {10 * round(scan_length_mm(case) / 10)} mm from top to bottom."]
    for name, fact in known.items():
        if name in VOLUME_QUARTERS_ML and _whole(fact):
            words.append(f"The {name} measures {round(fact.volume_ml)} mL.")
    larger = _larger_parotid(known)
    if larger:
        words.append(f"The {larger} is the larger one.")
    words += [f"The {name} runs out of the scan." for name, fact in known.items() if not _whole(fact)]
    if case.complete:
        words += [f"There is no {name} in this scan." for name in case.names.values() if name not in known]
    yield {"task": "report", "target": {"text": " ".join(words)}}


def _closed(subtask: str, question: str, options: Sequence[str], choice: int) -> Iterator[dict[str, Any]]:
    slots = {"question": question}
    yield {
        "task": "vqa.closed",
        "subtask": subtask,
        "slots": slots,
        "target": {"options": list(options), "choice": choice},
    }
    yield {"task": "vqa.open", "subtask": subtask, "slots": slots, "target": {"text": options[choice]}}


def _ranges(bounds: Sequence[float], unit: str) -> list[str]:
    middle = [f"{low:g} to {high:g} {unit}" for low, high in pairwise(bounds)]
    return [f"less than {bounds[0]:g} {unit}", *middle, f"more than {bounds[-1]:g} {unit}"]


def _questions(case: Case, known: Mapping[str, StructureFacts], rng: random.Random) -> Iterator[dict[str, Any]]:
    larger = _larger_parotid(known)
    if larger:
        options = ["left parotid", "right parotid"]
        rng.shuffle(options)
        yield from _closed("larger", "Which parotid is larger?", options, options.index(larger))
    for name, bounds in VOLUME_QUARTERS_ML.items():
        if name in known and _whole(known[name]):
            choice = sum(int(known[name].volume_ml >= bound) for bound in bounds)
            yield from _closed("volume", f"How large is the {name}?", _ranges(bounds, "mL"), choice)
    choice = sum(int(scan_length_mm(case) >= bound) for bound in LENGTH_QUARTERS_MM)
    yield from _closed("length", "How long is the scan from top to bottom?", _ranges(LENGTH_QUARTERS_MM, "mm"), choice)
    if "spinal cord" in known and case.complete:  # elsewhere the contour's end is the observer's choice
        cut = known["spinal cord"].touches_edge
        yield from _closed("cut", "Does the spinal cord run out of the scan?", ["yes", "no"], int(not cut))


def _geometry(case: Case, known: Mapping[str, StructureFacts]) -> Iterator[dict[str, Any]]:
    for name, fact in known.items():
        box = fact.box
        yield {"task": "rec.box3d", "slots": {"object": name}, "target": {"boxes": [box]}}
        yield {"task": "reg", "target": {"boxes": [box]}}
    yield {
        "task": "seg.sem",
        "slots": {"objects": list(known)},
        "target": {"masks": [{"name": name} for name in known]},
    }
    for name in case.names.values() if case.complete else ():
        if name not in known:
            yield {"task": "rec.box3d", "slots": {"object": name}, "target": {"boxes": []}}
            yield {"task": "seg.sem", "slots": {"objects": [name]}, "target": {"masks": []}}
