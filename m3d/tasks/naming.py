"""What is named in an answer: every ``[SEG]`` and every box belongs to the name said before it.

Our own wordings, in every language, are known by heart (`m3d.tasks.wordings`); what a model says in words of its own is
read by rule, in English.
"""

import functools
import re
from collections.abc import Sequence

from m3d.tasks.wordings import inverse, join_with, languages, templates

SEG = "[SEG]"
_PAUSE = "，、；："  # noqa: RUF001
_STOP = "。！？"  # noqa: RUF001
_SENTENCE = re.compile(rf"(?<=[.!?])\s+|[{_STOP}\]>\n]")
_CLAUSE = re.compile(rf"[.,;:!?\]>\n{_PAUSE}{_STOP}]")
_EDGE = f" ,;:.\n{_PAUSE}"
_TAIL = re.compile(r"\s+(?:is|lies|at|in|within)(?:\s+(?:at|in))?$", re.IGNORECASE)
_LEAD = re.compile(r"^(?:(?:sure|here|it|this|that|and|is|are|the|a|an|in|scan)\b[\s,:]*)+", re.IGNORECASE)
_SPOKEN = {"masks": ("seg.sem", "seg.ref"), "box": ("rec.box3d", "rec.box3d.description")}


def join(parts: Sequence[str], *, comma: str = ", ", last: str = " and ") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return join_with(list(parts), comma=comma, last=last)


def names_before(text: str, marker: str) -> list[str]:
    """What is named just before each marker, "" where nothing is: ``the mandible [SEG] and brainstem [SEG]``.

    A name may hold any words, but no comma, colon or full stop.
    """
    return [_name_in(before) for before in text.split(marker)[:-1]]


def named_masks(text: str) -> list[str]:
    """The name of each mask that an answer draws, in order."""
    return names_before(text, SEG)


def _name_in(before: str) -> str:
    sentence = _SENTENCE.split(before.rstrip(_EDGE))[-1].strip()
    for pattern in _leads():
        found = pattern.fullmatch(sentence)
        name = found.groupdict().get("name", "").strip() if found else None
        if name is not None and not _CLAUSE.search(name):
            return name
    clause = _CLAUSE.split(sentence)[-1].strip()
    for word in _conjunctions():
        clause = clause.removeprefix(word).strip()
    return _TAIL.sub("", _LEAD.sub("", clause)).strip()


@functools.cache
def _conjunctions() -> tuple[str, ...]:
    """What stands before the last of several names; whole words only, where words have spaces."""
    ands = (str(templates(lang)["list"]["and"]).lstrip() for lang in languages())
    return tuple(word for word in ands if word)


@functools.cache
def _leads() -> tuple[re.Pattern[str], ...]:
    """What our answers say before a mask or a box, the longest first; the name, if it is said there, is a group."""
    found = set()
    for slot, wordings in _SPOKEN.items():
        for variant in (one for lang in languages() for task in wordings for one in templates(lang)[task]["answer"]):
            before = _SENTENCE.split(variant.partition("{" + slot + "}")[0].lstrip())[-1]
            if slot == "masks":
                before += "{name}"
            before = before.rstrip(_EDGE)
            if before not in ("", "{name}"):
                found.add(before)
    longest = sorted(found, key=lambda lead: (-len(lead), lead))
    return tuple(re.compile(inverse(lead), re.IGNORECASE) for lead in longest)
