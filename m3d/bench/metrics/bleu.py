"""BLEU: of a whole corpus, as it is defined; and the mean of samples' BLEU-1, as the released evaluation has it.

The two are different numbers of the same texts. A corpus adds up matches and lengths before it divides, so that long
texts weigh more and one brief answer is no disaster; a mean of samples weighs every text alike.
"""

# n = samples, N = order, k = 2 N + 2 statistics, R = resamples

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Sample
from m3d.bench.metrics.optional import require
from m3d.bench.metrics.per_sample import PerSample
from m3d.bench.metrics.words import is_chinese

__all__ = ["CorpusBleu", "released_bleu"]


class CorpusBleu:
    """BLEU of up to ``order`` words in a row, of all texts together: a share, where sacrebleu gives percent.

    Of texts that are all shorter than ``order`` it is 0: there is nothing to count. An empty answer has no matches and
    lengthens the references, as sacrebleu counts it.
    """

    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = None

    def __init__(self, order: int = 4) -> None:
        self.order = order
        self.name = f"BLEU-{order}"
        self.variant = f"sacrebleu, corpus, 13a (Chinese zh), case kept, exp smoothing, max order {order}"
        self._by_tokenizer = {name: _sacrebleu(order, name, "exp") for name in ("13a", "zh")}

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """Per sample the n-grams that match (N), those there are (N), the words said and those of the reference."""
        rows = np.zeros((len(samples), 2 * self.order + 2))
        for row, sample in zip(rows, samples, strict=True):
            bleu = self._by_tokenizer["zh" if is_chinese(sample.record) else "13a"]
            found = bleu.corpus_score([sample.said], [[sample.reference]])
            row[:] = (*found.counts, *found.totals, found.sys_len, found.ref_len)
        return rows

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The value that sacrebleu gives of summed statistics: ``(R, k), (R,) -> (R,)``."""
        matched, total = sums[:, : self.order], sums[:, self.order : 2 * self.order]
        said, reference = sums[:, -2], sums[:, -1]
        halvings = np.cumsum(matched == 0, axis=1)  # the n-th order without a match counts 1 / 2^n of one
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(matched > 0, matched, 0.5**halvings) / total
            brevity = np.where(said < reference, np.exp(1 - reference / said), 1.0)
            value = brevity * np.exp(np.log(precision).mean(axis=1))
        defined = (matched > 0).any(axis=1) & (total > 0).all(axis=1)
        return np.where(counts > 0, np.where(defined, value, 0.0), np.nan)


def released_bleu() -> PerSample:
    """BLEU-1 of each sample, as ``evaluate``'s ``bleu`` with ``max_order=1``: 13a, brevity penalty, no smoothing.

    Chinese is split as English is, so a sentence without spaces is one word: use the standard protocol for it.
    """
    bleu = _sacrebleu(1, "13a", "none")

    def score(sample: Sample) -> float:
        found = bleu.corpus_score([sample.said], [[sample.reference]])
        return float(found.bp * found.counts[0] / found.totals[0]) if found.totals[0] else 0.0

    return PerSample("BLEU-1", "as evaluate's bleu: mean of samples, 13a, brevity penalty, no smoothing", score)


def _sacrebleu(order: int, tokenize: str, smoothing: str) -> Any:  # noqa: ANN401
    metrics = require("sacrebleu.metrics", "bench")
    return metrics.BLEU(max_ngram_order=order, tokenize=tokenize, smooth_method=smoothing, force=True)
