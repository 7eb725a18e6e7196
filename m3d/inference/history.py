"""The steps of an interactive session: what was said, what came of it, and the way back and forth between them.

A step keeps the voxels that it turned over, eight in a byte, and not the mask: a long session of a large scan stays
small, and going back gives the very mask that was there.
"""

# (D, H, W) = the scan's voxels, (d, h, w) = the model's grid

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data_prep.boxes import Box, box_of_mask
from m3d.inference.prompting import Point, in_words
from m3d.inference.results import FoundMask

__all__ = ["Given", "History", "Mask", "Refined", "Step"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Given:
    """All that has been said of an object, in voxels of the scan; ``mask`` are logits ``(d, h, w)`` of one given."""

    points: tuple[Point, ...] = ()
    box: Box | None = None
    name: str | None = None
    mask: Tensor | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return bool(self.points) or any(one is not None for one in (self.box, self.name, self.mask))

    def __str__(self) -> str:
        said = [] if self.name is None else [repr(self.name)]
        said += [] if self.mask is None else ["a mask"]
        said += [] if self.box is None else [f"box {in_words(self.box.lo)} to {in_words(self.box.hi)}"]
        said += [f"{'inside' if label else 'outside'} {in_words(at)}" for at, label in self.points]
        return ", ".join(said) or "nothing"


@dataclass(frozen=True, eq=False)
class Refined:
    """An object after a step: its mask on the scan's own grid, and the voxel box of what the step changed.

    ``changed`` is half-open, and None where nothing changed; ``notes`` are what to beware of. The mask is read-only.
    """

    mask: FoundMask
    changed: Box | None
    milliseconds: float
    given: Given
    notes: tuple[str, ...] = ()

    @property
    def array(self) -> Mask:
        """The mask's voxels, ``(D, H, W)``."""
        return self.mask.array

    @property
    def score(self) -> float:
        """The mean probability inside, 0 to 1; 0 where nothing was asked for."""
        return self.mask.score


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """What was said up to a step and what the head answered: logits ``(d, h, w)``, which it may be told again."""

    given: Given = Given()
    logits: Tensor | None = field(default=None, repr=False)
    score: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Turn:
    """The voxels in ``box`` that a step turned over, packed."""

    box: Box | None
    flips: npt.NDArray[np.uint8]

    @classmethod
    def between(cls, before: Mask, after: Mask) -> _Turn:
        turned = before ^ after
        if not turned.any():
            return cls(None, np.empty(0, np.uint8))
        box = box_of_mask(turned)
        return cls(box, np.packbits(turned[_inside(box)]))

    def of(self, mask: Mask) -> Mask:
        """The mask on the other side of the step, in either direction."""
        other = mask.copy()
        if self.box is not None:
            region = other[_inside(self.box)]
            region ^= np.unpackbits(self.flips, count=region.size).astype(bool).reshape(region.shape)
        return other


class History:
    """The mask of one object and the steps that made it; those undone wait until another takes their place."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.array: Mask = np.zeros(shape, dtype=bool)
        self._steps: list[tuple[Step, _Turn]] = []
        self._done = 0

    @property
    def step(self) -> Step:
        """The step that is in force, an empty one at the beginning."""
        return self._steps[self._done - 1][0] if self._done else Step()

    def add(self, step: Step, array: Mask) -> Box | None:
        """Go on to another mask; gives the box of what changed."""
        turn = _Turn.between(self.array, array)
        self._steps[self._done :] = [(step, turn)]
        self._done += 1
        self.array = array
        return turn.box

    def undo(self) -> Box | None:
        """Go back one step.

        Raises:
            ValueError: There is none.
        """
        if not self._done:
            raise ValueError("nothing to undo: this is the beginning")
        self._done -= 1
        return self._turn(self._steps[self._done][1])

    def redo(self) -> Box | None:
        """Take the last undo back.

        Raises:
            ValueError: There is none.
        """
        if self._done == len(self._steps):
            raise ValueError("nothing to redo: nothing was undone, or another step has taken its place")
        self._done += 1
        return self._turn(self._steps[self._done - 1][1])

    def _turn(self, turn: _Turn) -> Box | None:
        self.array = turn.of(self.array)
        return turn.box


def _inside(box: Box) -> tuple[slice, ...]:
    return tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))
