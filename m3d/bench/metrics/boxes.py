"""How well boxes are placed: true IoU on half-open boxes, and the released one by the box around both."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from data_prep.boxes import Box, iou
from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample, mean
from m3d.bench.published import box_in, enclosing_iou
from m3d.tasks.codecs import END, START

__all__ = ["AccuracyAtIoU", "BoxIoU", "EnclosingIoU", "box_metrics", "matched_ious"]

THRESHOLDS = (0.2, 0.25, 0.5)
ROUNDING = 1e-9  # an IoU of one half in decimals may be computed as a little less


def matched_ious(sample: Sample) -> tuple[float, ...]:
    """The true IoU of every pair of a given and a true box, and 0 for every box without a partner.

    Partners are one to one, so that the sum of IoU is largest; there are as many values as boxes on the side that has
    more, and neither too few boxes nor too many are for free. Where nothing is there and no box was given, one value
    of 1. Given corners may come in any order and are cut to the image, as `m3d.tasks.codecs.Frac3` reads them; a box
    without volume, or of numbers that are none, hits nothing.

    Raises:
        ValueError: A box has not six numbers, or a true one no volume.
    """
    from scipy.optimize import linear_sum_assignment

    given = [_given(corners, sample) for corners in sample.boxes]
    truth = [_true(corners, sample) for corners in sample.true_boxes]
    if not given and not truth:
        return (1.0,)
    overlaps = np.array([[0.0 if one is None else iou(one, other) for other in truth] for one in given])
    overlaps = overlaps.reshape(len(given), len(truth))
    best = overlaps[linear_sum_assignment(overlaps, maximize=True)].tolist()
    return (*best, *[0.0] * (max(len(given), len(truth)) - len(best)))


class _OfBoxes(ABC):
    """The mean over samples of the mean over their matched boxes."""

    name: str
    variant: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)

    @abstractmethod
    def value(self, overlap: float) -> float:
        """Of one IoU."""

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The value of each sample, ``(n, 1)``."""
        rows = [0.0 if sample.failure is not None else self._of(sample) for sample in samples]
        return np.array(rows, dtype=np.float64).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """Their mean."""
        return mean(sums, counts)

    def _of(self, sample: Sample) -> float:
        return statistics.fmean(map(self.value, matched_ious(sample)))


class BoxIoU(_OfBoxes):
    """True intersection over union; a right "there is none" is 1."""

    name = "IoU"
    variant = "true 3D IoU of half-open boxes, matched one to one; no box where none is 1"

    def value(self, overlap: float) -> float:
        """The IoU itself."""
        return overlap


class AccuracyAtIoU(_OfBoxes):
    """The share of boxes whose true IoU reaches a threshold."""

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of an IoU must lie in (0, 1], got {threshold}")
        self.threshold = threshold
        self.name = f"Acc@{threshold:g}"
        self.variant = f"true 3D IoU >= {threshold:g} of half-open boxes, matched one to one; no box where none is 1"

    def value(self, overlap: float) -> float:
        """1 where it is reached."""
        return float(overlap >= self.threshold - ROUNDING)


class EnclosingIoU:
    """The released "IoU": see `m3d.bench.published.enclosing_iou`, of the first box that `box_in` finds in each text.

    The truth too is read from its text, with its three decimals; where a sample has no ``reference``, it is the first
    true box. A failure gives no box, and -1.
    """

    name = "enclosing-box IoU"
    variant = "released: overlap by the box around both, of the first box in the text; -1 where either is missing"
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (-1.0,)

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The value of each sample, ``(n, 1)``."""
        return np.array([self._of(sample) for sample in samples], dtype=np.float64).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """Their mean."""
        return mean(sums, counts)

    def _of(self, sample: Sample) -> float:
        if sample.failure is not None:
            return -1.0
        first = sample.true_boxes[0] if sample.true_boxes else None
        truth = box_in(_decoded(sample.reference)) if sample.reference else first
        return enclosing_iou(box_in(_decoded(sample.said)), truth)


def box_metrics(protocol: ProtocolName) -> tuple[Metric, ...]:
    """What boxes are judged by."""
    return (EnclosingIoU(),) if protocol == "m3d" else (BoxIoU(), *map(AccuracyAtIoU, THRESHOLDS))


def _decoded(text: str) -> str:
    """As the released code sees an answer, decoded without special tokens."""
    return text.replace(START, "").replace(END, "")


def _given(corners: Sequence[float], sample: Sample) -> Box | None:
    """The part of a box that lies in the image; None where its numbers are none."""
    lo, hi = _halves(corners, sample)
    if not all(map(math.isfinite, corners)):
        return None
    return Box(tuple(map(min, lo, hi)), tuple(map(max, lo, hi)), "norm").clip((1, 1, 1))


def _true(corners: Sequence[float], sample: Sample) -> Box:
    lo, hi = _halves(corners, sample)
    if not all(low < high for low, high in zip(lo, hi, strict=True)):
        raise ValueError(
            f"{sample.record.id}: the true box {tuple(corners)} has no volume; boxes are half-open, so that one of a "
            "single slice ends where the next slice begins"
        )
    return Box(lo, hi, "norm")


def _halves(corners: Sequence[float], sample: Sample) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if len(corners) != 6:
        raise ValueError(f"{sample.record.id}: a box is (d0, h0, w0, d1, h1, w1), got {tuple(corners)}")
    return tuple(corners[:3]), tuple(corners[3:])
