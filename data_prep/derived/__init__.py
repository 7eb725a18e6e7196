"""Truth that follows from masks and header by rule: facts, and the entries of every task that can be made of them.

Nothing here is a radiologist's word, and every draft says so in ``meta["derivation"]``. A structure that was not
contoured is never called absent; only a case whose labels are complete can say "there is no ...".

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping

from data_prep.case import Case
from data_prep.derived.captions import caption_drafts
from data_prep.derived.facts import StructureFacts, facts, scan_length_mm
from data_prep.derived.geometry import locating_drafts, naming_drafts, segmenting_drafts
from data_prep.derived.questions import FAMILIES, question_drafts
from data_prep.derived.report import report_drafts
from data_prep.derived.scene import DERIVATION, Scene
from data_prep.draft import Draft

__all__ = ["DERIVATION", "FAMILIES", "KINDS", "StructureFacts", "derived_drafts", "facts", "scan_length_mm"]

_WRITERS: Mapping[str, Callable[[Scene, random.Random], Iterable[Draft]]] = {
    "report": lambda scene, rng: report_drafts(scene),
    "vqa": question_drafts,
    "rec": locating_drafts,
    "reg": naming_drafts,
    "seg": segmenting_drafts,
    "retrieval": caption_drafts,
}
KINDS = tuple(_WRITERS)


def derived_drafts(case: Case, rng: random.Random, *, kinds: Collection[str] = KINDS) -> list[Draft]:
    """Every draft of the asked kinds that the rules give for a case.

    A kind gives the same drafts whatever others are asked for; ``rng`` draws options' order, pairs and descriptions.

    Raises:
        ValueError: A kind is not known.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r} of derived truth; known: {', '.join(KINDS)}")
    scene = Scene.of(case)
    seeds = {kind: rng.getrandbits(64) for kind in KINDS}
    return [draft for kind in KINDS if kind in kinds for draft in _WRITERS[kind](scene, random.Random(seeds[kind]))]
