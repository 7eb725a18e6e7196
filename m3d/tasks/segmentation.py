"""Segmentation by name: every ``[SEG]`` of the answer draws the mask of the name said just before it."""

import re
from collections.abc import Sequence

from data_prep.record import Record
from m3d.tasks.base import Phrases, Rendered
from m3d.tasks.codecs import BoxCodec

SEG = "[SEG]"
_TAIL = re.compile(r"\s+(?:is|lies|at|in|within)(?:\s+(?:at|in))?$", re.IGNORECASE)
_LEAD = re.compile(r"^(?:(?:sure|here|it|this|that|and|is|are|the|a|an|in|scan)\b[\s,:]*)+", re.IGNORECASE)


def join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else list(parts))


def names_before(text: str, marker: str) -> list[str]:
    """What is named just before each marker, "" where nothing is: ``the mandible [SEG] and brainstem [SEG]``."""
    names = []
    for before in text.split(marker)[:-1]:
        clause = re.split(r"[.,;:!?\]\n]", before.strip(" ,;:.\n"))[-1].strip()
        names.append(_TAIL.sub("", _LEAD.sub("", clause)).strip())
    return names


def named_masks(text: str) -> list[str]:
    """The name of each mask that an answer draws, in order."""
    return names_before(text, SEG)


class Segment:
    """``seg.sem``: one or more names in the prompt, ``name [SEG]`` for each that is there."""

    name = "seg.sem"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask for the record's masks; a record without masks says that its object is absent."""
        present = [str(mask["name"]) for mask in record.target.get("masks", ())]
        asked = [str(name) for name in record.slots.get("objects", [record.slots.get("object")])]
        prompt = say(self.name, "prompt", names=join([f"the {name}" for name in asked]))
        absent = [say("absent", "answer", name=name) for name in asked if name not in present]
        drawn = [say(self.name, "answer", masks=join([f"{name} {SEG}" for name in present]))] if present else []
        return Rendered(prompt, " ".join(drawn + absent), tuple(present))

    def parse(self, text: str, codec: BoxCodec) -> list[str]:
        """The names of the masks drawn, in order."""
        return named_masks(text)
