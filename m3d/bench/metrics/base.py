"""What a metric is: numbers of each sample that add up, and what their sums mean.

A mean, a corpus BLEU and a share are then all alike: of any resample of patients the value comes from sums, without
looking at a sample again. `m3d.bench.metrics.registry` has the metrics of every task.
"""

# n = samples, k = statistics of a metric, R = resamples

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.record import Record

__all__ = ["Floats", "Metric", "ProtocolName", "Sample", "mean"]

Floats = npt.NDArray[np.float64]
ProtocolName = Literal["standard", "m3d"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer beside its truth.

    ``said`` and ``reference`` are texts; ``choice`` and ``true_choice`` options by number, ``likelihoods`` those of
    the options in nats; ``boxes`` and ``true_boxes`` are ``(d0, h0, w0, d1, h1, w1)``, as fractions of the image;
    ``masks`` are one a mask that was asked for, see `m3d.bench.metrics.masks`. ``failure`` says why there is no answer.
    """

    record: Record
    said: str = ""
    reference: str = ""
    options: tuple[str, ...] = ()
    choice: int | None = None
    true_choice: int | None = None
    likelihoods: tuple[float, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    true_boxes: tuple[tuple[float, ...], ...] = ()
    masks: tuple[Any, ...] = field(default=())
    failure: str | None = None

    @property
    def patient(self) -> str:
        """Whom it is of: what is said of one patient is not independent."""
        return self.record.patient_id


class Metric(Protocol):
    """One number of many samples.

    ``variant`` names the implementation and its settings, in a few words, and stands in every result. ``worst`` is the
    row of statistics that a failure counts; None means that ``statistics`` sees to failures itself (their texts are
    empty). ``better`` is the direction that is better, ``unit`` "" for shares and scores.
    """

    name: str
    variant: str
    better: Literal["higher", "lower"]
    unit: str
    worst: tuple[float, ...] | None

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """``(n, k)``; a row of NaN is a sample that this metric does not judge."""

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """Sums of statistics ``(R, k)`` over ``counts`` samples ``(R,)`` to values ``(R,)``; NaN where none is."""


def mean(sums: Floats, counts: Floats) -> Floats:
    """The reduction of a metric that is a mean: ``(R, 1), (R,) -> (R,)``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[:, 0] / counts)
