"""Pseudo-masks: regions of a volume that its grey values alone set apart, for volumes that nobody has contoured.

SegVol (arXiv 2311.13385) trains its mask head on such regions too, asked for by points and boxes and never by a name.
They come from the graph-based segmentation of Felzenszwalb and Huttenlocher (IJCV 59, 2004), here in 3D: voxels are
nodes, and those that touch by a face are joined by an edge that costs the difference of their grey values.

Part of m3d-lamed; import through `m3d`.
"""

# D, H, W = the volume's axes, E = edges

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

__all__ = ["PseudoMasks", "felzenszwalb", "pseudo_labels"]

FEWEST = 1 / 32767  # regions are numbered in 16 bits
AIR = 0.01  # grey values are in [0, 1]; what is below lies under the window, or is padding


@dataclass(frozen=True, kw_only=True)
class PseudoMasks:
    """How regions are found.

    Attributes:
        scale: ``k`` of the paper, in grey values of [0, 1] times voxels: larger regions the larger it is.
        sigma: Gaussian smoothing beforehand, in voxels; 0 for none.
        smallest: Share of the grid below which a region joins a neighbour; a grid of 5 mm voxels has smaller organs
            than the thousandth of SegVol's code.
        largest: Share of what is no air above which a region is none: it is what lies around organs.
    """

    scale: float = 0.3
    sigma: float = 0.0
    smallest: float = 0.0003
    largest: float = 0.3

    def __post_init__(self) -> None:
        """Refuse numbers that name nothing."""
        if self.scale <= 0 or self.sigma < 0:
            raise ValueError(f"scale={self.scale} must be above 0 and sigma={self.sigma} not below")
        if not FEWEST <= self.smallest < self.largest <= 1:
            raise ValueError(
                f"smallest={self.smallest} and largest={self.largest} must be shares from {FEWEST:.2g} on, in order"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def pseudo_labels(volume: npt.NDArray[np.float32], how: PseudoMasks | None = None) -> npt.NDArray[np.int16]:
    """Regions of a volume ``(D, H, W)`` in [0, 1]: 0 where there is none, then 1, 2, ... from the largest on.

    Air is no region, nor is what is too small or too large. The same volume gives the same regions.
    """
    how = how or PseudoMasks()
    body = volume > AIR
    smoothed = gaussian_filter(volume, how.sigma) if how.sigma else volume
    least = max(round(how.smallest * volume.size), 1)
    found = felzenszwalb(smoothed, scale=how.scale, min_size=least, where=body)
    sizes = np.bincount(found.ravel())
    sizes[0] = 0
    kept = [
        region for region in np.argsort(-sizes, kind="stable") if least <= sizes[region] <= how.largest * body.sum()
    ]
    renamed = np.zeros(len(sizes), np.int16)
    renamed[kept] = np.arange(1, len(kept) + 1)
    return renamed[found]


def felzenszwalb(
    volume: npt.NDArray[np.floating[Any]],
    *,
    scale: float,
    min_size: int = 1,
    where: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int32]:
    """Segment a volume ``(D, H, W)`` by its grey values: labels from 1 on, 0 outside ``where``.

    Two components are joined by an edge that costs no more than the largest cost within either, plus ``scale`` over its
    size (section 4 of the paper). Components below ``min_size`` voxels then join the neighbour that is most alike.
    """
    inside = np.ones(volume.shape, bool) if where is None else where
    costs, ends = _edges(volume, inside)
    number = int(inside.sum())
    parents, sizes = list(range(number)), [1] * number
    bounds = [float(scale)] * number  # largest cost within, plus scale / size

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    for cost, (one, other) in zip(costs.tolist(), ends.tolist(), strict=True):
        one, other = root(one), root(other)
        if one != other and cost <= bounds[one] and cost <= bounds[other]:
            if sizes[one] < sizes[other]:
                one, other = other, one
            parents[other] = one
            sizes[one] += sizes[other]
            bounds[one] = cost + scale / sizes[one]
    for one, other in ends.tolist() if min_size > 1 else ():
        one, other = root(one), root(other)
        if one != other and min(sizes[one], sizes[other]) < min_size:
            parents[other] = one
            sizes[one] += sizes[other]
    labels = np.zeros(volume.shape, np.int32)
    roots = np.array([root(node) for node in range(number)], np.int64)
    labels[inside] = np.unique(roots, return_inverse=True)[1] + 1
    return labels


def _edges(
    volume: npt.NDArray[np.floating[Any]], inside: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Costs ``(E,)`` of the edges between neighbours inside, from the cheapest on, and their two nodes ``(E, 2)``."""
    nodes = np.full(volume.shape, -1, np.int64)
    nodes[inside] = np.arange(int(inside.sum()))
    costs, ends = [], []
    for axis in range(3):
        first, last = [slice(None)] * 3, [slice(None)] * 3
        first[axis], last[axis] = slice(None, -1), slice(1, None)
        one, other = tuple(first), tuple(last)
        both = inside[one] & inside[other]
        costs.append(np.abs(volume[one][both].astype(np.float64) - volume[other][both]))
        ends.append(np.stack([nodes[one][both], nodes[other][both]], axis=1))
    cost = np.concatenate(costs)
    order = np.argsort(cost, kind="stable")
    return cost[order], np.concatenate(ends)[order]
