"""Cases as training reads them: prepared once through the checkpoint's own `Preprocess`, in memory or in a store."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.case import Case
from data_prep.openkbp import cases as openkbp_cases
from data_prep.openkbp import read_case
from data_prep.phantoms import NAMES, head_neck
from data_prep.prepare import Job, prepare_case
from data_prep.record import Record
from data_prep.store import Store, StoredImage, unpack


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A scan on the model's grid: ``array`` (D, H, W) as a store keeps it, ``labels`` (L, D, H, W), and its records."""

    image: StoredImage
    array: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    records: tuple[Record, ...]

    @property
    def id(self) -> str:
        """The id of the image."""
        return self.image.image_id

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the grid in mm, ones where it is not known."""
        d, h, w = self.image.media.spacing_mm or (1.0, 1.0, 1.0)
        return d, h, w

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Image in [0, 1] ``(D, H, W)`` and label maps ``(L, D, H, W)``."""
        return torch.from_numpy(unpack(self.array)), torch.from_numpy(self.labels)

    def mask(self, labels: Tensor, name: str) -> Tensor:
        """The voxels of a structure in label maps of this case, ``(L, D, H, W) -> (D, H, W)`` bool."""
        value = next(value for value, known in self.image.names.items() if known == name)
        return (labels == value).any(dim=0)


def prepare(case: Case, job: Job, *, split: str = "train") -> PreparedCase:
    """Put a case on the model's grid, with the records that the job derives."""
    done = prepare_case(case, job, split=split)
    return PreparedCase(done.image, done.array, done.labels, tuple(done.records))


def stored(root: Path | str, split: str) -> Iterator[PreparedCase]:
    """The images of a split of a store, read one at a time."""
    store = Store(root)
    for image in store.images.values():
        if image.split == split:
            yield PreparedCase(image, image.array(), image.labels(), tuple(store.records.of(image.image_id)))


def openkbp(root: Path, split: str) -> Iterator[Case]:
    """The head-and-neck CTs of a split, read one at a time."""
    for folder in openkbp_cases(root, split):
        yield read_case(folder)


def phantoms(seeds: Sequence[int], *, absent: float = 0.1) -> Iterator[Case]:
    """Phantoms by seed; each structure is left out with probability ``absent``."""
    for seed in seeds:
        rng = random.Random(seed)
        yield head_neck(seed, without=[name for name in NAMES.values() if rng.random() < absent])


def prepare_all(cases: Iterable[Case], job: Job) -> Iterator[PreparedCase]:
    """Prepare cases one at a time, so that only their small forms stay in memory."""
    for case in cases:
        yield prepare(case, job)
