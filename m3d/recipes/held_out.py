"""How well a model draws what it has not learned from: by name, by a click and by a box, on the scans' own voxels."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.sources.base import Entry
from m3d.inference.load import M3D
from m3d.inference.scan import NoMask, Scan

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
BY = ("name", "click", "box")


@dataclass(frozen=True)
class Drawn:
    """A structure of a case, drawn one way; ``refused`` where a name was answered without drawing, with a Dice of 0."""

    case: str
    name: str
    by: str
    dice: float
    refused: bool = False


def hard_dice(guess: Mask, truth: Mask) -> float:
    """Twice what two masks share, over both; 1 where both are empty."""
    both = int(guess.sum()) + int(truth.sum())
    return 1.0 if both == 0 else 2.0 * int((guess & truth).sum()) / both


def deepest(mask: Mask, spacing: Sequence[float]) -> tuple[float, float, float]:
    """The voxel of a mask that lies farthest from its surface: where a person would click."""
    depth = distance_transform_edt(np.pad(mask, 1), sampling=spacing)
    d, h, w = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(d - 1), float(h - 1), float(w - 1)


def measure(model: M3D, entries: Sequence[Entry]) -> list[Drawn]:
    """Draw every structure that the entries' scans have, and compare it with its contour; the log names no scan."""
    rows: list[Drawn] = []
    for number, entry in enumerate(entries, start=1):
        case = entry.read()
        scan = model.look(case.volume)
        rows += [one for name in case.present for one in _drawn(scan, case, name)]
        log.info("drew %d of %d", number, len(entries))
    return rows


def _drawn(scan: Scan, case: Case, name: str) -> Iterable[Drawn]:
    truth = case.mask(name)
    try:
        yield Drawn(case.id, name, "name", hard_dice(_mask_of(scan, name), truth))
    except NoMask:
        yield Drawn(case.id, name, "name", 0.0, refused=True)
    click = scan.segment(points=[(deepest(truth, case.volume.spacing), 1)])
    yield Drawn(case.id, name, "click", hard_dice(click.masks[0].array, truth))
    framed = scan.segment(box=box_of_mask(truth))
    yield Drawn(case.id, name, "box", hard_dice(framed.masks[0].array, truth))


def _mask_of(scan: Scan, name: str) -> Mask:
    masks = {mask.name.lower(): mask.array for mask in scan.segment(name).masks}
    return masks[name.lower()]


def summary(rows: Sequence[Drawn]) -> dict[str, Any]:
    """Mean Dice by structure and by prompt, the number of its cases, and all rows."""
    cases: dict[str, dict[str, list[float]]] = defaultdict(lambda: {by: [] for by in BY})
    for row in rows:
        cases[row.name][row.by].append(row.dice)
    means = {
        name: {"n": len(each["name"]), **{by: fmean(each[by]) for by in BY}} for name, each in sorted(cases.items())
    }
    overall = {by: fmean(one[by] for one in means.values()) for by in BY} if means else {}
    return {"structures": means, "mean": overall, "rows": [asdict(row) for row in rows]}
