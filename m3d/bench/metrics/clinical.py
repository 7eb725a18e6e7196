"""What a report says of the patient, by RadEval (extra ``clinical``), which brings models of its own.

They are made for radiology reports in English, most of them for the chest. RadEval fetches them from the Hugging Face
Hub when it is first asked, and keeps them: the one part of M3D-Bench that needs a network.
"""

# n samples, R resamples

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Sample, mean
from m3d.bench.metrics.optional import require
from m3d.bench.metrics.per_sample import worded

__all__ = ["CLINICAL", "Clinical", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One of RadEval's: what it is called there, and under which key its values of single reports come."""

    radeval: str
    key: str
    title: str


# Those whose values are shares of single reports. RadCliQ has no worst value, which a failure would need.
CLINICAL = {
    "radgraph": Measure("radgraph", "radgraph_partial", "RadGraph F1"),
    "ratescore": Measure("ratescore", "ratescore", "RaTEScore"),
    "radbert_ct": Measure("f1radbert_ct", "f1radbert_ct_sample_acc", "RadBERT-CT accuracy"),
    "srrbert": Measure("srrbert", "srrbert_weighted_f1", "SRR-BERT F1"),
    "temporal": Measure("temporal", "temporal_f1", "temporal F1"),
    "green": Measure("green", "green", "GREEN"),
}


class Clinical:
    """The mean of one of `CLINICAL` over reports; no report counts 0.

    Raises:
        KeyError: There is no such measure.
        ModuleNotFoundError: RadEval is not installed; the message has the pip command.
    """

    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = None

    def __init__(self, measure: str) -> None:
        if measure not in CLINICAL:
            raise KeyError(f"unknown clinical measure {measure!r}; known: {', '.join(sorted(CLINICAL))}")
        self._measure = CLINICAL[measure]
        self._radeval = require("radeval", "clinical").RadEval
        self.name = self._measure.title
        self.variant = f"RadEval, {self._measure.key}, mean of samples"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """RadEval's value of each sample, 0 where there is no text on either side: ``(n, 1)``."""
        scores = np.zeros((len(samples), 1))
        texts = [i for i, sample in enumerate(samples) if worded(sample)]
        if texts:
            found = self._asked([samples[i].reference for i in texts], [samples[i].said for i in texts])
            if self._measure.key not in found or len(found[self._measure.key]) != len(texts):
                raise ValueError(
                    f"RadEval gave no {self._measure.key!r} of each report but {sorted(found)}; "
                    "this is written for radeval 2.2: pip install 'm3d-lamed[clinical]'"
                )
            scores[texts, 0] = found[self._measure.key]
        return scores

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean: ``(R, 1), (R,) -> (R,)``."""
        return mean(sums, counts)

    def _asked(self, references: list[str], said: list[str]) -> dict[str, Any]:
        with warnings.catch_warnings():  # RadEval silences everybody's
            evaluator = self._radeval(metrics=[self._measure.radeval], per_sample=True, show_progress=False)
            return dict(evaluator(refs=references, hyps=said))
