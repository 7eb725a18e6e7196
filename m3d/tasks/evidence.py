"""Answers that measure first: what an answer rests on is drawn and measured before it is given.

::

    left parotid [SEG] volume: 24 mL; right parotid [SEG] volume: 22 mL. Answer: A. left parotid

The model writes names, ``[SEG]`` and what is to be measured; the value is written for it, from its own masks
(`m3d.inference.measuring`), or from the truth while it learns. Ours; M3D-LaMed answers at once. Choices and numbers
that a small language model learned from image tokens alone were as good without the image (MODEL_CARD).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_prep.derived.measures import MEASURES
from data_prep.derived.wording import measured
from data_prep.record import Evidence
from m3d.tasks.base import Rendered
from m3d.tasks.naming import SEG

__all__ = ["NOT_SEEN", "Asking", "answer_of", "asking", "measure_first", "value_words"]

NOT_SEEN = "not seen"
ANSWER = "Answer:"
_ASKING = re.compile(rf"(?:^|;)\s*([^;:]*?)\s*\b({'|'.join(map(re.escape, MEASURES))}):$")


@dataclass(frozen=True)
class Asking:
    """What a model has just asked to be measured: ``measure`` of the structures ``names``, its last masks."""

    measure: str
    names: tuple[str, ...]


def value_words(value: float | None, unit: str) -> str:
    """A measure as it stands in an answer."""
    return NOT_SEEN if value is None else measured(value, unit)


def measure_first(said: Rendered, evidence: Sequence[Evidence], *, seen: bool = True) -> Rendered:
    """The answer behind its evidence; where nothing is ``seen``, it has to do without the values.

    ``given`` has the places of the values, which are not for the model to say.
    """
    text, given, masks = "", [], list[str]()
    for number, one in enumerate(evidence):
        names = "".join(f"{', ' if turn else ''}{name} {SEG}" for turn, name in enumerate(one.names))
        text += f"{'; ' if number else ''}{names}{' ' if names else ''}{one.measure}:"
        value = value_words(one.value if seen else None, one.unit)
        given.append((len(text), len(text) + 1 + len(value)))
        text += f" {value}"
        masks += one.names
    return replace(said, answer=f"{text}. {ANSWER} {said.answer}", masks=(*masks, *said.masks), given=tuple(given))


def asking(text: str) -> Asking | None:
    """What an unfinished answer asks to be measured at its end, if anything; with the right number of masks."""
    found = _ASKING.search(text)
    if found is None:
        return None
    *names, rest = found.group(1).split(SEG)
    said = tuple(name.strip(" ,") for name in names)
    if rest.strip() or len(said) != MEASURES[found.group(2)].num_names or not all(said):
        return None
    return Asking(found.group(2), said)


def answer_of(text: str) -> tuple[str, str]:
    """The evidence that an answer begins with ("" where it has none), and the rest of it."""
    before, found, after = text.partition(ANSWER)
    shown = before.strip()
    if not found or not any(f"{name}:" in shown for name in MEASURES):
        return "", text
    return shown.removesuffix("."), after.strip()


def words_of(evidence: Iterable[Evidence]) -> list[str]:
    """All that evidence says in words."""
    return [word for one in evidence for word in (one.measure, *one.names)]
