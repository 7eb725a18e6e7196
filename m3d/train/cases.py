"""Cases as training reads them: prepared once through the checkpoint's own `Preprocess`, then kept in memory."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.case import Case
from data_prep.openkbp import cases as openkbp_cases
from data_prep.openkbp import read_case
from data_prep.phantoms import head_neck
from data_prep.preprocess import Preprocess
from data_prep.questions import derived_records
from data_prep.record import Record


@dataclass(frozen=True)
class PreparedCase:
    """A case on the model's grid: ``image`` uint8 (255 is 1.0), ``labels`` uint8, both (D, H, W), and its records."""

    id: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    names: dict[int, str]
    spacing: tuple[float, float, float]
    records: tuple[Record, ...]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Image in [0, 1] and labels, ``(D, H, W)`` both."""
        return torch.from_numpy(self.image).float() / 255, torch.from_numpy(self.labels)

    def label_of(self, name: str) -> int:
        """The label value of a structure's name."""
        return next(value for value, known in self.names.items() if known == name)


def prepare(case: Case, preprocess: Preprocess, *, split: str = "train") -> PreparedCase:
    """Put a case on the model's grid and derive its records."""
    prepared = preprocess.apply(case.volume)
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0).tolist()
    return PreparedCase(
        id=case.id,
        image=np.round(prepared.array * 255).astype(np.uint8),
        labels=prepared.mask_to_grid(case.labels).astype(np.uint8),
        names=dict(case.names),
        spacing=(spacing[0], spacing[1], spacing[2]),
        records=tuple(derived_records(case, random.Random(case.id), split=split)),
    )


def openkbp(root: Path, split: str) -> Iterator[Case]:
    """The head-and-neck CTs of a split, read one at a time."""
    for folder in openkbp_cases(root, split):
        yield read_case(folder)


def phantoms(seeds: Sequence[int], *, absent: float = 0.1) -> Iterator[Case]:
    """Phantoms by seed; each structure is left out with probability ``absent``."""
    names = ("brainstem", "spinal cord", "right parotid", "left parotid", "esophagus", "larynx", "mandible")
    for seed in seeds:
        rng = random.Random(seed)
        yield head_neck(seed, without=[name for name in names if rng.random() < absent])


def prepare_all(cases: Iterable[Case], preprocess: Preprocess) -> Iterator[PreparedCase]:
    """Prepare cases one at a time, so that only their small forms stay in memory."""
    for case in cases:
        yield prepare(case, preprocess)
