"""Zoom in: a mask that was drawn on the model's grid is drawn again in windows of a finer one, where it lies.

SegVol's inference (Du et al. 2024, section 2.4) on a scan: the answer on the model's grid is the first glance; then
windows of the grid's shape, but with smaller voxels, cover the region where it lies, each with the prompt that was
given. Intensities and orientation are those of the checkpoint's `Preprocess`. Only a window at a time and one mask's
region are held, and what they take is known before the first window.
"""

# G = voxels of the model's grid, F = of the finer one, S = of the scan

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.preprocess import Prepared, rescale
from data_prep.steps import sampled
from data_prep.way import Way
from m3d.memory import available_memory
from m3d.models import M3DForConditionalGeneration
from segvol_head import Prompts
from segvol_head.prompts import box_of
from segvol_head.zoom import Closer, ExactReflection, Region

log = logging.getLogger(__name__)

__all__ = ["Plan", "Sharp", "Zoom", "ZoomIn", "zoom_factor"]

Zoom = bool | float | Literal["native"]
Place = Callable[[Way], Prompts | None]
"""Brings what a user pointed at to a grid."""

PER_FINE, PER_SCAN = 24, 10
"""Bytes that a voxel of a region takes at most: on the finer grid six float32 arrays (picture and first glance, both
padded, sums and counts), on the scan two and a half. What the model takes for a window it took for the first look, too.
"""
PER_SCAN_KEPT = 1
"""Bytes of a mask's voxel."""
SHARE = 0.9
"""Of the memory that is available: others need some too."""


def zoom_factor(zoom: Zoom) -> float:
    """How many times finer than the model's grid; ``True`` and "native" are as fine as the scan.

    Raises:
        ValueError: It is no number above 1.
    """
    if zoom is True or zoom == "native":
        return math.inf
    if isinstance(zoom, bool) or not isinstance(zoom, int | float) or not zoom > 1:
        raise ValueError(f"zoom={zoom!r} must be a number above 1, how many times finer to look, or 'native'")
    return float(zoom)


@dataclass(frozen=True, eq=False)
class Sharp:
    """A mask on the scan's own voxels, drawn from closer; ``score`` is the mean probability inside."""

    array: npt.NDArray[np.bool_]
    score: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What zooming in on one mask takes: its region of the finer grid, windows, and bytes at the peak."""

    region: Region
    reflection: ExactReflection
    glance: npt.NDArray[np.float32]
    windows: int
    num_bytes: int


class ZoomIn:
    """One scan under a grid that is ``zoom`` times finer than the model's, to draw masks on from closer.

    ``place`` brings what was pointed at to that grid, beside what is said of each mask.

    Raises:
        ValueError: ``zoom`` is no number above 1.
    """

    def __init__(
        self, model: M3DForConditionalGeneration, prepared: Prepared, zoom: Zoom, place: Place = lambda _: None
    ) -> None:
        self.model, self.prepared, self.place = model, prepared, place
        self.fine = prepared.finer(zoom_factor(zoom))
        both = zip(prepared.steps[2].axes, self.fine.steps[2].axes, strict=True)
        self.scale = tuple(coarse.step / fine.step for coarse, fine in both)

    @property
    def useful(self) -> bool:
        """Whether there is anything to see from closer: the scan may be no finer than the model's grid."""
        return max(self.scale) > 1.01

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the finer grid in mm."""
        matrix = self.prepared.source.affine @ self.fine.to_scan_matrix
        d, h, w = np.linalg.norm(matrix[:3, :3], axis=0).tolist()
        return d, h, w

    def plan(self, glance: npt.NDArray[np.float32], *, text: Tensor | None) -> Plan | None:
        """How to look closer at what a first glance, logits ``(G)``, shows and a prompt says; None where at nothing.

        ``text`` is ``(1, C)``.
        """
        window = self.prepared.shape
        pointed = self.place(self.fine)
        prompt = Prompts(text=text) if pointed is None else replace(pointed, text=text)
        reflection = ExactReflection(prompt, self.fine.shape, window, self.scale)
        region = reflection.region(self._enlarged(box_of(torch.from_numpy(glance > 0))))
        if region is None:
            return None
        windows = Closer(self.model.draw_on, window).num_windows(region)
        fine = math.prod(max(part.stop - part.start, side) for part, side in zip(region, window, strict=True))
        own = math.prod(stop - start for start, stop in self._on_scan(region))
        kept = PER_SCAN_KEPT * math.prod(self.prepared.scan_shape)
        return Plan(region, reflection, glance, windows, PER_FINE * fine + PER_SCAN * own + kept)

    def draw_all(self, plans: Sequence[Plan | None]) -> Iterator[Sharp | None]:
        """Draw what was planned, one mask after the other; a bar tells how far it is, where a person watches.

        Raises:
            ValueError: There is less memory than it takes; nothing has been drawn then.
        """
        self._refuse_large([plan for plan in plans if plan is not None])
        total = sum(plan.windows for plan in plans if plan is not None)
        with tqdm(total=total, desc="zooming in", unit="window", leave=False, disable=None) as bar:
            for plan in plans:
                yield None if plan is None else self._draw(plan, bar.update)

    def _refuse_large(self, plans: Sequence[Plan]) -> None:
        if not plans:
            return
        kept = PER_SCAN_KEPT * math.prod(self.prepared.scan_shape) * (len(plans) - 1)
        needed, free = max(plan.num_bytes for plan in plans) + kept, available_memory()
        windows = sum(plan.windows for plan in plans)
        log.info("zooming in: %d windows, at most %.2f GB of %.2f that are free", windows, needed / 1e9, free / 1e9)
        if needed > SHARE * free:
            raise ValueError(
                f"zooming in takes {needed / 1e9:.1f} GB for {windows} windows, and {free / 1e9:.1f} GB are free; "
                "take a smaller zoom, such as zoom=2, or fewer structures at a time"
            )

    def _draw(self, plan: Plan, each: Callable[[], object]) -> Sharp:
        closer = Closer(self.model.draw_on, self.prepared.shape, device=self.model.device, each=each)
        image = torch.from_numpy(self._pixels(plan.region))
        seen = torch.from_numpy(self._seen(plan.glance, plan.region))
        logits = closer.look(plan.region, image, seen, plan.reflection).numpy()
        del image, seen
        return self._to_scan(logits, plan.region)

    def _pixels(self, region: Region) -> npt.NDArray[np.float32]:
        """A region of the scan on the finer grid, as `Preprocess` would show it."""
        turn, cut, lattice = self.fine.steps
        scan, limits = cut.apply(turn.apply(self.prepared.source.array)), self.prepared.intensity
        where, support, needed = [], [], []
        for axis, part in zip(lattice.axes, region, strict=True):
            places = axis.to_volume(np.arange(part.start, part.stop, dtype=np.float64)).clip(0, axis.size - 1)
            reach = max(axis.step, 1.0) if lattice.smooth else 1.0
            first = max(math.floor(places[0] - reach), 0)
            needed.append(slice(first, min(math.ceil(places[-1] + reach) + 1, axis.size)))
            where.append(places - first)
            support.append(reach)
        shown = rescale(scan[needed[0], needed[1], needed[2]], limits["lo"], limits["hi"])
        return np.ascontiguousarray(sampled(shown, where, support))

    def _seen(self, glance: npt.NDArray[np.float32], region: Region) -> npt.NDArray[np.float32]:
        """The logits of the first glance in a region: ``(G) -> (region of F)``."""
        where = [
            coarse.to_grid(fine.to_volume(np.arange(part.start, part.stop, dtype=np.float64))).clip(
                coarse.start, coarse.stop - 1
            )
            for coarse, fine, part in zip(self.prepared.steps[2].axes, self.fine.steps[2].axes, region, strict=True)
        ]
        return np.ascontiguousarray(sampled(glance, where))

    def _to_scan(self, logits: npt.NDArray[np.float32], region: Region) -> Sharp:
        """The mask of a region's logits on the scan, empty elsewhere."""
        turn, cut, lattice = self.fine.steps
        ranges = self._on_scan(region)
        where = [
            axis.to_grid(np.arange(start, stop, dtype=np.float64)) - part.start
            for axis, part, (start, stop) in zip(lattice.axes, region, ranges, strict=True)
        ]
        own = sampled(logits, where)
        array = np.zeros(self.prepared.scan_shape, bool, order=self.prepared.memory)
        d, h, w = (slice(start, stop) for start, stop in ranges)
        inside = own > 0
        cut.apply(turn.apply(array))[d, h, w] = inside
        probability = 1 / (1 + np.exp(-own[inside] if inside.any() else -own.max()))
        return Sharp(array, float(probability.mean()))

    def _on_scan(self, region: Region) -> list[tuple[int, int]]:
        """The scan's voxels, turned and cropped, whose middles lie in a region."""
        ranges = []
        for axis, part in zip(self.fine.steps[2].axes, region, strict=True):
            places = axis.to_grid(np.arange(axis.size, dtype=np.float64))
            first, last = np.searchsorted(places, [part.start - 0.5, part.stop - 0.5]).tolist()
            ranges.append((first, last))
        return ranges

    def _enlarged(self, box: Tensor | None) -> Tensor | None:
        """A box of the model's grid, corners inclusive, around the same on the finer grid."""
        if box is None:
            return None
        starts = torch.tensor([axis.start for axis in self.prepared.steps[2].axes])
        low, high = box.view(2, 3) - starts
        by = torch.tensor(self.scale)
        return torch.cat([(low * by).floor(), ((high + 1) * by).ceil() - 1])
