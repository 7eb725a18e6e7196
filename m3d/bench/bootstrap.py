"""How sure a number is: a bootstrap over patients, for one run, beside its blind twin, and between two runs.

Patients are drawn, not answers: what is said of one scan is not independent. All that is compared shares its resamples.
"""

# n = samples, k = statistics of a metric, P = patients, R = resamples

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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
    "of_draws",
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
    n: int = 0
    patients: int = 0

    def to_dict(self, name: str = "value") -> dict[str, Any]:
        """Plain JSON types: ``value, low, high, n, patients``, or ``name, name_low, name_high, name_n`` of another."""
        if name != "value":
            return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_n": self.n}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "patients": self.patients}


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


@lru_cache(maxsize=4)
def drawn(num_patients: int, resamples: int = RESAMPLES, seed: int = SEED) -> npt.NDArray[np.float32]:
    """How often each patient is drawn in each resample: ``(R, P)``."""
    share = np.full(num_patients, 1 / num_patients)
    found = np.random.default_rng(seed).multinomial(num_patients, share, size=resamples).astype(np.float32)
    found.setflags(write=False)  # all callers share it
    return found


def values(metric: Metric, sums: Sums) -> Floats:
    """The metric of all patients, then of each resample: ``(1 + R,)``."""
    weights = drawn(len(sums.patients))
    totals = np.concatenate([sums.totals.sum(axis=0)[None], weights @ sums.totals])
    counts = np.concatenate([[sums.counts.sum()], weights @ sums.counts])
    return metric.reduce(totals, counts)


def of_draws(draws: Floats, n: int = 0, patients: int = 0) -> Estimate:
    """The first of `values`, with the interval of the others; what is no number is None."""
    usable = draws[1:][np.isfinite(draws[1:])]
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(usable, [tail, 1 - tail]).tolist() if len(usable) else (None, None)
    return Estimate(float(draws[0]) if np.isfinite(draws[0]) else None, low, high, n, patients)


def estimate(metric: Metric, sums: Sums) -> Estimate:
    """A metric's value, and the interval that resampling its patients gives."""
    return _estimate(metric, sums)


def difference(metric: Metric, one: Sums, other: Sums) -> Estimate:
    """``one`` less ``other``, of the same patients in the same order, with the interval of the paired difference.

    Raises:
        ValueError: The two are not of the same patients.
    """
    if one.patients != other.patients:
        raise ValueError("a difference needs the same patients in both runs; keep those that both have")
    return _estimate(metric, one, other)


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


def _estimate(metric: Metric, sums: Sums, less: Sums | None = None) -> Estimate:
    if not sums.patients:
        return Estimate(None, None, None)
    found = values(metric, sums) - (0 if less is None else values(metric, less))
    return of_draws(found, int(sums.counts.sum()), int((sums.counts > 0).sum()))
