"""Numbers and names in words, said the same way in reports, questions, descriptions and captions.

Directions are said in words that `data_prep.laterality` knows to bind a side.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["about", "among", "choice_of", "is_plural", "listed", "millilitres", "plural", "ranges", "tens", "towards"]

# Along R, A, S: how something lies that is further along the axis, or less far
_TOWARDS = (("to the right of", "to the left of"), ("in front of", "behind"), ("above", "below"))


def listed(names: Sequence[str], *, last: str = "and") -> str:
    """``a, b and c``."""
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def among(names: Sequence[str]) -> str:
    """``the a, the b or the c``."""
    return listed([f"the {name}" for name in names], last="or")


def is_plural(name: str) -> bool:
    """Whether a structure's name speaks of several: "lungs", "vertebrae", not "pancreas"."""
    word = name.split()[0 if name.startswith("vertebrae") else -1]
    return word == "vertebrae" or (word.endswith("s") and not word.endswith(("us", "is", "as", "ss", "ens")))


def plural(noun: str) -> str:
    """The plural of an anatomical noun phrase: its head, before any "of" or number, takes the ending."""
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


def tens(value: float) -> int:
    """Rounded to tens."""
    return 10 * round(value / 10)


def towards(axis: int, offset: float) -> str:
    """How something lies whose place differs by ``offset`` along R, A or S: "to the left of"."""
    return _TOWARDS[axis][int(offset < 0)]
