"""What is right in an answer of words: the number it gives, and the structure it names."""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Sample, mean
from m3d.tasks import TASKS
from m3d.tasks.codecs import Frac3

__all__ = ["NUMBER", "NamesIt", "NumberWithin", "number_in"]

NUMBER = r"(?<![A-Za-z0-9_.])-?\d+(?:\.\d+)?"  # other scripts may stand right before a number, as Chinese does
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MINUS = "\N{MINUS SIGN}"


def number_in(text: str, unit: str) -> float | None:
    """The first number of an answer that has this unit; thousands may have their comma."""
    said = r"(?:%|percent)" if unit == "%" else re.escape(unit)
    plain = _THOUSANDS.sub("", text.replace(_MINUS, "-"))
    found = re.search(rf"({NUMBER})\s*{said}(?![A-Za-z0-9_])", plain)
    return float(found.group(1)) if found else None


class NumberWithin:
    """The share of answers whose number lies within ``share`` of the true one (of 1, where the truth is less).

    Judges records that have a value and a unit; an answer without a number in that unit is wrong.
    """

    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = (0.0,)

    def __init__(self, share: float = 0.2) -> None:
        self.share = share
        self.name = f"number within {share:.0%}"
        self.variant = f"first number in the record's unit, |said - true| <= {share:g} max(|true|, 1)"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """One column: 1 where the number is near, 0 where not, NaN where the record has none."""
        return np.array([[self._right(sample)] for sample in samples], dtype=np.float64).reshape(-1, 1)

    def _right(self, sample: Sample) -> float:
        truth, unit = sample.record.target.value, sample.record.target.unit
        if truth is None or unit is None:
            return float("nan")
        said = number_in(sample.said, unit)
        return float(said is not None and abs(said - truth) <= self.share * max(abs(truth), 1.0))

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean."""
        return mean(sums, counts)


class NamesIt:
    """The share of answers to "what is in this box" that name the structure, in whatever wording of ours."""

    name = "names the structure"
    variant = "the name read from the answer is the reference's, but for case, punctuation and a leading the"
    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = (0.0,)

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """One column of ones and zeros."""
        right = [[float(_named(sample.said) == _named(sample.reference))] for sample in samples]
        return np.array(right, dtype=np.float64).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean."""
        return mean(sums, counts)


def _named(text: str) -> str:
    said = str(TASKS["reg"].parse(text, Frac3()))
    return " ".join(re.findall(r"\w+", said.lower())).removeprefix("the ")
