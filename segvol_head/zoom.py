"""Zoom out, then zoom in: find a structure in the whole volume, draw it at full resolution.

SegVol's inference (Du et al. 2024, section 2.4). A volume is far larger than the model's grid, so it is first
answered shrunk to one window; then windows at full resolution cover the region where that answer lies, each with the
prompt reflected into it.

Part of m3d-lamed; import through `m3d`.
"""

# P = prompts, D H W = voxels of the full volume, d h w = voxels of the window, which is the model's grid

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_head.prompt_encoder import Sides
from segvol_head.prompts import PADDING, POSITIVE, Prompts, box_of, sample_points

Decode = Callable[[Tensor, Prompts], Tensor]
"""What answers: an image ``(1, 1, d, h, w)`` and P prompts give logits ``(P, 1, d, h, w)``."""

Region = tuple[slice, slice, slice]
Compatibility = Literal["published"]
OVERLAP = 0.5
ROUNDING = 1e-6  # 2.0000001 voxels are two
NO_MASK = "zooming takes no earlier mask; decode with it at the model's grid, or leave it out"


@dataclass(frozen=True)
class Zoomed:
    """The answer to one prompt: logits ``(D, H, W)``, those of the first glance, and where was looked closer.

    ``region`` is None where the first glance found nothing; then both logits are the same.
    """

    logits: Tensor
    global_logits: Tensor
    region: Region | None


@dataclass(frozen=True)
class Window:
    """One window: its place in the padded region, and what the first glance saw there ``(d, h, w)``.

    ``alone`` is a window that holds the whole region, ``missed`` says that the first glance saw nothing in it.
    """

    region: Region
    pad: Sides
    place: Region
    seen: Tensor
    alone: bool
    missed: bool


class Reflection(Protocol):
    """How a prompt on the shrunk volume is carried over to the full one; two ways follow."""

    def region(self, found: Tensor | None) -> Region | None:
        """Where to look closer, given the box ``(6,)`` around the first glance, corners inclusive; None: nothing."""

    def prompt(self, window: Window) -> Prompts | None:
        """What to ask in a window; None: nothing."""


class ExactReflection:
    """Coordinates are carried over exactly, whatever the padding; every kind of prompt goes along.

    Text goes to every window, a point to those it lies in. A box, the user's own where one window holds everything or
    the first glance missed it, else the one around the first glance, goes where there is one. A window that nothing is
    asked about keeps the first glance. The prompt is placed on the full volume (`enlarged`), and a voxel of the first
    glance is ``scale`` of that volume's.
    """

    def __init__(self, prompt: Prompts, shape: Sides, window: Sides, scale: Sequence[float]) -> None:
        if prompt.mask is not None:
            raise ValueError(NO_MASK)
        self._text, self._shape, self._window = prompt.text, shape, window
        self._blur = [math.ceil(side - ROUNDING) for side in scale]
        self._points = self._labels = self._box = None
        if prompt.points is not None and prompt.point_labels is not None:
            real = prompt.point_labels[0].cpu() != PADDING
            self._points = prompt.points[0].cpu().float()[real]
            self._labels = prompt.point_labels[0].cpu()[real]
        if prompt.boxes is not None:
            self._box = prompt.boxes[0].cpu().float().view(2, 3)
        self._geometric = self._points is not None or self._box is not None

    def region(self, found: Tensor | None) -> Region | None:
        """The box around the first glance and what was pointed at, grown to a window where the volume allows.

        One voxel of the first glance is added on every side: its edges are no sharper than that.
        """
        corners = [] if found is None else [found.cpu().view(2, 3)]
        if self._box is not None:
            corners.append(self._box.round())
        if self._points is not None and self._labels is not None:
            corners.append(self._points[self._labels == POSITIVE].round())
        if not any(len(some) for some in corners):
            return None
        everything = torch.cat(corners).long()
        ends = zip(everything.amin(dim=0).tolist(), everything.amax(dim=0).tolist(), strict=True)
        return _slices(
            _grown(low - blur, high + 1 + blur, side, whole)
            for (low, high), blur, side, whole in zip(ends, self._blur, self._window, self._shape, strict=True)
        )

    def prompt(self, window: Window) -> Prompts | None:
        """Text, the points that lie inside, and a box where there is one."""
        starts = zip(window.region, window.pad, window.place, strict=True)
        offset = torch.tensor([float(region.start - pad + place.start) for region, pad, place in starts])
        last = torch.tensor(self._window) - 1.0
        asked: dict[str, Tensor | None] = {"text": self._text}
        if self._points is not None and self._labels is not None:
            local = self._points - offset
            inside = ((local >= -0.5) & (local < last + 0.5)).all(dim=1)
            if inside.any():
                asked |= {"points": local[inside][None], "point_labels": self._labels[inside][None]}
        if self._geometric:
            box = self._local_box(offset, last) if window.alone or window.missed else None
            box = box_of(window.seen) if box is None else box
            asked["boxes"] = None if box is None else box[None]
        if all(value is None for value in asked.values()):
            return None
        return Prompts(**asked).to(window.seen.device)

    def _local_box(self, offset: Tensor, last: Tensor) -> Tensor | None:
        if self._box is None:
            return None
        low, high = self._box - offset
        if bool((high < 0).any() or (low > last).any()):
            return None
        return torch.cat([low.clamp_min(0), torch.minimum(high, last)])


class PublishedReflection:
    """What the released code does: a prompt becomes a map of voxels, enlarged by the nearest neighbour.

    Points are drawn anew from their map in every window, negative ones forgotten. The map is not padded where a
    region thinner than the window is, which shifts the prompt by the padding; an empty box is passed as (-1, ..., -1).
    """

    def __init__(self, prompt: Prompts, shape: Sides, window: Sides, generator: torch.Generator | None) -> None:
        if prompt.mask is not None or (prompt.boxes is not None and prompt.points is not None):
            raise ValueError("the published zoom takes text with either points or a box; leave compatibility unset")
        self._text, self._window, self._shape, self._generator = prompt.text, window, shape, generator
        self._with_points, self._with_box = prompt.points is not None, prompt.boxes is not None
        drawn = torch.zeros(window)
        if prompt.points is not None and prompt.point_labels is not None:
            d, h, w = prompt.points[0][prompt.point_labels[0] == POSITIVE].long().cpu().unbind(-1)
            drawn[d, h, w] = 1
        if prompt.boxes is not None:
            low, high = prompt.boxes[0].int().cpu().view(2, 3)
            drawn[_slices((int(a), int(b) + 1) for a, b in zip(low, high, strict=True))] = 1
        self._map = F.interpolate(drawn[None, None], size=shape, mode="nearest")[0, 0] > 0

    def region(self, found: Tensor | None) -> Region | None:
        """The box around the first glance, grown by half of what it lacks on either side, cut at the borders."""
        if found is None:
            return None
        low, high = found.long().tolist()[:3], found.long().tolist()[3:]
        lacking = [max(0, side - (b - a + 1)) // 2 for a, b, side in zip(low, high, self._window, strict=True)]
        return _slices(
            (max(0, a - half), min(whole, b + half + 1))
            for a, b, half, whole in zip(low, high, lacking, self._shape, strict=True)
        )

    def prompt(self, window: Window) -> Prompts:
        """Text, and a box or freshly drawn points with a box around the first glance."""
        device = window.seen.device
        asked: dict[str, Tensor | None] = {"text": self._text}
        around = window.seen
        prompted = self._map[window.region][window.place]
        if self._with_points:
            points, labels = sample_points(prompted, positive=4, negative=0, generator=self._generator)
            asked |= {"points": points[None], "point_labels": labels[None]}
        if self._with_box and window.alone:
            around = prompted
        if self._with_points or self._with_box:
            box = box_of(around)
            asked["boxes"] = torch.full((1, 6), -1.0) if box is None else box[None]
        return Prompts(**asked).to(device)


def enlarged(prompts: Prompts, scale: Sequence[float]) -> Prompts:
    """Prompts on a shrunk volume, placed on the full one, of which one voxel there is ``scale``."""
    if prompts.mask is not None:
        raise ValueError(NO_MASK)
    by, points, boxes = torch.tensor(scale), None, None
    if prompts.points is not None:
        points = (prompts.points.cpu().float() + 0.5) * by - 0.5
    if prompts.boxes is not None:
        low, high = prompts.boxes.cpu().float().split(3, dim=1)
        boxes = torch.cat([low * by, (high + 1) * by - 1], dim=1)
    return replace(prompts, points=points, boxes=boxes)


def zoom(
    volume: Tensor,
    prompts: Prompts,
    decode: Decode,
    *,
    window: Sides,
    overview: Tensor | None = None,
    overlap: float = OVERLAP,
    compatibility: Compatibility | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Zoomed]:
    """Answer each prompt at the volume's full resolution, one after the other.

    ``volume`` is ``(D, H, W)`` with the model's intensities, ``prompts`` are placed on it shrunk to ``window``, as
    the model's own grid. ``overview`` is that shrunk volume, where it exists already. ``device`` is where ``decode``
    runs; the volume may stay elsewhere, and only a window at a time, and one prompt's logits, are held.
    ``compatibility="published"`` repeats the released code, its mistakes included; ``generator`` draws its points.
    """
    if volume.ndim != 3:
        raise ValueError(f"volume must be (D, H, W), got {tuple(volume.shape)}")
    if overview is not None and tuple(overview.shape) != tuple(window):
        raise ValueError(f"overview must have the window's shape {tuple(window)}, got {tuple(overview.shape)}")
    if compatibility not in (None, "published"):
        raise ValueError(f"compatibility={compatibility!r} must be 'published' or None")
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    scale = [whole / side for whole, side in zip(shape, window, strict=True)]
    reflections: list[Reflection] = [
        PublishedReflection(prompts[p : p + 1], shape, window, generator)
        if compatibility == "published"
        else ExactReflection(enlarged(prompts[p : p + 1], scale), shape, window, scale)
        for p in range(len(prompts))
    ]
    closer = Closer(decode, window, overlap, torch.device(device or volume.device))
    shrink, enlarge = ("nearest-exact", "nearest") if compatibility == "published" else ("trilinear", "trilinear")
    if overview is None:
        overview = F.interpolate(volume[None, None].float(), size=window, mode=shrink)[0, 0]
    return _answers(volume, closer, prompts, reflections, overview, enlarge)


@torch.no_grad()
def _answers(
    volume: Tensor,
    closer: Closer,
    prompts: Prompts,
    reflections: Sequence[Reflection],
    overview: Tensor,
    enlarge: str,
) -> Iterator[Zoomed]:
    if not reflections:
        return
    for glance, reflection in zip(closer.glance(overview, prompts), reflections, strict=True):
        seen = glance[None].to(volume.device).float()
        coarse = F.interpolate(seen, size=tuple(volume.shape), mode=enlarge)[0, 0]
        region = reflection.region(box_of(coarse > 0))
        if region is None:
            yield Zoomed(coarse, coarse, None)
            continue
        logits = coarse.clone()
        logits[region] = closer.look(region, volume[region], coarse[region], reflection)
        yield Zoomed(logits, coarse, region)


@dataclass(frozen=True)
class Closer:
    """Who answers about windows, and how they lie: each overlaps the next by ``overlap`` of its side.

    ``each`` is told of every window that was answered.
    """

    decode: Decode
    window: Sides
    overlap: float = OVERLAP
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    each: Callable[[], object] = lambda: None

    def glance(self, overview: Tensor, prompts: Prompts) -> Tensor:
        """Ask everything about the shrunk volume: ``(d, h, w) -> (P, 1, d, h, w)``."""
        answers = self.decode(overview[None, None].to(self.device), prompts.to(self.device))
        return self._checked(answers, len(prompts))

    def num_windows(self, region: Region) -> int:
        """How many windows `look` asks about."""
        count = 1
        for part, side in zip(region, self.window, strict=True):
            beyond = max(part.stop - part.start - side, 0)
            count *= 1 + math.ceil(beyond / (int(side * (1 - self.overlap)) or 1))
        return count

    @torch.no_grad()
    def look(self, region: Region, image: Tensor, seen: Tensor, reflection: Reflection) -> Tensor:
        """Ask one thing in overlapping windows of a region, each weighing the same: logits of the region's shape.

        ``image`` is the volume there, ``seen`` the logits of the first glance.
        """
        from monai.inferers.utils import sliding_window_inference  # here, because importing monai takes seconds

        padded, pad = _padded(image.float(), self.window)
        first, _ = _padded(seen, self.window)
        alone, missed = tuple(padded.shape) == tuple(self.window), not bool((seen > 0).any())

        def answer(shown: Tensor, places: list[list[slice]]) -> Tensor:
            place = (places[0][2], places[0][3], places[0][4])
            here = first[place].to(self.device)
            asked = reflection.prompt(Window(region, pad, place, here > 0, alone, missed))
            said = here[None, None].clone() if asked is None else self._checked(self.decode(shown, asked), 1).float()
            self.each()
            return said

        options: dict[str, Any] = {"overlap": self.overlap, "mode": "constant", "with_coord": True}
        stitched = sliding_window_inference(
            padded[None, None], self.window, 1, answer, sw_device=self.device, device=image.device, **options
        )
        assert isinstance(stitched, Tensor)
        return stitched[0, 0][_slices((a, a + side) for a, side in zip(pad, seen.shape, strict=True))]

    def _checked(self, logits: Tensor, num_prompts: int) -> Tensor:
        expected = (num_prompts, 1, *self.window)
        if tuple(logits.shape) != expected:
            raise ValueError(f"decode must give {expected} logits for a window, got {tuple(logits.shape)}")
        return logits


def _padded(array: Tensor, window: Sides) -> tuple[Tensor, Sides]:
    """Zeros around an array thinner than the window; also how many before it."""
    lacking = [max(side - own, 0) for side, own in zip(window, array.shape, strict=True)]
    before = (lacking[0] // 2, lacking[1] // 2, lacking[2] // 2)
    amounts = [amount for i in (2, 1, 0) for amount in (before[i], lacking[i] - before[i])]
    return F.pad(array, amounts), before


def _grown(start: int, stop: int, side: int, whole: int) -> tuple[int, int]:
    """The part of an interval inside ``whole``, grown to ``side``; shifted rather than cut at the borders."""
    start, stop = min(max(start, 0), whole - 1), max(min(stop, whole), 1)
    length = min(max(stop - start, side), whole)
    first = min(max(start - (length - (stop - start)) // 2, 0), whole - length)
    return first, first + length


def _slices(intervals: Iterable[tuple[int, int]]) -> Region:
    d, h, w = (slice(a, b) for a, b in intervals)
    return d, h, w
