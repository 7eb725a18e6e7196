"""The way from a scan's voxels to the model's grid and back, apart from the voxels themselves.

A store keeps it beside every prepared volume, so that masks, boxes and points can return to the scan although the scan
is no longer at hand.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.boxes import Box, occupied
from data_prep.steps import Axis, Lattice, View, transform_box, transform_points

__all__ = ["Way"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Way:
    """Reorientation, crop and resampling of one scan; ``memory`` is the order in which the scan's voxels lie."""

    steps: tuple[View, View, Lattice]
    memory: Literal["C", "F"] = "C"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the grid."""
        return self.steps[2].grid

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        """Shape of the scan."""
        return self.steps[0].shape

    @property
    def crop(self) -> Box:
        """The part of the scan that the model sees, in the scan's voxels."""
        whole = Box((0, 0, 0), self.steps[2].shape)
        return transform_box(whole, self.steps[0].matrix @ self.steps[1].matrix)

    @cached_property
    def to_scan_matrix(self) -> npt.NDArray[np.float64]:
        """4x4, grid index -> scan index."""
        turn, cut, lattice = self.steps
        return np.asarray(turn.matrix @ cut.matrix @ lattice.matrix)

    @cached_property
    def to_grid_matrix(self) -> npt.NDArray[np.float64]:
        """4x4, scan index -> grid index."""
        return np.asarray(np.linalg.inv(self.to_scan_matrix), dtype=np.float64)

    def finer(self, factor: float) -> Way:
        """The way to a grid ``factor`` times as fine over the same part of the scan, no finer than its voxels.

        It has no padding, so grids of two factors do not begin at the same place.
        """
        turn, cut, lattice = self.steps
        return Way(steps=(turn, cut, lattice.finer(factor)), memory=self.memory)

    def to_scan(self, array: npt.ArrayLike, *, order: int = 1, fill: float = 0.0) -> npt.NDArray[np.float32]:
        """Values on the grid (logits, probabilities) onto the scan's voxels; ``fill`` where the crop cut away."""
        return self._back(np.asarray(array, dtype=np.float32), order, fill)

    def drawn_on_scan(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Where values of the grid, interpolated onto the scan as `to_scan` does, are above 0, and those values.

        Only what lies near such voxels is interpolated: a large scan with a small structure costs little.
        """
        turn, cut, lattice = self.steps
        mask = np.zeros(self.scan_shape, bool, order=self.memory)
        found = occupied(logits > 0)
        if found is None:
            return mask, np.zeros(0, np.float32)
        reached = [
            # Between neighbours, of which one is above 0; before the first and behind the last the edge goes on.
            np.flatnonzero((places > side.start - 1) & (places < side.stop))
            for side, places in (
                (
                    side,
                    axis.to_grid(np.arange(axis.size, dtype=np.float64)).clip(
                        axis.start, max(axis.stop - 1, axis.start)
                    ),
                )
                for side, axis in zip(found, lattice.axes, strict=True)
            )
        ]
        if not all(len(some) for some in reached):
            return mask, np.zeros(0, np.float32)
        d, h, w = (slice(int(some[0]), int(some[-1]) + 1) for some in reached)
        values = np.empty([side.stop - side.start for side in (d, h, w)], np.float32)
        lattice.undo(logits, values, part=(d, h, w))
        inside = values > 0
        cut.apply(turn.apply(mask))[d, h, w] = inside
        return mask, values[inside]

    def mask_to_scan(self, mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A mask or label map on the grid onto the scan's voxels: nearest voxel, same dtype, zero outside."""
        return self._back(np.asarray(mask), 0, 0)

    def mask_to_grid(self, mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A mask or label map on the scan onto the grid: nearest voxel, same dtype, zero in the padding."""
        mask = np.asarray(mask)
        if mask.shape != self.scan_shape:
            raise ValueError(f"the mask has shape {mask.shape}, the scan {self.scan_shape}")
        turn, cut, lattice = self.steps
        return lattice.apply(cut.apply(turn.apply(mask)), order=0, fill=0)

    def points_to_grid(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scan voxel indices to (fractional) grid voxel indices: ``(N, 3) -> (N, 3)``."""
        return transform_points(points, self.to_grid_matrix)

    def points_to_scan(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Grid voxel indices to (fractional) scan voxel indices: ``(N, 3) -> (N, 3)``."""
        return transform_points(points, self.to_scan_matrix)

    def box_to_grid(self, box: Box) -> Box:
        """A voxel box on the scan to one on the grid: not rounded, not clipped."""
        return transform_box(box, self.to_grid_matrix)

    def box_to_scan(self, box: Box) -> Box:
        """A voxel box on the grid to one on the scan: not rounded, not clipped."""
        return transform_box(box, self.to_scan_matrix)

    def _back(self, array: npt.NDArray[Any], order: int, fill: float) -> npt.NDArray[Any]:
        turn, cut, lattice = self.steps
        full = np.full(self.scan_shape, fill, dtype=array.dtype, order=self.memory)
        lattice.undo(array, cut.apply(turn.apply(full)), order=order)
        return full

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the way back."""
        views = [
            {
                "shape": list(view.shape),
                "axes": list(view.axes),
                "slices": [[s.start, s.stop, s.step] for s in view.slices],
            }
            for view in self.steps[:2]
        ]
        lattice = {"axes": [asdict(axis) for axis in self.steps[2].axes], "smooth": self.steps[2].smooth}
        return {"views": views, "lattice": lattice}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Way:
        """Build from what `to_dict` gave."""
        turn, cut = (
            View(tuple(view["shape"]), tuple(view["axes"]), tuple(slice(*ends) for ends in view["slices"]))  # type: ignore[arg-type]  # three of each
            for view in fields["views"]
        )
        d, h, w = (Axis(**axis) for axis in fields["lattice"]["axes"])
        return cls(steps=(turn, cut, Lattice((d, h, w), smooth=fields["lattice"]["smooth"])))
