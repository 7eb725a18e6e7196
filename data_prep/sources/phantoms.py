"""Phantoms as a source: data whose truth is exact, for tests, documentation and absence that is certain.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_prep.case import Case
from data_prep.phantoms import NAMES, head_neck
from data_prep.sources.base import SPLITS, Entry

__all__ = ["Phantoms", "left_out"]


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Head-and-neck phantoms, drawn by seed; nothing lies on disk, so ``root`` is not used.

    ``seeds`` gives each split its range, first and past-the-last; ``absent`` is the share of structures left out, which
    are then certainly absent. ``shape``, ``spacing`` and ``orientation`` fix what is otherwise drawn.
    """

    name: ClassVar[str] = "phantoms"

    root: Path | None = None
    seeds: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"train": (0, 64)})
    absent: float = 0.1
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    orientation: str = "PLI"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.seeds) - set(SPLITS))
        if unknown:
            raise ValueError(f"phantoms: seeds has no split {unknown[0]!r}; give ranges for {', '.join(SPLITS)}")
        if not 0 <= self.absent <= 1:
            raise ValueError(f"phantoms: absent={self.absent} is a share between 0 and 1")
        ranges = sorted((first, stop, split) for split, (first, stop) in self.seeds.items())
        for first, stop, split in ranges:
            if not 0 <= first < stop:
                raise ValueError(
                    f"phantoms: seeds of {split}: [{first}, {stop}] holds no seed; write [first, past the last]"
                )
        for (_, stop, one), (first, _, other) in itertools.pairwise(ranges):
            if first < stop:
                raise ValueError(f"phantoms: seed {first} is in {one} and in {other}; keep the ranges apart")

    def entries(self) -> Iterator[Entry]:
        """One phantom a seed, split by split."""
        for split in SPLITS:
            for seed in range(*self.seeds.get(split, (0, 0))):
                yield Entry(
                    dataset="M3D head-and-neck phantom",
                    license="Apache-2.0",
                    image_id=f"phantom_{seed}",
                    patient_id=f"phantom_{seed}",
                    split=split,
                    files=(),
                    read=partial(
                        _draw,
                        seed,
                        absent=self.absent,
                        shape=self.shape,
                        spacing=self.spacing,
                        orientation=self.orientation,
                    ),
                )


def left_out(seed: int, absent: float) -> list[str]:
    """The structures that the phantom of a seed does not have; each is left out with probability ``absent``."""
    rng = random.Random(seed)
    return [name for name in NAMES.values() if rng.random() < absent]


def _draw(
    seed: int,
    *,
    absent: float,
    shape: tuple[int, int, int] | None,
    spacing: tuple[float, float, float] | None,
    orientation: str,
) -> Case:
    return head_neck(seed, shape=shape, spacing=spacing, orientation=orientation, without=left_out(seed, absent))
