"""Answers that measure first: what an answer rests on is drawn and measured before it is given.

::

    left parotid [SEG], right parotid [SEG] larger: left parotid by 12 percent, so left parotid. Answer: A. left parotid

The model writes names, ``[SEG]`` and what is to be measured; the value is written for it, from its own masks
(`m3d.inference.measuring`), or while it learns from the truth's. What follows is said in words before its letter: to
say that at once, a model has to read a value and find an option in one step. Ours; M3D-LaMed answers at once.
Choices and numbers that a small language model learned from image tokens alone were as good without the image.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_prep.derived.measures import MEASURES
from data_prep.record import Evidence
from m3d.tasks.base import Rendered
from m3d.tasks.naming import SEG

__all__ = [
    "ANSWER",
    "NOT_SEEN",
    "Asking",
    "answer_of",
    "asking",
    "lettered",
    "measure_first",
    "value_words",
    "words_of",
]

NOT_SEEN = "not seen"
ANSWER, SO = "Answer:", ", so "
_ASKING = re.compile(rf"(?:^|;)\s*([^;:]*?)\s*\b({'|'.join(map(re.escape, MEASURES))}):$")


@dataclass(frozen=True)
class Asking:
    """What a model has just asked to be measured: ``measure`` of the structures ``names``, its last masks."""

    measure: str
    names: tuple[str, ...]


def value_words(asked: Asking, value: float | None) -> str:
    """What was asked for, as it stands in an answer."""
    return NOT_SEEN if value is None else MEASURES[asked.measure].said(value, asked.names)


def measure_first(said: Rendered, evidence: Sequence[Evidence], *, seen: bool = True) -> Rendered:
    """The answer behind its evidence, in English; where it is not ``seen``, the answer has to do without the values.

    ``given`` has the places of the values, which are not for the model to say.

    Raises:
        ValueError: There is no such measure, or not of so many structures: nothing could measure it at use.
    """
    for one in evidence:
        known = MEASURES.get(one.measure)
        if known is None or (known.num_names, known.unit) != (len(one.names), one.unit):
            raise ValueError(
                f"{one.measure!r} of {len(one.names)} structures in {one.unit} is no measure of ours; "
                "prepare its store again? known: "
                + ", ".join(f"{name} ({each.num_names}, {each.unit})" for name, each in MEASURES.items())
            )
    text, given, masks = "", [], list[str]()
    for number, one in enumerate(evidence):
        names = "".join(f"{', ' if turn else ''}{name} {SEG}" for turn, name in enumerate(one.names))
        text += f"{'; ' if number else ''}{names}{' ' if names else ''}{one.measure}:"
        value = value_words(Asking(one.measure, one.names), one.value if seen else None)
        given.append((len(text), len(text) + 1 + len(value)))
        text += f" {value}"
        masks += one.names
    so = f"{SO}{said.chosen}" if said.chosen else ""
    return replace(said, answer=f"{text}{so}. {ANSWER} {said.answer}", masks=(*masks, *said.masks), given=tuple(given))


def asking(text: str) -> Asking | None:
    """What an unfinished answer asks to be measured at its end, if anything; with the right number of masks."""
    found = _ASKING.search(text)
    if found is None or ANSWER in text:
        return None
    *names, rest = found.group(1).split(SEG)
    said = tuple(name.strip(" ,") for name in names)
    if rest.strip() or len(said) != MEASURES[found.group(2)].num_names or not all(said):
        return None
    return Asking(found.group(2), said)


def answer_of(text: str) -> tuple[str, str]:
    """The evidence that an answer begins with ("" where it has none), and the rest of it.

    Of an answer that was broken off before it was given, the rest is "".
    """
    before, found, after = text.partition(ANSWER)
    first = re.search(rf"(?:{'|'.join(map(re.escape, MEASURES))}):", before)
    if first is None or asking(before[: first.end()]) is None:
        return "", text
    return before.strip().removesuffix("."), after.strip() if found else ""


def lettered(answer: str, evidence: str, prompt: str) -> str:
    """A choice with the letter that its words have in the prompt, where the evidence ends with these words.

    The words decide: they come first, and say what follows from the values. Without them, with words that are no
    option, or those of two, and where no letter was chosen, the answer stays as it is.
    """
    _, found, words = evidence.rpartition(SO)
    if not found or not re.match(r"[A-Z]\.(?:\s|$)", answer):
        return answer
    letters = re.findall(rf"\b([A-Z])\. {re.escape(words)}(?= [A-Z]\. |\s*$)", prompt)
    return f"{letters[0]}. {words}" if len(letters) == 1 else answer


def words_of(evidence: Iterable[Evidence]) -> list[str]:
    """All that evidence says in words."""
    return [word for one in evidence for word in (one.measure, one.unit, *one.names)]
