"""A scan with its labels: what every source of labelled data becomes.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.volume import Volume

__all__ = ["Case", "Unit", "layered"]

Unit = Literal["HU", "norm01", "arbitrary"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A volume, its label map on the same voxels and the names of the labels.

    ``labels`` is ``(D, H, W)``, or ``(L, D, H, W)`` where structures overlap; a value has one name in all layers.
    ``complete`` is True only where a name without voxels is certainly absent (phantoms): a clinical contour that is
    missing was not drawn, which says nothing. ``cut_by_crop`` names structures that end where the scan was cut.
    ``unit`` is that of the voxels; ``placed`` is False where the source has lost spacing and orientation, so that no
    mm, mL or side may be derived.
    """

    id: str
    patient_id: str
    volume: Volume
    labels: npt.NDArray[np.integer[Any]]
    names: Mapping[int, str]
    complete: bool = False
    cut_by_crop: tuple[str, ...] = ()
    modality: str = "CT"
    unit: Unit = "HU"
    placed: bool = True
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse labels that lie on other voxels, have no name, or share one."""
        if self.labels.ndim not in (3, 4) or self.labels.shape[-3:] != self.volume.shape:
            raise ValueError(f"{self.id}: labels have shape {self.labels.shape}, the scan {self.volume.shape}")
        nameless = sorted(set(np.unique(self.labels).tolist()) - {0, *self.names})
        if nameless:
            raise ValueError(f"{self.id}: labels {nameless} have no name; known: {dict(self.names)}")
        known = list(self.names.values())
        twice = sorted({name for name in known if known.count(name) > 1})
        if twice:
            raise ValueError(f"{self.id}: {', '.join(twice)} names two labels; give each label a name of its own")

    @property
    def layers(self) -> npt.NDArray[np.integer[Any]]:
        """The labels with their layers: ``(L, D, H, W)``, one layer where nothing overlaps."""
        return self.labels if self.labels.ndim == 4 else self.labels[None]

    @property
    def present(self) -> tuple[str, ...]:
        """The names that have voxels, in the order of the names."""
        there = set(np.unique(self.labels).tolist())
        return tuple(name for value, name in self.names.items() if value in there)

    def mask(self, name: str) -> npt.NDArray[np.bool_]:
        """The voxels of a structure, none where it is not labelled.

        Raises:
            KeyError: The case knows no such name.
        """
        for value, known in self.names.items():
            if known == name:
                return np.asarray((self.layers == value).any(axis=0))
        raise KeyError(f"{self.id} has no structure {name!r}; known: {', '.join(self.names.values())}")


def layered(masks: Mapping[str, npt.NDArray[np.bool_]]) -> tuple[npt.NDArray[np.integer[Any]], dict[int, str]]:
    """Pack masks that may overlap into as few label maps as their order allows: labels ``(L, D, H, W)`` and names.

    Raises:
        ValueError: There is no mask, or two differ in shape.
    """
    shapes = {mask.shape for mask in masks.values()}
    if len(shapes) != 1:
        raise ValueError(f"masks of one shape are needed, got {sorted(shapes) or 'none'}")
    kind = np.uint8 if len(masks) < 256 else np.uint16
    layers: list[npt.NDArray[np.integer[Any]]] = [np.zeros(shapes.pop(), kind)]
    names = {}
    for value, (name, mask) in enumerate(masks.items(), start=1):
        mask = mask.astype(bool, copy=False)
        free = next((layer for layer in layers if not layer[mask].any()), None)
        if free is None:
            free = np.zeros(mask.shape, kind)
            layers.append(free)
        free[mask] = value
        names[value] = name
    return np.stack(layers), names
