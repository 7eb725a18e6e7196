"""What there is to draw of a sample: the scan, its true masks and boxes, and those of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.boxes import Box, to_voxel
from data_prep.record import Record
from data_prep.volume import BadScan
from m3d.bench.cases import BenchCase, Opened
from m3d.bench.kinds import TEXT, named
from m3d.bench.mask_files import read_mask
from m3d.bench.page import Drawn, Picture
from m3d.bench.predictions import gathered
from m3d.inference.planes import Finding

__all__ = ["pictures"]


def pictures(folder: Path, cases: Iterable[BenchCase]) -> Picture:
    """How to draw the samples of a run; a scan that cannot be read, and a text, has no picture."""
    by_image = {case.id: case for case in cases}
    records = {record.id: record for case in by_image.values() for record in case.records}
    predictions = gathered(folder)

    @lru_cache(maxsize=2)
    def opened(image: str) -> Opened | None:
        try:
            return by_image[image].open()
        except BadScan:
            return None

    def picture(sample: Mapping[str, Any]) -> Drawn | None:
        record = records.get(sample["id"])
        drawn = record is not None and (record.target.masks or record.target.boxes)
        scan = opened(record.image_id) if record is not None and drawn else None
        if record is None or scan is None:
            return None
        said = predictions.get((named(record.id, str(sample.get("by") or TEXT)), str(sample["sight"])))
        masks = () if said is None else said.masks
        guess = [Finding(mask.name, mask=read_mask(folder, mask, scan.volume)) for mask in masks if mask.file]
        if said is not None:
            guess += [_boxed("box", box, scan) for box in said.boxes if not _inverted(box)]
        return scan.volume, _truth(record, scan), guess

    return picture


def _truth(record: Record, scan: Opened) -> list[Finding]:
    masks = [
        Finding(mask.name, mask=scan.mask(record, number)) for number, mask in enumerate(record.target.masks or ())
    ]
    names = [box.name for box in record.target.boxes or ()]
    return masks + [_boxed(name, box, scan) for name, box in zip(names, scan.boxes(record), strict=True)]


def _boxed(name: str, box: tuple[float, ...], scan: Opened) -> Finding:
    return Finding(name, box=to_voxel(Box(box[:3], box[3:], "norm", name), scan.shape).clip(scan.shape))


def _inverted(box: tuple[float, ...]) -> bool:
    return any(low > high for low, high in zip(box[:3], box[3:], strict=True))
