"""Drawing on a scan: what prompts the mask head goes in, and masks and boxes on the scan's own voxels come out.

Every mask of a `Scan` is made by `draw`, and every one of them by `found_mask` from its logits.
"""

# M = masks, C = width of the mask head, (d, h, w) = the model's grid

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import Box, to_mm, to_voxel
from data_prep.preprocess import Prepared
from data_prep.way import Way
from m3d.inference.prompting import Point, ScanFrame, as_prompts, place_box, place_points, refuse_contradictions
from m3d.inference.results import FoundBox, FoundMask
from m3d.inference.zooming import Sharp, ZoomIn
from segvol_head import Prompts

if TYPE_CHECKING:
    from m3d.inference.scan import Scan

__all__ = ["draw", "found_box", "found_mask", "geometry_prompts"]

OUTSIDE = -30.0
"""The logit of what the model's grid leaves out of the scan."""


@torch.inference_mode()
def draw(
    scan: Scan,
    names: Sequence[str],
    text: Tensor | None,
    geometry: Prompts | None,
    *,
    keep_logits: bool = False,
    zoom: ZoomIn | None = None,
) -> tuple[tuple[FoundMask, ...], tuple[str, ...]]:
    """The named masks of what ``text`` says, ``(M, C)``, of ``geometry`` or of both, and what to beware of.

    ``geometry`` is one prompt, on the model's grid, for all. Nothing prompted draws nothing. With ``zoom`` what is
    drawn on that grid is the first glance alone. Where ``seg_config.merge`` is "mean", one mask stands for all names.

    Raises:
        ValueError: There is too little memory to zoom in.
    """
    count = len(text) if text is not None else int(geometry is not None)
    if not count:
        return (), ()
    masks, notes = [], []
    if text is not None and count == 1 < len(names):
        text, count = text.expand(len(names), -1), len(names)
        notes.append(f"{scan.model_id} draws one mask for all that an answer names (seg_config.merge is 'mean')")
    owner = torch.zeros(count, dtype=torch.long, device=scan.model.device)
    if geometry is not None:
        geometry = geometry[owner].to(scan.model.device)
    logits = scan.model.draw(scan.features, text=text, volume_index=owner, prompts=geometry)
    glances = [own.float().cpu().numpy() for own in logits[: len(names), 0]]
    for number, (name, own, sharp) in enumerate(zip(names, glances, _sharpened(glances, text, zoom), strict=True)):
        mask = found_mask(scan.prepared, own, name or f"mask {number + 1}", sharp)
        masks.append(replace(mask, logits=own) if keep_logits else mask)
        if not mask.array.any():
            notes.append(f"the mask of {mask.name!r} is empty: the model sees none of it")
    return tuple(masks), tuple(notes)


def _sharpened(
    glances: Sequence[npt.NDArray[np.float32]], text: Tensor | None, zoom: ZoomIn | None
) -> Iterator[Sharp | None]:
    """What is seen from closer, mask by mask; None where nobody looks, or there is nothing to look at."""
    if zoom is None or not zoom.useful:
        return repeat(None, len(glances))
    said = [None if text is None else text[number : number + 1] for number in range(len(glances))]
    return zoom.draw_all([zoom.plan(glance, text=own) for glance, own in zip(glances, said, strict=True)])


def found_mask(prepared: Prepared, logits: npt.NDArray[np.float32], name: str, sharp: Sharp | None = None) -> FoundMask:
    """A mask on the scan, of logits ``(d, h, w)`` on the grid that it was prepared to, or as it was seen from closer.

    Logits are brought back, not a mask: the edge is then found at the scan's own resolution.
    """
    if sharp is None:
        inside, values = prepared.drawn_on_scan(logits)
        if not len(values):
            values = prepared.to_scan(logits, order=1, fill=OUTSIDE).max(keepdims=True)
        sharp = Sharp(inside, float((1 / (1 + np.exp(-values))).mean()))
    return FoundMask(
        name=name,
        array=sharp.array,
        score=sharp.score,
        volume_ml=float(np.count_nonzero(sharp.array) * prepared.source.voxel_ml),
    )


def found_box(prepared: Prepared, box: Box, name: str) -> FoundBox:
    """A normalised box of the grid, clipped to the scan's voxels."""
    volume, on_scan = prepared.source, prepared.box_to_scan(to_voxel(box, prepared.shape))
    lo = [float(min(max(side, 0), limit)) for side, limit in zip(on_scan.lo, volume.shape, strict=True)]
    hi = [float(min(max(side, 0), limit)) for side, limit in zip(on_scan.hi, volume.shape, strict=True)]
    voxel = replace(on_scan, lo=tuple(lo), hi=tuple(hi))
    return FoundBox(name=name, voxel=voxel, mm=to_mm(voxel, volume.affine))


def geometry_prompts(
    prepared: Prepared,
    points: Sequence[Point],
    box: Box | None,
    *,
    frame: ScanFrame = "voxel",
    way: Way | None = None,
) -> Prompts | None:
    """Points in ``frame`` and a box in its own, both on the scan, as one prompt on the grid; None without either.

    The grid is the model's, or that at the end of another ``way``.

    Raises:
        ValueError: One lies outside the scan, or they contradict each other, or the box is in voxels and the frame mm.
    """
    volume = prepared.source
    if box is not None and (box.frame, frame) == ("voxel", "mm"):
        raise ValueError("frame='mm', but the box is in voxels; give Box(lo, hi, 'mm'), or all in voxels")
    placed = [(place_points([at], volume, frame=frame)[0], label) for at, label in points]
    framed = None if box is None else place_box(box, volume)
    refuse_contradictions(placed, framed)
    return as_prompts(way or prepared, placed, framed)
