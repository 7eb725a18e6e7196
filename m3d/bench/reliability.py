"""How good probabilities are: whether they part what is from what is not, and whether they mean what they say.

Of ``probabilities`` of what is ``true``: AUC (a pair of both kinds is in the right order), Brier score (mean squared
error), and the expected calibration error over ten bins of equally many (Nguyen and O'Connor 2015, "Posterior
calibration and exploratory analysis"): how far, on average, what is said lies from how often it is so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from data_prep.atomic import atomic_path
from m3d.bench.bootstrap import INTERVAL, RESAMPLES, SEED

__all__ = ["BINS", "Bin", "auc", "bins_of", "brier", "calibration_error", "draw_reliability", "measures", "share_right"]

BINS = 10
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bin:
    """``n`` samples whose probabilities lie next to each other: their mean, and the share that is true."""

    n: int
    low: float
    high: float
    said: float
    true: float


def auc(probabilities: Floats, true: Bools) -> float | None:
    """The share of pairs of what is and what is not that are in the right order; ties count half. None: no pairs."""
    positive, negative = int(true.sum()), int((~true).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(probabilities)
    return float((ranks[true].sum() - positive * (positive + 1) / 2) / (positive * negative))


def brier(probabilities: Floats, true: Bools) -> float:
    """Mean squared difference from 1 where it is true, and from 0 where it is not."""
    return float(np.mean((probabilities - true) ** 2))


def bins_of(probabilities: Floats, true: Bools, number: int = BINS) -> tuple[Bin, ...]:
    """Bins of equally many, to one, in the order of their probabilities; fewer where there are fewer samples."""
    order = np.argsort(probabilities, kind="stable")
    found = []
    for part in np.array_split(order, min(number, len(order))):
        said = probabilities[part]
        found.append(Bin(len(part), float(said[0]), float(said[-1]), float(said.mean()), float(true[part].mean())))
    return tuple(found)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance, over samples, of what their bin says from how often it is so."""
    return sum(one.n * abs(one.said - one.true) for one in bins) / sum(one.n for one in bins)


def share_right(probabilities: Floats, true: Bools, *, kind: bool) -> float | None:
    """The share of what is (``kind``), or of what is not, that 0.5 puts on its own side. None: there is none."""
    some = probabilities[true == kind]
    return float(np.mean((some >= 0.5) == kind)) if len(some) else None


def measures(probabilities: Sequence[float], true: Sequence[bool], patients: Sequence[str]) -> dict[str, Any]:
    """All of these, most with 95 % intervals by a bootstrap over patients, and the bins; plain JSON types.

    The calibration error has no interval: that of a resample is larger than that of the sample.

    Raises:
        ValueError: There are no probabilities.
    """
    if not len(probabilities):
        raise ValueError("there are no probabilities to measure: nothing was asked for")
    said, is_true = np.array(probabilities, np.float64), np.array(true, bool)
    bins = bins_of(said, is_true)
    found: dict[str, Any] = {
        "n": len(said),
        "there": int(is_true.sum()),
        "not there": int((~is_true).sum()),
        "patients": len(set(patients)),
    }
    for name, interval in _intervals(said, is_true, np.array(patients)).items():
        found[name] = {"value": _VALUES[name](said, is_true), **interval}
    return found | {"ece": calibration_error(bins), "bins": [asdict(one) for one in bins]}


_VALUES: Mapping[str, Callable[[Floats, Bools], float | None]] = {
    "auc": auc,
    "brier": brier,
    "there, called there": partial(share_right, kind=True),
    "not there, called not there": partial(share_right, kind=False),
}


def _intervals(said: Floats, true: Bools, patients: npt.NDArray[Any]) -> dict[str, dict[str, float | None]]:
    rng = np.random.default_rng(SEED)
    rows = [np.flatnonzero(patients == one) for one in np.unique(patients)]
    drawn: dict[str, list[float]] = {name: [] for name in _VALUES}
    for _ in range(RESAMPLES):
        some = np.concatenate([rows[number] for number in rng.integers(0, len(rows), len(rows))])
        for name, measure in _VALUES.items():
            value = measure(said[some], true[some])
            if value is not None:
                drawn[name].append(value)
    edges = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    found: dict[str, dict[str, float | None]] = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, edges).tolist() if values else (None, None)
        found[name] = {"low": low, "high": high}
    return found


# -- the picture ------------------------------------------------------------------------------------------------------

INK, QUIET, SAID = "#22272e", "#8b949e", "#0072B2"
OTHERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito, as elsewhere


def draw_reliability(path: Path, curves: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Reliability of several `measures`, by name, as PNG: what is said against how often it is so, and how many say so.

    A circle is a bin, its area how many are in it; on the dashed line probabilities mean what they say.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=1)
    for (name, found), colour in zip(curves.items(), cycle(OTHERS), strict=False):
        said, true = ([one[key] for one in found["bins"]] for key in ("said", "true"))
        area = [12 + 220 * one["n"] / found["n"] for one in found["bins"]]
        axes.plot(said, true, color=colour, linewidth=1, alpha=0.6)
        axes.scatter(said, true, s=area, color=colour, alpha=0.8, label=f"{name}, n = {found['n']}", linewidths=0)
    axes.axvline(0.5, color=QUIET, linewidth=0.6)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set_xlabel("probability that the structure is in the scan", color=INK)
    axes.set_ylabel("share that is", color=INK)
    axes.set_title(title, color=INK, fontsize=11)
    if curves:
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": "m3d"})
