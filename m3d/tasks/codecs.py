"""Boxes as text. Geometry is numeric everywhere else; a codec is the only place where it becomes words and back."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from data_prep.boxes import Box


class BoxCodec(Protocol):
    """Write a normalised box, read boxes tolerantly, and count what was repaired or given up."""

    name: str
    counts: Counter[str]

    def encode(self, box: Box) -> str:
        """Write one box whose frame is ``norm``."""

    def decode(self, text: str) -> list[Box]:
        """Read every box in an answer, in order."""


@dataclass
class Frac3:
    """``m3d.frac3``: ``<bx_start>[d0, h0, w0, d1, h1, w1]<bx_end>``, fractions of the grid with three decimals.

    The form of M3D-LaMed (REFERENCE A4), for half-open boxes. Decoding takes any separators, orders swapped corners,
    clips to [0, 1], and accepts a missing ``<bx_end>``; ``counts`` says how often each happened.
    """

    name: str = "m3d.frac3"
    counts: Counter[str] = field(default_factory=Counter)

    _block: ClassVar = re.compile(r"<bx_start>(.*?)(?:<bx_end>|(?=<bx_start>)|$)", re.DOTALL)
    _bare: ClassVar = re.compile(r"\[([\d\s.,;-]+)\]")
    _number: ClassVar = re.compile(r"-?\d+(?:\.\d+)?")

    def encode(self, box: Box) -> str:
        """Write one normalised box.

        Raises:
            ValueError: The box is not in the ``norm`` frame.
        """
        if box.frame != "norm":
            raise ValueError(
                f"m3d.frac3 writes boxes in the norm frame, got {box.frame!r}; use data_prep.boxes.to_norm"
            )
        return "<bx_start>[" + ", ".join(f"{side:.3f}" for side in (*box.lo, *box.hi)) + "]<bx_end>"

    def decode(self, text: str) -> list[Box]:
        """Read every box, in order; what has not six numbers is counted as ``unparsed``."""
        blocks = self._block.findall(text) or self._bare.findall(text)
        boxes = []
        for block in blocks:
            sides = [float(number) for number in self._number.findall(block)]
            if len(sides) != 6:
                self.counts["unparsed"] += 1
                continue
            box = self._repaired(sides)
            self.counts["parsed" if box is not None else "unparsed"] += 1
            if box is not None:
                boxes.append(box)
        return boxes

    def _repaired(self, sides: list[float]) -> Box | None:
        clipped = [min(max(side, 0.0), 1.0) for side in sides]
        if clipped != sides:
            self.counts["clipped"] += 1
        pairs = list(zip(clipped[:3], clipped[3:], strict=True))
        if any(lo > hi for lo, hi in pairs):
            self.counts["swapped"] += 1
        lo = tuple(min(pair) for pair in pairs)
        hi = tuple(max(pair) for pair in pairs)
        if any(a == b for a, b in zip(lo, hi, strict=True)):
            return None
        return Box(lo=lo, hi=hi, frame="norm")
