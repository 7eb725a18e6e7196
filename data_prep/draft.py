"""What is asked of an image and what is true of it, before the image has its place in a store.

Sources and rules write drafts, which know only the scan; `data_prep.prepare` turns them into records, whose geometry is
that of the stored voxels.

Part of m3d-lamed; import through `m3d`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.boxes import Box

__all__ = ["Draft", "Measured"]


@dataclass(frozen=True)
class Measured:
    """A measure (`data_prep.derived.measures`), the structures that it was taken of, and what it gave."""

    measure: str
    names: tuple[str, ...]
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One entry of a scan that has not been prepared yet.

    ``boxes`` and ``masks`` hold names of the case's structures, whose geometry is taken from the prepared labels; a box
    of its own is a `Box` in the scan's voxel frame. None means that there is no such target, an empty tuple that what
    was asked for is certainly absent. ``evidence`` is what was measured to know the answer. ``dataset`` is given where
    it is not the scan's: questions written about the scans of another data set. ``meta["derivation"]`` says how a
    derived truth was made.
    """

    task: str
    template: str
    subtask: str | None = None
    slots: Mapping[str, Any] = field(default_factory=dict)
    lang: str = "en"
    dataset: str | None = None
    text: str | None = None
    options: tuple[str, ...] | None = None
    choice: int | None = None
    value: float | None = None
    quantity: str | None = None
    unit: str | None = None
    evidence: tuple[Measured, ...] | None = None
    boxes: tuple[str | Box, ...] | None = None
    masks: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
