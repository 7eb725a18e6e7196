"""Numbers and names in words, said the same way in reports, questions, descriptions and captions.

Directions are said in words that `data_prep.laterality` knows to bind a side.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["about", "among", "choice_of", "form", "is_plural", "listed", "measured", "millilitres", "plural", "ranges",
           "tens", "towards"]  # fmt: skip

# Along R, A, S: how something lies that is further along the axis, or less far
_TOWARDS = (("to the right of", "to the left of"), ("in front of", "behind"), ("above", "below"))
_COMPOUND = re.compile(r"\b(?:and|or)\b")
_NO_PLURAL = ("us", "is", "as", "ss", "ens", "ceps")
_PLURALS = frozenset({"teeth", "feet", "bronchi", "ganglia", "atria", "nuclei", "maxillae", "scapulae"})


def listed(names: Sequence[str], *, last: str = "and") -> str:
    """``a, b and c``; with a comma before the last word where a name has such a word of its own."""
    if len(names) < 2:
        return "".join(names)
    compound = any(_COMPOUND.search(name) for name in names)
    return f"{', '.join(names[:-1])}{',' if compound else ''} {last} {names[-1]}"


def among(names: Sequence[str]) -> str:
    """``the a, the b or the c``."""
    return listed([f"the {name}" for name in names], last="or")


def is_plural(name: str) -> bool:
    """Whether a structure's name speaks of several: "lungs", "vertebrae C1 to C7", "a and b", not "pancreas"."""
    words = name.lower().partition(" of ")[0].split()
    if "and" in words or "vertebrae" in words:
        return True
    last = words[-1] if words else ""
    ends_alike = last.endswith("s") and (last.endswith("omas") or not last.endswith(_NO_PLURAL))
    return ends_alike or last in _PLURALS


def form(name: str, one: str, many: str) -> str:
    """The form of a verb that goes with a name: ``form("lungs", "is", "are")``."""
    return many if is_plural(name) else one


def plural(noun: str) -> str:
    """The plural of an anatomical noun phrase: its head, before "of" or a number, takes the ending if it has none."""
    if is_plural(noun):
        return noun
    head, of, rest = noun.partition(" of ")
    words = head.split()
    if len(words) > 1 and words[-1].isdigit():
        return f"{plural(' '.join(words[:-1]))} {words[-1]}{of}{rest}"
    if head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in tuple("aeiou"):
        head = f"{head[:-1]}ies"
    else:
        head += "s"
    return head + of + rest


def ranges(bounds: Sequence[float], unit: str) -> tuple[str, ...]:
    """``less than 10 mL``, ``10 to 20 mL``, ``more than 20 mL``: one more than there are bounds."""
    middle = [f"{low:g} to {high:g} {unit}" for low, high in pairwise(bounds)]
    return (f"less than {bounds[0]:g} {unit}", *middle, f"more than {bounds[-1]:g} {unit}")


def choice_of(value: float, bounds: Sequence[float]) -> int:
    """Which of the `ranges` holds the value; a bound belongs to the range above it."""
    return sum(int(value >= bound) for bound in bounds)


def about(value: float) -> str:
    """Two digits that count, as people estimate: 0.43, 4.3, 43, 430."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):.{max(digits, 0)}f}"


def millilitres(value: float) -> str:
    """Whole mL, with a decimal where there are few."""
    return f"{round(value)} mL" if value >= 5 else f"{value:.1f} mL"


def measured(value: float, unit: str) -> str:
    """A value with its unit, as it is said: ``67 mL``, ``-31 HU``, ``12 percent``."""
    if unit == "mL":
        return millilitres(value)
    return f"{round(value)} {'percent' if unit == '%' else unit}"


def tens(value: float) -> int:
    """Rounded to tens."""
    return 10 * round(value / 10)


def towards(axis: int, offset: float) -> str:
    """How something lies whose place differs by ``offset`` along R, A or S: "to the left of"."""
    return _TOWARDS[axis][int(offset < 0)]
