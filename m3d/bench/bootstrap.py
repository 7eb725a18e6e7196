"""How sure a number is: a bootstrap over patients, for one run, beside its blind twin, and between two runs.

Patients are drawn, not answers: what is said of one scan is not independent. All that is compared shares its resamples.
"""

# n = samples, k = statistics of a metric, P = patients, R = resamples

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from m3d.bench.metrics.base import Floats, Metric

__all__ = [
    "INTERVAL",
    "RESAMPLES",
    "SEED",
    "Estimate",
    "Sums",
    "difference",
    "drawn",
    "estimate",
    "summed",
    "two_sided",
    "values",
]

RESAMPLES, SEED, INTERVAL = 2000, 0, 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; ``n`` samples of ``patients`` patients stand behind it. None: not a number."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    patients: int


@dataclass(frozen=True)
class Sums:
    """A metric's statistics added up by patient: ``totals`` (P, k), ``counts`` (P,), in the order of ``patients``."""

    patients: tuple[str, ...]
    totals: Floats
    counts: Floats


def summed(statistics: Floats, patients: Sequence[str], order: Sequence[str] | None = None) -> Sums:
    """Add up rows ``(n, k)`` by patient; rows of NaN are not counted. ``order`` are the patients, else those there."""
    known = tuple(order if order is not None else sorted(set(patients)))
    place = {patient: number for number, patient in enumerate(known)}
    totals, counts = np.zeros((len(known), statistics.shape[1])), np.zeros(len(known))
    judged = ~np.isnan(statistics).any(axis=1)
    rows = np.array([place[patient] for patient in patients], dtype=np.int64)
    np.add.at(totals, rows[judged], statistics[judged])
    np.add.at(counts, rows[judged], 1.0)
    return Sums(known, totals, counts)


@cache
def drawn(num_patients: int, resamples: int = RESAMPLES, seed: int = SEED) -> npt.NDArray[np.int64]:
    """How often each patient is drawn in each resample: ``(R, P)``."""
    share = np.full(num_patients, 1 / num_patients)
    return np.random.default_rng(seed).multinomial(num_patients, share, size=resamples)


def values(metric: Metric, sums: Sums, weights: npt.NDArray[np.int64]) -> Floats:
    """The metric of each resample: ``(R, P) -> (R,)``."""
    return metric.reduce(weights @ sums.totals, weights @ sums.counts)


def estimate(metric: Metric, sums: Sums) -> Estimate:
    """A metric's value, and the interval that resampling its patients gives."""
    return _estimate(metric, (sums,), sums)


def difference(metric: Metric, one: Sums, other: Sums) -> Estimate:
    """``one`` less ``other``, of the same patients in the same order, with the interval of the paired difference.

    Raises:
        ValueError: The two are not of the same patients.
    """
    if one.patients != other.patients:
        raise ValueError("a difference needs the same patients in both runs; keep those that both have")
    return _estimate(metric, (one, other), one)


def two_sided(metric: Metric, one: Sums, other: Sums, *, seed: int = SEED) -> float | None:
    """How likely so large a difference is if the runs were alike: patients' runs exchanged at random (permutation).

    None where there is nothing to tell apart.
    """
    if one.patients != other.patients:
        raise ValueError("a test needs the same patients in both runs; keep those that both have")
    swap = np.random.default_rng(seed).integers(0, 2, size=(RESAMPLES, len(one.patients))).astype(np.float64)
    swap = np.concatenate([np.zeros((1, len(one.patients))), swap])
    mixed = [
        metric.reduce(kept @ one.totals + (1 - kept) @ other.totals, kept @ one.counts + (1 - kept) @ other.counts)
        for kept in (1 - swap, swap)
    ]
    gaps = np.abs(mixed[0] - mixed[1])
    if not np.isfinite(gaps[0]):
        return None
    return float((gaps[np.isfinite(gaps)] >= gaps[0] - 1e-12).mean())


def _estimate(metric: Metric, terms: Sequence[Sums], counted: Sums) -> Estimate:
    num_patients = len(counted.patients)
    if not num_patients:
        return Estimate(None, None, None, 0, 0)
    weights = np.concatenate([np.ones((1, num_patients), np.int64), drawn(num_patients)])
    first, *others = (values(metric, sums, weights) for sums in terms)
    found = first - sum(others) if others else first
    usable = found[1:][np.isfinite(found[1:])]
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(usable, [tail, 1 - tail]).tolist() if len(usable) else (None, None)
    value = float(found[0]) if np.isfinite(found[0]) else None
    judged = counted.counts > 0
    return Estimate(value, low, high, int(counted.counts.sum()), int(judged.sum()))
