"""How well masks are drawn: overlap and surfaces in mm on the truth's own grid, and the released Dice of probabilities.

A sample's value is the mean over the masks that it was asked for. One that was not drawn is empty.
"""

import math
import statistics
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import box_of_mask
from m3d.bench.kinds import CLICKS, MASK, MOST_CLICKS, TEXT, parts_of
from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample, mean
from m3d.bench.published import soft_dice_of

__all__ = [
    "HD95",
    "NSD",
    "AfterClicks",
    "ClicksTo",
    "Dice",
    "GivenDice",
    "MaskPair",
    "NeverReached",
    "SoftDice",
    "mask_metrics",
]

Mask = npt.NDArray[np.bool_]
SHOWN, TARGET = (1, 3, 5, 10), 0.8  # of clicks: after how many Dice is told, and what they should reach


@dataclass(frozen=True, eq=False)
class MaskPair:
    """A drawn mask and the true one on one grid (D, H, W) whose voxels are ``spacing`` mm; ``guess`` None: not drawn.

    ``spacing`` None is a scan whose spacing is not known: nothing in mm is judged of it.

    ``soft`` is `m3d.bench.published.soft_sums` of probabilities on the model's own grid, None where there are none.
    ``steps`` are Dice before the first of several steps and after each, where the mask was drawn in steps.
    """

    name: str
    guess: Mask | None
    truth: Mask
    spacing: tuple[float, float, float] | None
    soft: tuple[float, float, float] | None = None
    steps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for side, mask in (("guess", self.guess), ("truth", self.truth)):
            if mask is not None and (mask.dtype != np.bool_ or mask.ndim != 3):
                raise ValueError(
                    f"{side} of {self.name!r} must be a bool array of three axes, got {mask.dtype} {mask.shape}; "
                    "threshold probabilities first"
                )
        if self.guess is not None and self.guess.shape != self.truth.shape:
            raise ValueError(
                f"{self.name!r} was drawn on a grid of {self.guess.shape}, its truth lies on one of "
                f"{self.truth.shape}; bring it to the truth's grid first"
            )
        spacing = (1.0, 1.0, 1.0) if self.spacing is None else self.spacing
        if len(spacing) != 3 or not all(math.isfinite(side) and side > 0 for side in spacing):
            raise ValueError(f"spacing of {self.name!r} must be three positive mm, got {self.spacing}")

    @property
    def nothing_drawn(self) -> bool:
        """The guess is empty, or there is none."""
        return self.guess is None or not self.guess.any()

    @property
    def nothing_there(self) -> bool:
        """The truth is empty: what was asked for is absent."""
        return not self.truth.any()

    @property
    def diagonal_mm(self) -> float:
        """From one corner of the scan to the opposite one: no two voxels are farther apart."""
        if self.spacing is None:
            return math.nan
        return math.hypot(*(side * size for side, size in zip(self.truth.shape, self.spacing, strict=True)))


class _OfMasks(ABC):
    """The mean over samples of the mean over their masks; a sample that has none is not judged."""

    name: str
    variant: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)
    in_mm = False  # which needs the scan's spacing

    @abstractmethod
    def value(self, pair: MaskPair) -> float:
        """Of one mask."""

    def failed(self, sample: Sample) -> float:
        """Of a sample without an answer."""
        return 0.0

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The value of each sample, ``(n, 1)``."""
        return np.array([self._of(sample) for sample in samples], dtype=np.float64).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """Their mean."""
        return mean(sums, counts)

    def _of(self, sample: Sample) -> float:
        if self.in_mm and any(pair.spacing is None for pair in sample.masks):
            return math.nan
        if sample.failure is not None:
            return self.failed(sample)
        return statistics.fmean(map(self.value, sample.masks)) if sample.masks else math.nan


class Dice(_OfMasks):
    """Twice the common voxels by the voxels of both; 1 where there is nothing to draw and nothing was drawn."""

    name = "Dice"
    variant = "hard, on the truth's grid; both empty 1; mean over a sample's masks"

    def value(self, pair: MaskPair) -> float:
        """From 0, apart, to 1, equal."""
        if pair.guess is None:
            return float(pair.nothing_there)
        total = np.count_nonzero(pair.guess) + np.count_nonzero(pair.truth)
        return 2 * np.count_nonzero(pair.guess & pair.truth) / total if total else 1.0


class NSD(_OfMasks):
    """The share of both surfaces that lies within ``tolerance`` mm of the other: 1 if both are empty, 0 if one is."""

    in_mm = True

    def __init__(self, tolerance: float = 3.0) -> None:
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"the tolerance of NSD must be mm from 0 upwards, got {tolerance}")
        self.tolerance = tolerance
        self.name = f"NSD@{tolerance:g}mm"
        self.variant = f"MONAI surface Dice of surface voxels within {tolerance:g} mm; both empty 1, one empty 0"

    def value(self, pair: MaskPair) -> float:
        """From 0, no surface near the other, to 1."""
        if pair.nothing_drawn or pair.nothing_there:
            return float(pair.nothing_drawn and pair.nothing_there)
        from monai.metrics.surface_dice import compute_surface_dice  # here, because importing monai takes seconds

        with _quiet():
            found = compute_surface_dice(
                *_cropped(pair), [self.tolerance], include_background=True, spacing=_floats(pair.spacing)
            )
        return float(found[0, 0])


class HD95(_OfMasks):
    """How far in mm 95 % of each surface lie from the other at most, the larger of both directions.

    0 if both are empty; if one is, and for a failure, the diagonal of the scan.
    """

    name = "HD95"
    variant = "MONAI Hausdorff distance, percentile 95; both empty 0, one empty the scan's diagonal"
    better: Literal["higher", "lower"] = "lower"
    unit = "mm"
    worst: tuple[float, ...] | None = None  # every scan has its own
    in_mm = True

    def value(self, pair: MaskPair) -> float:
        """From 0, equal, to the scan's diagonal."""
        if pair.nothing_drawn or pair.nothing_there:
            return 0.0 if pair.nothing_drawn and pair.nothing_there else pair.diagonal_mm
        from monai.metrics.hausdorff_distance import compute_hausdorff_distance

        with _quiet():
            found = compute_hausdorff_distance(
                *_cropped(pair), include_background=True, percentile=95, spacing=_floats(pair.spacing)
            )
        return float(found[0, 0])

    def failed(self, sample: Sample) -> float:
        """The diagonal of the scan that the sample's masks lie in.

        Raises:
            ValueError: The sample has no masks, and with them no scan.
        """
        if not sample.masks:
            raise ValueError(
                f"{sample.record.id}: failed ({sample.failure}), and without masks it is not known how large its scan "
                "is; give each mask that was asked for with its truth and guess=None"
            )
        return statistics.fmean(pair.diagonal_mm for pair in sample.masks)


class SoftDice(_OfMasks):
    """The released "Dice", of probabilities on the model's grid: see `m3d.bench.published.soft_dice`.

    A mask that was not drawn, or of what is absent, counts 0, as it does there, and so does a failure. A drawn mask
    whose ``soft`` is not known is left out; of a system that never says it, nothing is judged, not even its failures.
    """

    name = "soft Dice"
    variant = "released: 2 sum(p t) / (sum(p) + sum(t) + 1) of probabilities, on the model's grid; an empty truth 0"
    worst: tuple[float, ...] | None = None  # which is 0 only where others have a value

    def value(self, pair: MaskPair) -> float:
        """From 0 to less than 1."""
        if pair.soft is None:
            return 0.0 if pair.guess is None or pair.nothing_there else math.nan
        return soft_dice_of(*pair.soft)

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """Of each sample its value, whether probabilities are behind it, and whether they are missing: ``(n, 3)``."""
        return np.array([self._row(sample) for sample in samples], dtype=np.float64).reshape(-1, 3)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean of those where none are missing; NaN where they are missing and never there."""
        value, known, missing = sums.T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((known == 0) & (missing > 0), np.nan, value / (counts - missing))

    def _row(self, sample: Sample) -> tuple[float, float, float]:
        if sample.failure is not None:
            return 0.0, 0.0, 0.0
        if not sample.masks:
            return math.nan, math.nan, math.nan
        value = self._of(sample)
        known = any(pair.soft is not None for pair in sample.masks)
        return (0.0, 0.0, 1.0) if math.isnan(value) else (value, float(known), 0.0)


class AfterClicks(_OfMasks):
    """Dice after so many clicks of a simulated user; a system that does not say its steps is not judged."""

    def __init__(self, clicks: int) -> None:
        self.clicks = clicks
        self.name = f"Dice after {clicks} click{'' if clicks == 1 else 's'}"
        self.variant = "Dice as above, of the mask after so many clicks; a mask that is right is clicked at no more"

    def value(self, pair: MaskPair) -> float:
        """From 0 to 1."""
        return pair.steps[self.clicks] if self.clicks < len(pair.steps) else math.nan


class ClicksTo(_OfMasks):
    """How many clicks it takes until Dice is ``target`` for the first time; never counts as the most clicks."""

    better: Literal["higher", "lower"] = "lower"
    unit = "clicks"

    def __init__(self, most: int, target: float = TARGET) -> None:
        self.most, self.target = most, target
        self.name = f"NoC@{100 * target:.0f}"
        self.variant = f"clicks until Dice is {target:g} for the first time; never counts as {most}"
        self.worst = (float(most),)

    def value(self, pair: MaskPair) -> float:
        """From 0, where Dice is so high before the first click, to the most."""
        if not pair.steps:
            return math.nan
        return next((float(number) for number, one in enumerate(pair.steps) if one >= self.target), float(self.most))

    def failed(self, sample: Sample) -> float:
        """The most clicks."""
        return float(self.most)


class NeverReached(_OfMasks):
    """The share of masks whose Dice is never ``target``."""

    better: Literal["higher", "lower"] = "lower"
    worst: tuple[float, ...] | None = (1.0,)

    def __init__(self, most: int, target: float = TARGET) -> None:
        self.target = target
        self.name = f"never Dice {target:g}"
        self.variant = f"share of masks whose Dice is not {target:g} after any of {most} clicks"

    def value(self, pair: MaskPair) -> float:
        """1 or 0."""
        return float(max(pair.steps) < self.target) if pair.steps else math.nan

    def failed(self, sample: Sample) -> float:
        """Never."""
        return 1.0


class GivenDice(_OfMasks):
    """Dice of the mask that was given as a prompt: what an answer that changes nothing would have."""

    name = "Dice of the given mask"
    variant = "Dice as above, of the mask that was the prompt"
    worst: tuple[float, ...] | None = None  # it is none of the answer

    def value(self, pair: MaskPair) -> float:
        """From 0 to 1."""
        return pair.steps[0] if pair.steps else math.nan

    def failed(self, sample: Sample) -> float:
        """Not known: the answer has no steps."""
        return math.nan


def mask_metrics(protocol: ProtocolName, by: str = TEXT) -> tuple[Metric, ...]:
    """What masks are judged by; what was asked for by other than text, the released evaluation has nothing for."""
    if protocol == "m3d":
        return (SoftDice(),) if by == TEXT else ()
    parts = parts_of(by)
    found: list[Metric] = [Dice(), NSD(), HD95()]
    if MASK in parts:
        found.append(GivenDice())
    if CLICKS in parts:
        found += [*map(AfterClicks, SHOWN), ClicksTo(MOST_CLICKS), NeverReached(MOST_CLICKS)]
    return tuple(found)


def _cropped(pair: MaskPair) -> tuple[Tensor, Tensor]:
    """Both masks in the box around both, as ``(1, 1, D, H, W)``: no surface is near what is cut away."""
    assert pair.guess is not None
    box = box_of_mask(pair.guess | pair.truth)
    inside = tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))
    guess, truth = (torch.from_numpy(mask[inside].copy())[None, None] for mask in (pair.guess, pair.truth))
    return guess, truth


def _floats(spacing: Sequence[float] | None) -> list[float]:
    """MONAI refuses whole numbers among others."""
    assert spacing is not None
    return [float(side) for side in spacing]


@contextmanager
def _quiet() -> Iterator[None]:
    """MONAI 1.6 warns of the future of a call of its own."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        yield
