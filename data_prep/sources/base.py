"""What a source of data is: a folder of a known layout that lists its images without reading them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from data_prep.case import Case
from data_prep.draft import Draft

__all__ = ["SPLITS", "Entry", "Source"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a source, found but not read.

    ``read`` reads it whenever a worker gets to it, so it must be picklable: a `functools.partial` of a function of a
    module. ``files`` are those it will read; ``drafts`` is what the source itself says of the image. ``image_id`` is
    unique within ``dataset``. ``derive`` says which truths are derived for it, None those that the job derives.
    """

    dataset: str
    image_id: str
    patient_id: str
    split: str
    files: tuple[Path, ...]
    read: Callable[[], Case]
    license: str | None = None
    drafts: tuple[Draft, ...] = ()
    derive: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"{self.dataset}/{self.image_id}: split {self.split!r} is none of {', '.join(SPLITS)}")


class Source(Protocol):
    """A data set on disk; implementations are frozen dataclasses whose docstring is the layout they read."""

    name: ClassVar[str]

    def entries(self) -> Iterator[Entry]:
        """List every image in a fixed order, reading tables but no voxels; errors name the file and its line."""
