"""Which item goes where: the data set in its own order, each process its slice of every step.

Nothing is shuffled or dropped here; the data set decides what an index is. So where a run goes on is a number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class Slices(Sampler[list[int]]):
    """The micro-batches of one process: of each step's ``batch`` indices, in order, its own share.

    After the last index the first follows, so that a last step that is not full leaves nothing out.
    """

    def __init__(self, length: int, *, steps: int, batch: int, micro_batch: int, rank: int, world: int) -> None:
        self.length, self.steps, self.batch, self.micro_batch = length, steps, batch, micro_batch
        self.share = batch // world
        self.first = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        """Yield indices, micro-batch by micro-batch."""
        for step in range(self.steps):
            start = step * self.batch + self.first
            for index in range(start, start + self.share, self.micro_batch):
                yield [number % self.length for number in range(index, index + self.micro_batch)]

    def __len__(self) -> int:
        """Micro-batches of all steps."""
        return self.steps * self.share // self.micro_batch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed everything that may be drawn from in a step; no two steps or processes share a seed."""
    drawn = random.Random(f"{seed}/{step}/{rank}")
    torch.manual_seed(drawn.getrandbits(63))
    np.random.seed(drawn.getrandbits(32))
    random.seed(drawn.getrandbits(63))
