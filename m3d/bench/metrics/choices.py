"""How often closed questions are answered rightly: by the option that is read, by the likeliest, and as released."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample, mean
from m3d.bench.published import says_letter
from m3d.tasks.vqa import LETTERS

__all__ = ["Accuracy", "LetterDot", "LikelihoodAccuracy", "Unparsed", "chance", "choice_metrics"]


class _OfChoices:
    """A mean over questions; a sample that has no right option is not judged."""

    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The share."""
        return mean(sums, counts)


class Accuracy(_OfChoices):
    """The share of answers whose option, as `m3d.tasks` reads it, is the right one; none read is wrong."""

    name = "accuracy"
    variant = "option read from the answer; none read is wrong"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """1 where the option is right, ``(n, 1)``."""
        return _rows(samples, lambda sample, right: sample.failure is None and sample.choice == right)


class Unparsed(_OfChoices):
    """The share of answers that choose nothing."""

    name = "unparsed"
    variant = "share of answers in which no option is read"
    better: Literal["higher", "lower"] = "lower"
    worst: tuple[float, ...] | None = (1.0,)

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """1 where no option was read, ``(n, 1)``."""
        return _rows(samples, lambda sample, _: sample.failure is not None or sample.choice is None)


class LikelihoodAccuracy(_OfChoices):
    """The share of questions whose right option is the likeliest, by the sum of the log probabilities of its tokens.

    Among n equally likely options the right one counts 1/n. A sample without likelihoods is not judged; a failure is
    wrong, unless no answer has likelihoods: then the system gives none.
    """

    name = "accuracy by likelihood"
    variant = "likeliest option, by the summed log probabilities of its tokens; among n equals 1/n"
    worst: tuple[float, ...] | None = None  # which is 0 only where the others have a value

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The share of the right one among the likeliest, ``(n, 1)``."""
        answered = [sample for sample in samples if sample.failure is None]
        if answered and not any(sample.likelihoods for sample in answered):
            return np.full((len(samples), 1), np.nan)
        return _rows(samples, _share_of_likeliest)


class LetterDot(_OfChoices):
    """The released accuracy: see `m3d.bench.published.says_letter`.

    A question whose ``reference`` has no such letter, as those of yes and no, was asked without and is not judged.
    """

    name = "letter-dot accuracy"
    variant = 'released: "<letter>." stands anywhere in the answer'
    worst: tuple[float, ...] | None = None  # a failure is wrong only where there is a letter to say

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """1 where the letter of the right option stands in the answer, ``(n, 1)``."""
        return _rows(samples, _says_the_letter)


def choice_metrics(protocol: ProtocolName) -> tuple[Metric, ...]:
    """What closed questions are judged by."""
    return (LetterDot(),) if protocol == "m3d" else (Accuracy(), LikelihoodAccuracy(), Unparsed())


def chance(samples: Sequence[Sample]) -> float | None:
    """How often blind guessing is right: the mean of 1 by the number of options; None where none have options."""
    shares = [1 / len(sample.options) for sample in samples if sample.options]
    return statistics.fmean(shares) if shares else None


def _rows(samples: Sequence[Sample], value: Callable[[Sample, int], float]) -> Floats:
    rows = [math.nan if sample.true_choice is None else value(sample, sample.true_choice) for sample in samples]
    return np.array(rows, dtype=np.float64).reshape(-1, 1)


def _share_of_likeliest(sample: Sample, right: int) -> float:
    if sample.failure is not None:
        return 0.0
    if not sample.likelihoods:
        return math.nan
    if len(sample.likelihoods) != len(sample.options):
        raise ValueError(
            f"{sample.record.id}: {len(sample.likelihoods)} likelihoods for {len(sample.options)} options; "
            "give one an option, in their order"
        )
    best = max(sample.likelihoods)
    likeliest = [number for number, one in enumerate(sample.likelihoods) if one == best]
    return (right in likeliest) / len(likeliest)


def _says_the_letter(sample: Sample, right: int) -> float:
    if right >= len(LETTERS):
        raise ValueError(f"{sample.record.id}: option {right + 1} has no letter; there are {len(LETTERS)}")
    letter = LETTERS[right]
    if sample.reference and not says_letter(sample.reference, letter):
        return math.nan
    return sample.failure is None and says_letter(sample.said, letter)
