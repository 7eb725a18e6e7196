"""A scan with its labels: what every source of labelled data becomes.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.volume import Volume

__all__ = ["Case"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A volume, its label map on the same voxels and the names of the labels.

    ``complete`` is True only where a name without voxels is certainly absent (phantoms): a clinical contour that is
    missing was not drawn, which says nothing. ``cut_by_crop`` names structures that end where the scan was cut.
    """

    id: str
    patient_id: str
    volume: Volume
    labels: npt.NDArray[np.uint8]
    names: Mapping[int, str]
    complete: bool = False
    cut_by_crop: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse labels that lie on other voxels, or have no name."""
        if self.labels.shape != self.volume.shape:
            raise ValueError(f"{self.id}: labels have shape {self.labels.shape}, the scan {self.volume.shape}")
        nameless = sorted(set(np.unique(self.labels).tolist()) - {0, *self.names})
        if nameless:
            raise ValueError(f"{self.id}: labels {nameless} have no name; known: {dict(self.names)}")

    def mask(self, name: str) -> npt.NDArray[np.bool_]:
        """The voxels of a structure, none where it is not labelled.

        Raises:
            KeyError: The case knows no such name.
        """
        for value, known in self.names.items():
            if known == name:
                return np.asarray(self.labels == value)
        raise KeyError(f"{self.id} has no structure {name!r}; known: {', '.join(self.names.values())}")
