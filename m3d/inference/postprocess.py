"""What may be done to masks once they are drawn: by option, never unasked, and said in the result.

Voxels belong together where they share a face, an edge or a corner (26 neighbours). A hole is background that cannot
get outside through faces (6 neighbours, which is what goes with 26 in 3D); what opens to the scan's edge is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data_prep.boxes import occupied

__all__ = ["CONNECTIVITY", "PostProcess"]

CONNECTIVITY = 26
ROUNDING = 1e-9  # 125 voxels of 0.008 mL are 1 mL


@dataclass(frozen=True)
class PostProcess:
    """Holes are filled first, then components below ``min_volume_ml`` removed, then all but the largest.

    Of components that are equally large, the first in the array's order stays. Without options nothing is done, and
    it is false.
    """

    largest_component: bool = False
    fill_holes: bool = False
    min_volume_ml: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_volume_ml) and self.min_volume_ml >= 0):
            raise ValueError(f"the minimum volume must be 0 mL or more, got {self.min_volume_ml}")

    def __bool__(self) -> bool:
        return self.largest_component or self.fill_holes or self.min_volume_ml > 0

    def __str__(self) -> str:
        done = [
            "holes filled" if self.fill_holes else "",
            f"components of at least {self.min_volume_ml:g} mL" if self.min_volume_ml else "",
            "largest component" if self.largest_component else "",
        ]
        return ", ".join(filter(None, done)) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``connectivity`` is how many neighbours a voxel of a component has."""
        return {
            "fill_holes": self.fill_holes,
            "min_volume_ml": self.min_volume_ml,
            "largest_component": self.largest_component,
            "connectivity": CONNECTIVITY,
        }

    def apply(
        self, mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float], *, voxel_ml: float | None = None
    ) -> npt.NDArray[np.bool_]:
        """A new mask; ``voxel_ml`` is a voxel's volume where the grid is sheared, else the spacing tells it."""
        done = mask.astype(bool)
        window = occupied(done)
        if window is None or not self:
            return done
        part = done[window]
        if self.fill_holes:
            part = _filled(part)
        if self.min_volume_ml or self.largest_component:
            part = self._components(part, math.prod(spacing_mm) / 1000 if voxel_ml is None else voxel_ml)
        done[window] = part
        return done

    def _components(self, part: npt.NDArray[np.bool_], voxel_ml: float) -> npt.NDArray[np.bool_]:
        labels, _ = ndimage.label(part, structure=np.ones((3, 3, 3), bool))
        sizes = np.bincount(labels[part])
        keep = sizes * voxel_ml >= self.min_volume_ml * (1 - ROUNDING)
        keep[0] = False
        if self.largest_component:
            keep &= np.arange(len(sizes)) == sizes.argmax()
        return np.asarray(keep[labels])


def _filled(part: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """``part`` reaches its window's edges on purpose: what lies beyond them is outside."""
    labels, _ = ndimage.label(np.pad(~part, 1, constant_values=True))
    return np.asarray((labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1])
