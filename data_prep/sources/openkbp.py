"""OpenKBP as a source: a thin list over `data_prep.openkbp`, which reads the cases.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_prep.openkbp import cases, read_case
from data_prep.sources.base import Entry
from data_prep.sources.splits import split_named

__all__ = ["OpenKBP"]


@dataclass(frozen=True, kw_only=True)
class OpenKBP:
    """Head-and-neck CTs with clinical contours, converted from the public repository (MIT licence).

    Layout::

        root/cases.json                            cut_by_crop of each patient; optional
        root/<train|validation>/pt_<n>/ct.nii.gz   HU
        root/<train|validation>/pt_<n>/structures.nii.gz

    Never complete: a structure that was not contoured is not absent. Each patient has one scan.
    """

    name: ClassVar[str] = "openkbp"

    root: Path
    splits: tuple[str, ...] = ("train", "validation")

    def entries(self) -> Iterator[Entry]:
        """Every case of the splits, by patient number."""
        for split in self.splits:
            for folder in cases(self.root, split):
                yield Entry(
                    dataset="OpenKBP",
                    license="MIT",
                    image_id=folder.name,
                    patient_id=folder.name,
                    split=split_named(split, f"{self.root}"),
                    files=(folder / "ct.nii.gz", folder / "structures.nii.gz"),
                    read=partial(read_case, folder),
                )
