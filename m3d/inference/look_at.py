"""What the model will see of a scan, before any model is loaded: facts, warnings, and a picture of both.

Only a checkpoint's ``preprocess.json`` is read, so nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.boxes import Box, to_mm
from data_prep.preprocess import Prepared, Preprocess
from data_prep.volume import Volume
from m3d.inference.planes import NOTICE, Finding, Window, choose_window, is_oblique, mid_planes
from m3d.inference.results import describe_scan

__all__ = ["Look", "look_at"]

SCHEMA = "m3d.inspect/1"
SEEN = "the model sees this"


@dataclass(frozen=True, eq=False)
class Look:
    """A scan beside what a model makes of it."""

    volume: Volume
    prepared: Prepared
    preprocess: Preprocess
    model_id: str
    path: Path | None = None

    @property
    def grid(self) -> Volume:
        """What the model sees, as a volume of its own: intensities 0 to 1 where they lie in the patient."""
        return Volume(self.prepared.array, self.prepared.affine)

    @property
    def crop(self) -> Box:
        """The part of the scan that reaches the model, in whole voxels of the scan."""
        return self.prepared.crop

    @property
    def clipped(self) -> tuple[float, float]:
        """Which part of the scan's voxels is darker, and brighter, than the window can tell."""
        array, limits = self.volume.array, self.prepared.intensity
        return float((array < limits["lo"]).mean()), float((array > limits["hi"]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, schema ``m3d.inspect/1``."""
        grid, limits = self.grid, self.prepared.intensity
        below, above = self.clipped
        lowest, highest = self.volume.range
        return {
            "schema": SCHEMA,
            "scan": {
                **describe_scan(self.volume, self.path),
                "size_mm": _rounded(np.multiply(self.volume.shape, self.volume.spacing)),
                "range": [lowest, highest],
                "oblique": is_oblique(self.volume),
            },
            "model": {
                "id": self.model_id,
                "window": [limits["lo"], limits["hi"]],
                "window_kind": limits["kind"],
                "darker": round(below, 4),
                "brighter": round(above, 4),
                "crop": {"lo": _rounded(self.crop.lo), "hi": _rounded(self.crop.hi)},
                "crop_mm": {
                    "lo": _rounded(to_mm(self.crop, self.volume.affine).lo),
                    "hi": _rounded(to_mm(self.crop, self.volume.affine).hi),
                },
                "grid": list(grid.shape),
                "grid_spacing_mm": _rounded(grid.spacing),
                "grid_orientation": grid.orientation,
            },
            "preprocess": self.preprocess.to_dict(),
            "warnings": list(self.prepared.warnings),
            "notice": NOTICE,
        }

    def save_picture(self, path: Path) -> None:
        """Draw the scan's three mid-planes, the model's view of it framed, and that view below."""
        from m3d.inference.overlay import Row, draw_rows, save_png

        frame = Finding(SEEN, box=self.crop)
        middle = np.array(self.crop.center) - 0.5
        window = choose_window(self.volume)
        scan = Row(
            mid_planes(self.volume, [frame], centre=middle.tolist()),
            window,
            label=f"The scan   {_facts(self.volume)}   {window}",
        )
        grid, limits = self.grid, self.prepared.intensity
        shades = f"{limits['lo']:.4g} to {limits['hi']:.4g} as black to white"
        on_grid = self.prepared.points_to_grid(middle[None])[0]
        whole = Box((0, 0, 0), grid.shape)
        seen = Row(
            mid_planes(grid, centre=on_grid.tolist(), around=whole),
            Window(0.0, 1.0),
            label=f"What {self.model_id} sees   {_facts(grid)}   {shades}",
            smooth=False,
        )
        notes = [f"Warning: {warning}" for warning in self.prepared.warnings]
        if is_oblique(self.volume):
            notes.insert(0, "Oblique scan, shown along its own axes, the closest to the patient's.")
        save_png(draw_rows([scan, seen], [frame], title="What the model will see", notes=notes), path)


def look_at(volume: Volume, preprocess: Preprocess, *, model_id: str, path: Path | None = None) -> Look:
    """Prepare a scan as the model would and keep both.

    Raises:
        BadScan: The model could see nothing in it.
    """
    return Look(volume, preprocess.apply(volume), preprocess, model_id, path)


def _facts(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.shape))
    return f"{shape} voxels of {' x '.join(f'{side:.3g}' for side in volume.spacing)} mm, {volume.orientation}"


def _rounded(values: Any) -> list[float]:  # noqa: ANN401
    return [round(float(value), 4) for value in values]
