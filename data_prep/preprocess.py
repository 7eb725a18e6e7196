"""From a scan to what the model sees, and back: one frozen object for preparing, training, evaluating and using.

Part of m3d-lamed; import through `m3d`.

The order is fixed: reorient, find the intensity limits on the whole scan, crop to the foreground, map to [0, 1], lay
the grid. `Prepared` keeps the way back, so that masks, boxes and points end on the scan's own voxels.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.boxes import Box
from data_prep.steps import crop, foreground, reorient, resample
from data_prep.volume import BadScan, Volume
from data_prep.way import Way

FILE_NAME = "preprocess.json"

__all__ = ["Foreground", "Intensity", "MinMax", "Percentile", "Prepared", "Preprocess", "Window", "rescale"]


@dataclass(frozen=True)
class Window:
    """Fixed limits in stored units (HU for CT): the same grey means the same tissue in every scan."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ValueError(f"an intensity window needs lo < hi, got lo={self.lo}, hi={self.hi}")

    def limits(self, volume: Volume) -> tuple[float, float]:
        """The window itself."""
        return self.lo, self.hi


@dataclass(frozen=True)
class Percentile:
    """Limits at two percentiles of the whole scan: for MR and other arbitrary units."""

    lo: float = 0.5
    hi: float = 99.5

    def __post_init__(self) -> None:
        if not 0 <= self.lo < self.hi <= 100:
            raise ValueError(f"percentiles need 0 <= lo < hi <= 100, got lo={self.lo}, hi={self.hi}")

    def limits(self, volume: Volume) -> tuple[float, float]:
        """The two percentiles of all voxels."""
        lo, hi = np.percentile(volume.array, [self.lo, self.hi]).tolist()
        return lo, hi


@dataclass(frozen=True)
class MinMax:
    """Limits at the lowest and highest voxel, as the published M3D weights expect."""

    def limits(self, volume: Volume) -> tuple[float, float]:
        """Lowest and highest voxel of the whole scan."""
        return volume.range


Intensity = Window | Percentile | MinMax
_INTENSITIES: dict[str, type[Window] | type[Percentile] | type[MinMax]] = {
    "window": Window,
    "percentile": Percentile,
    "minmax": MinMax,
}


@dataclass(frozen=True)
class Foreground:
    """Crop to the voxels above a value in stored units (None: above the scan's lowest voxel), plus a margin."""

    above: float | None = None
    margin_mm: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin_mm) and self.margin_mm >= 0):
            raise ValueError(f"margin_mm must be zero or more, got {self.margin_mm}")
        if self.above is not None and not math.isfinite(self.above):
            raise ValueError(f"above must be a number or None, got {self.above}")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a scan becomes the model's input; ``spacing`` None stretches it over the grid, as published."""

    grid: tuple[int, int, int]
    orientation: str | None = "SPL"
    intensity: Intensity = MinMax()
    crop: Foreground | None = None
    spacing: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 3 or not all(isinstance(side, int) and side > 0 for side in self.grid):
            raise ValueError(f"grid must be three positive whole numbers (D, H, W), got {self.grid}")
        if self.orientation is not None:
            _check_codes(self.orientation)
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(float(side) for side in self.spacing))
            if len(self.spacing) != 3 or not all(math.isfinite(side) and side > 0 for side in self.spacing):
                raise ValueError(f"spacing must be three positive numbers in mm, got {self.spacing}")

    def apply(self, volume: Volume) -> Prepared:
        """Prepare a scan, remembering the way back."""
        turned, turn = reorient(volume, self.orientation or volume.orientation)
        low, high = self.intensity.limits(volume)
        cut, cutting = crop(turned, self._box(turned))
        mapped = Volume(rescale(cut.array, low, high), cut.affine)
        if mapped.range[0] == mapped.range[1]:
            raise BadScan(
                f"every voxel to be shown lies outside the intensity limits {low:g} to {high:g} (the scan has "
                f"{volume.range[0]:g} to {volume.range[1]:g}); are its units what this model expects?"
            )
        grid, lattice = resample(mapped, self.grid, self.spacing)
        facts = {"kind": _kind(self.intensity), "lo": low, "hi": high, "min": volume.range[0], "max": volume.range[1]}
        return Prepared(
            array=grid.array,
            affine=grid.affine,
            source=volume,
            intensity=facts,
            steps=(turn, cutting, lattice),
            memory="F" if np.isfortran(volume.array) else "C",
            warnings=(*self._unit_warnings(volume), *self._size_warnings(turned, cut, grid)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the way back."""
        return {
            "grid": list(self.grid),
            "orientation": self.orientation,
            "intensity": {"kind": _kind(self.intensity), **dataclasses.asdict(self.intensity)},
            "crop": None if self.crop is None else dataclasses.asdict(self.crop),
            "spacing": None if self.spacing is None else list(self.spacing),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
        """Build from what `to_dict` gave; an unknown key is an error, never ignored."""
        values = _checked(fields, cls, "preprocess")
        if "intensity" in values:
            values["intensity"] = _intensity(values["intensity"])
        if values.get("crop") is not None:
            if not isinstance(values["crop"], Mapping):
                raise ValueError(f"crop: {values['crop']!r} is no group of keys, such as {{above: -400}}")
            values["crop"] = Foreground(**_checked(values["crop"], Foreground, "crop"))
        for name in ("grid", "spacing"):
            if values.get(name) is not None:
                values[name] = _three(values[name], name)
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Preprocess:
        """Read how a checkpoint folder prepares its scans.

        Raises:
            FileNotFoundError: It has no ``preprocess.json``.
            ValueError: That file is damaged.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: this is no M3D checkpoint, or it is not whole")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, folder: Path) -> Path:
        """Write ``preprocess.json`` into a checkpoint folder; `read` is the way back."""
        path = folder / FILE_NAME
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        return path

    def _box(self, volume: Volume) -> Box:
        if self.crop is None:
            return Box((0, 0, 0), volume.shape)
        above = volume.range[0] if self.crop.above is None else self.crop.above
        margin = [math.ceil(self.crop.margin_mm / side - 1e-6) for side in volume.spacing]
        box = foreground(volume.array, above, margin)
        if box is None:
            low, high = volume.range
            raise BadScan(f"nothing is above {above:g} to crop to (the scan has {low:g} to {high:g}); wrong units?")
        return box

    def _unit_warnings(self, volume: Volume) -> list[str]:
        low, high = volume.range
        if isinstance(self.intensity, Window) and self.intensity.lo <= -500 and low >= 0:
            return [f"no voxel is negative ({low:g} to {high:g}): is this CT in Hounsfield units?"]
        return []

    def _size_warnings(self, turned: Volume, cut: Volume, grid: Volume) -> list[str]:
        if self.spacing is None:
            return []
        notes = []
        for letter, wanted, used in zip(turned.orientation, self.spacing, grid.spacing, strict=True):
            if used > wanted * 1.01:
                notes.append(
                    f"{used:.3g} mm instead of {wanted:.3g} along {letter}, to fit the whole scan into the grid"
                )
        return notes


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Way):
    """What the model sees: ``array`` on the grid in [0, 1], where that grid lies, and the way back to the scan."""

    array: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    source: Volume
    intensity: dict[str, Any]
    warnings: tuple[str, ...] = ()


def rescale(array: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float32]:
    """Map ``low``..``high`` to 0..1, clipping what lies outside."""
    if not low < high:
        raise BadScan(f"the intensity limits coincide at {low:g}: nothing to see between them")
    result: npt.NDArray[np.float32] = np.subtract(array, np.float32(low), dtype=np.float32, order="C")
    result /= np.float32(high - low)
    np.clip(result, 0.0, 1.0, out=result)
    return result


def _kind(intensity: Intensity) -> str:
    return next(name for name, kind in _INTENSITIES.items() if isinstance(intensity, kind))


def _intensity(fields: object) -> Intensity:
    if not isinstance(fields, Mapping):
        raise ValueError(f"intensity: {fields!r} is no group of keys, such as {{kind: window, lo: -200, hi: 400}}")
    name = fields.get("kind", "")
    if name not in _INTENSITIES:
        raise ValueError(f"unknown intensity kind {name!r}; {_hint(str(name), _INTENSITIES)}")
    kind = _INTENSITIES[name]
    return kind(**_checked({key: value for key, value in fields.items() if key != "kind"}, kind, "intensity"))


def _three(value: object, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(side, (int, float)) for side in value):
        raise ValueError(f"{name}: {value!r} is no list of three numbers")
    return tuple(value)


def _checked(fields: Mapping[str, Any], kind: type, name: str) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {name}; {_hint(key, known)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise ValueError(f"{name} needs the key {field.name!r}")
    return dict(fields)


def _hint(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def _check_codes(codes: str) -> None:
    pairs = ("RL", "AP", "SI")
    if len(codes) != 3 or any(sum(letter in pair for letter in codes) != 1 for pair in pairs):
        raise ValueError(f"orientation must name each patient axis once, like 'SPL' or 'RAS', got {codes!r}")
