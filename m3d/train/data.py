"""The data set of all stages: volumes of stores, drawn so that an index alone says which, and what is said of it.

Item i is a pure function of (seed, i): its epoch, its place in that epoch's permutation, its exchanges and its
augmentation. So a sampler is sequential, a resumed run skips to its index, and ranks and workers never overlap.
"""

import logging
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from torch.utils.data import Dataset

from data_prep.laterality import mirrored
from m3d.train.cases import Arrays, TrainingCase
from m3d.train.collate import Collator, collate_masks
from m3d.train.views import Exchanges, Look, Masks, View

__all__ = ["Collator", "Exchanges", "Group", "Masks", "VolumeDataset", "collate_masks"]

log = logging.getLogger(__name__)

Item = TypeVar("Item", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that are drawn alike, such as those of a store: an epoch shows each of them ``weight`` times on average."""

    cases: Sequence[TrainingCase]
    weight: float = 1.0
    name: str = "cases"

    def __post_init__(self) -> None:
        """Refuse a weight that is none."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} of {self.name} must be 0 or more")


def names_in(groups: Sequence[Group]) -> list[str]:
    """All names of structures, and those of the mirrored ones."""
    names = {name for group in groups for case in group.cases for name in case.image.names.values()}
    return sorted(names | {mirrored(name) for name in names})


class Memory:
    """The arrays that were read last, as many as fit into ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.kept: OrderedDict[str, Arrays] = OrderedDict()

    def read(self, case: TrainingCase) -> Arrays:
        """The arrays of a case, from memory where they are kept."""
        if case.id in self.kept:
            self.kept.move_to_end(case.id)
            return self.kept[case.id]
        arrays = case.read()
        size = sum(array.nbytes for array in arrays)
        if size <= self.limit:
            self.kept[case.id] = arrays
            self.used += size
        while self.used > self.limit:
            _, oldest = self.kept.popitem(last=False)
            self.used -= sum(array.nbytes for array in oldest)
        return arrays


class VolumeDataset(Dataset[Item], Generic[Item]):
    """Volumes as a ``view`` shows them, without end: ``len`` only says where training stops.

    Args:
        groups: Cases, or groups of them with weights.
        view: `Exchanges` or `Masks`; cases that it does not want are left out.
        seed: All chance.
        epochs: Says the length, up to a whole ``chunk``; ``length`` overrules it.
        length: Items in all, such as steps x volumes a step.
        window: Items within which those of similar length are brought together; 0 keeps the permutation.
        chunk: How many stand together: the volumes of an optimizer step, on all ranks.
        cache_bytes: Arrays that each process keeps in memory.
    """

    def __init__(
        self,
        groups: Sequence[Group] | Sequence[TrainingCase],
        view: View[Item],
        *,
        seed: int = 0,
        epochs: float = 1,
        length: int | None = None,
        window: int = 0,
        chunk: int = 1,
        cache_bytes: int = 0,
    ) -> None:
        if window < 0 or chunk < 1:
            raise ValueError(f"window={window} must be 0 or more, chunk={chunk} 1 or more")
        self.view, self.seed, self.window, self.chunk = view, seed, window, chunk
        self.groups = [self._wanted(group) for group in _as_groups(groups)]
        self.shares = [round(group.weight * len(group.cases)) for group in self.groups]
        if not sum(self.shares):
            raise ValueError(
                f"none of {sum(len(group.cases) for group in _as_groups(groups))} cases has anything for this stage; "
                "look at the tasks of the store (`m3d data stats`) and at weights"
            )
        self.images = sum(self.shares)
        self.length = -(-round(epochs * self.images) // chunk) * chunk if length is None else length
        self.memory = Memory(cache_bytes)

    def _wanted(self, group: Group) -> Group:
        kept = [case for case in group.cases if self.view.wants(case)]
        if len(kept) < len(group.cases):
            log.info("%s: %d of %d cases have something to show", group.name, len(kept), len(group.cases))
        return Group(cases=kept, weight=group.weight, name=group.name)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        """The item at an index below the length.

        Raises:
            IndexError: The index is not.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        draw = self.draw_at(index)
        case = self.case_of(draw)
        look = Look(case, self.memory.read(case), self._rng(draw), index, f"{self.seed}/{draw}")
        return self.view.show(look)

    def case_of(self, draw: int) -> TrainingCase:
        """The case of the draw of this number."""
        epoch, place = divmod(draw, self.images)
        group, number = _permutation(self.seed, epoch, tuple(self.shares), tuple(self._sizes()))[place]
        return self.groups[group].cases[number]

    def draw_at(self, index: int) -> int:
        """Which draw stands at an index: within a window, draws are ordered by length."""
        if self.window < 2:
            return index
        epoch, place = divmod(index, self.images)
        first = epoch * self.images + place - place % self.window
        last = min(first + self.window, (epoch + 1) * self.images)
        return self._ordered(first, last)[index - first]

    def _ordered(self, first: int, last: int) -> tuple[int, ...]:
        """The draws of a window, those of similar length together, at most a window kept in mind."""
        kept: tuple[tuple[int, int], tuple[int, ...]] | None = getattr(self, "_window", None)
        if kept is not None and kept[0] == (first, last):
            return kept[1]
        sizes = {draw: self.view.size(self.case_of(draw), self._rng(draw)) for draw in range(first, last)}
        order = sorted(sizes, key=lambda draw: (sizes[draw], draw))
        head = min(-first % self.chunk, len(order))  # so that chunks begin where an optimizer step begins
        chunks = [order[place : place + self.chunk] for place in range(head, len(order), self.chunk)]
        rest = chunks.pop() if chunks and len(chunks[-1]) < self.chunk else []
        random.Random(f"{self.seed}/window/{first}").shuffle(chunks)
        found = (*order[:head], *(draw for chunk in chunks for draw in chunk), *rest)
        self._window = ((first, last), found)
        return found

    def _sizes(self) -> list[int]:
        return [len(group.cases) for group in self.groups]

    def _rng(self, draw: int) -> random.Random:
        return random.Random(f"{self.seed}/{draw}")


def _as_groups(groups: Sequence[Group] | Sequence[TrainingCase]) -> list[Group]:
    if all(isinstance(group, Group) for group in groups):
        return [group for group in groups if isinstance(group, Group)]
    return [Group(cases=[case for case in groups if isinstance(case, TrainingCase)])]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, shares: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (group, number) of every item of an epoch.

    A group's items are the next of an endless row of permutations of it, so that a weight of 0.5 shows the other half
    in the next epoch.
    """
    items = []
    for group, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        for turn in range(epoch * share // size if size else 0, -(-(epoch + 1) * share // size) if size else 0):
            order = list(range(size))
            random.Random(f"{seed}/{group}/{turn}").shuffle(order)
            low, high = max(0, epoch * share - turn * size), min(size, (epoch + 1) * share - turn * size)
            items += [(group, number) for number in order[low:high]]
    random.Random(f"{seed}/epoch/{epoch}").shuffle(items)
    return items
