"""Boxes as text. Geometry is numeric everywhere else; a codec is the only place where it becomes words and back.

A codec is one class and one line in `CODECS`; nothing but `Frac3` knows of three axes or of brackets.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from data_prep.boxes import Box
from m3d.config import lookup

START, END = "<bx_start>", "<bx_end>"
_STEPS = 1000
_MINUS, _COMMA = (0x2010, 0x2011, 0x2012, 0x2013, 0x2212, 0xFE63), (0x3001,)
_PLAIN = (  # what keyboards and tokenizers make of a minus, a comma and, in full width, of all of ASCII
    {0xFF01 + number: 0x21 + number for number in range(94)} | dict.fromkeys(_MINUS, "-") | dict.fromkeys(_COMMA, ",")
)
_ITEM = r"(?:[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?!\.?\w)(?:\s?%)?|[+-]?(?:nan|inf(?:inity)?)\b)"
_SEPARATOR = r"(?:\s*[,;|/]\s*|\s+)"
_CORNERS = r"\s?[\])]\s?(?:[,;-]|to\b)?\s?[\[(]\s?"  # what stands between two brackets that hold a corner each
_CANONICAL = re.compile(r"[^,\s]+(?:, [^,\s]+)*")
_FLAGS = re.IGNORECASE | re.ASCII


class BoxCodec(Protocol):
    """Write a box, read boxes tolerantly, and count what was repaired or given up.

    ``counts`` has ``parsed`` (boxes read), ``repaired`` (those of them that were not as the codec writes them), one key
    for each kind of repair, and ``unparsed`` (what was meant as a box and could not be read).
    """

    name: str
    counts: Counter[str]

    def encode(self, box: Box) -> str:
        """Write one box whose frame is ``norm``."""

    def decode(self, text: str) -> list[Box]:
        """Read every box in an answer, in order; never raises."""


@dataclass
class Frac3:
    """``m3d.frac3``: ``<bx_start>[d0, h0, w0, d1, h1, w1]<bx_end>``, fractions of the grid with three decimals.

    The form of M3D-LaMed (REFERENCE A4), for half-open boxes: the published weights write the last voxel itself as the
    upper corner, which decodes as it stands. A side that rounding would make empty is written one step (0.001) long.

    Decoding repairs what can be meant in one way only, and counts each kind: ``tokens`` (``<bx_start>`` or ``<bx_end>``
    is missing, as after ``skip_special_tokens``), ``brackets``, ``separators``, ``decimal_comma``, ``percent``,
    ``corners`` (two brackets, one a corner), ``swapped``, ``clipped`` (a number between -1 and 2 outside the scan) and
    ``thin`` (an empty side, as inclusive corners make it, becomes one step). Whole numbers above 1 may be voxels of any
    grid, thousandths or percent: they are ``unparsed``.
    """

    name: str = "m3d.frac3"
    num_axes: int = 3
    counts: Counter[str] = field(default_factory=Counter)

    def encode(self, box: Box) -> str:
        """Write one normalised box.

        Raises:
            ValueError: The box is not in the ``norm`` frame, has other axes than the codec, or leaves the image.
        """
        if box.frame != "norm":
            raise ValueError(
                f"{self.name} writes boxes in the norm frame, got {box.frame!r}; use data_prep.boxes.to_norm"
            )
        if len(box.lo) != self.num_axes:
            raise ValueError(f"{self.name} writes boxes of {self.num_axes} axes, got lo={box.lo}")
        if not all(-1e-6 <= side <= 1 + 1e-6 for side in (*box.lo, *box.hi)):
            raise ValueError(f"{self.name} writes boxes inside the image, got lo={box.lo}, hi={box.hi}; use Box.clip")
        sides = [_steps(lo, hi) for lo, hi in zip(box.lo, box.hi, strict=True)]
        steps = [lo for lo, _ in sides] + [hi for _, hi in sides]
        return f"{START}[" + ", ".join(f"{step / _STEPS:.3f}" for step in steps) + f"]{END}"

    def decode(self, text: str) -> list[Box]:
        """Read every box, in order."""
        boxes, (anything, numbers) = [], _patterns(self.num_axes)
        for match in anything.finditer(text.translate(_PLAIN)):
            block, tokens = match["block"], bool(match["open"] or match["close"])
            found = match if block is None else numbers.fullmatch(block.strip())
            if block is None and not tokens and not (match["lone"] or self._is_meant(match)):
                continue
            repairs = set() if block is not None or (match["open"] and match["close"]) else {"tokens"}
            box = self._read(found, repairs) if found is not None and found["run"] else None
            if box is None:
                self.counts["unparsed"] += 1
            else:
                boxes.append(box)
                self.counts.update(["parsed", *repairs, *(["repaired"] if repairs else [])])
        return boxes

    def _is_meant(self, match: re.Match[str]) -> bool:
        """Whether numbers without any token are meant as a box."""
        items = re.findall(_ITEM, match["run"], _FLAGS)
        if _brackets(match) == "[]":
            return len(items) >= self.num_axes
        return len(items) == 2 * self.num_axes and all("." in item and -1 <= _number(item) <= 2 for item in items)

    def _read(self, match: re.Match[str], repairs: set[str]) -> Box | None:
        inside = match["run"]
        if _brackets(match) != "[]":
            repairs.add("brackets")
        if re.search(_CORNERS, inside, _FLAGS):
            repairs.add("corners")
        elif _is_decimal_comma(inside, 2 * self.num_axes):
            repairs.add("decimal_comma")
            inside = re.sub(r"[;\s]+", " ", inside).replace(",", ".")
        elif not _CANONICAL.fullmatch(inside):
            repairs.add("separators")
        sides = _fractions(re.findall(_ITEM, inside, _FLAGS), repairs)
        return self._boxed(sides, repairs) if sides is not None and len(sides) == 2 * self.num_axes else None

    def _boxed(self, sides: list[float], repairs: set[str]) -> Box | None:
        """Order the corners, clip them, and give an empty side one step; nothing at all is left of some boxes."""
        pairs = list(zip(sides[: self.num_axes], sides[self.num_axes :], strict=True))
        if any(lo > hi for lo, hi in pairs):
            repairs.add("swapped")
        pairs = [(min(pair), max(pair)) for pair in pairs]
        if all(lo == hi for lo, hi in pairs) or any(hi < 0 or lo > 1 for lo, hi in pairs):
            return None
        clipped = [(max(lo, 0.0), min(hi, 1.0)) for lo, hi in pairs]
        if clipped != pairs:
            repairs.add("clipped")
        if any(lo == hi for lo, hi in clipped):
            repairs.add("thin")
            clipped = [(lo, hi) if lo < hi else _thickened(lo) for lo, hi in clipped]
        return Box(lo=tuple(lo for lo, _ in clipped), hi=tuple(hi for _, hi in clipped), frame="norm")


CODECS: Mapping[str, type[BoxCodec]] = MappingProxyType({"m3d.frac3": Frac3})


def make_codec(name: str) -> BoxCodec:
    """A codec of that name, its counters at zero.

    Raises:
        KeyError: There is none of that name.
    """
    return lookup(CODECS, name)()


def _steps(lo: float, hi: float) -> tuple[int, int]:
    """Both ends in thousandths, at least one apart; the end that is nearer to its next step gives way."""
    low, high = (min(max(round(round(side, 3) * _STEPS), 0), _STEPS) for side in (lo, hi))
    if low < high:
        return low, high
    up = high < _STEPS and (low == 0 or (high + 1) / _STEPS - hi <= lo - (low - 1) / _STEPS)
    return (low, high + 1) if up else (low - 1, high)


def _thickened(at: float) -> tuple[float, float]:
    return (at, at + 1 / _STEPS) if at <= 1 - 1 / _STEPS else (at - 1 / _STEPS, at)


@functools.cache
def _patterns(num_axes: int) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Anything that may be a box, and the numbers of one: in brackets or not, in one row or a corner a bracket."""
    corner = rf"{_ITEM}(?:{_SEPARATOR}{_ITEM}){{{num_axes - 1}}}"
    row = rf"{_ITEM}(?:{_SEPARATOR}{_ITEM})*"
    numbers = (
        rf"(?P<left>(?:[\[(]\s?){{0,2}})(?<![\w.])(?P<run>{corner}{_CORNERS}{corner}(?=\s?[\])])|{row})"
        r"(?P<right>(?:\s?[\])]){0,2})"
    )
    anything = (
        rf"{START}(?P<block>[^<]*){END}"
        rf"|(?:(?P<open>{START})\s?)?{numbers}(?P<close>\s?{END})?"
        rf"|(?P<lone>{START})"
    )
    return re.compile(anything, _FLAGS), re.compile(numbers, _FLAGS)


def _is_decimal_comma(inside: str, count: int) -> bool:
    """``0,1; 0,2; ...``: as many pairs as there are numbers in a box."""
    pairs = re.split(r"\s*;\s*|\s+", inside)
    return len(pairs) == count and all(re.fullmatch(r"[01],\d+", pair, re.ASCII) for pair in pairs)


def _fractions(items: list[str], repairs: set[str]) -> list[float] | None:
    """The numbers as fractions, None where they can be meant in several ways or in none."""
    sides = [_number(item) for item in items]
    percent = {item.endswith("%") for item in items}
    if percent == {True}:
        repairs.add("percent")
        sides = [side / 100 for side in sides]
    elif all(re.fullmatch(r"[+-]?\d+", item) for item in items) and not set(sides) <= {0.0, 1.0}:
        return None
    sensible = len(percent) == 1 and all(-1 <= side <= 2 for side in sides)  # nan is never between
    return sides if sensible else None


def _number(item: str) -> float:
    return float(item.rstrip("%").strip())


def _brackets(match: re.Match[str]) -> str:
    return match["left"][:1] + match["right"][-1:]
