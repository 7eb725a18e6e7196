"""A metric of texts that is the mean of its samples' scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Sample, mean
from m3d.bench.metrics.words import is_chinese

__all__ = ["PerSample", "TextScore", "by_language", "worded"]

TextScore = Callable[[str, str], float]  # what was said, the reference


@dataclass
class PerSample:
    """The mean of ``score``. No text counts 0, on whichever side it is missing: a failure's, or both.

    (No record has an empty reference; that two empty texts agree would reward those who say nothing.)
    """

    name: str
    variant: str
    score: Callable[[Sample], float]
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = None

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The score of each sample: ``(n, 1)``."""
        return np.array([self.score(sample) if worded(sample) else 0.0 for sample in samples]).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean: ``(R, 1), (R,) -> (R,)``."""
        return mean(sums, counts)


def worded(sample: Sample) -> bool:
    """Whether there is a text on both sides."""
    return bool(sample.said.strip() and sample.reference.strip())


def by_language(english: TextScore, chinese: TextScore) -> Callable[[Sample], float]:
    """Score a sample in the way of its language."""

    def score(sample: Sample) -> float:
        return (chinese if is_chinese(sample.record) else english)(sample.said, sample.reference)

    return score
