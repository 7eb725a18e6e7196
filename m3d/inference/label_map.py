"""The masks of a result as one label map, with the tables by which other programs name and colour it.

ITK-SNAP reads ``label-map.txt`` (Segmentation, Import Label Descriptions), 3D Slicer ``label-map.ctbl`` (the color node
to choose for the label map); ``label-map.json`` says all of it, and how much of each mask overlaps gave to others.

What lies in several masks goes by ``overlaps``:

- ``smaller``: to the structure with fewer voxels, which the larger one would hide (of equals, to the later one);
- ``last``: to the one that comes later in the result;
- ``keep``: to all of them. Masks that overlap are written to as many maps as that needs, ``label-map-2.nii.gz`` and on,
  with the same values and tables.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from data_prep.case import layered
from data_prep.volume import Volume
from data_prep.write import write_mask
from m3d.inference.overlay import PALETTE
from m3d.inference.planes import NOTICE
from m3d.inference.results import (
    LABELS_NAME,
    LABELS_SCHEMA,
    FoundMask,
    Result,
    describe_scan,
    distinct_slugs,
    labels_files,
    staged,
    write_json,
)

__all__ = ["Overlaps", "color_of", "label_map_files", "write_label_map"]

Overlaps = Literal["smaller", "last", "keep"]
STEM = Path(LABELS_NAME).stem
SNAP_NAME, SLICER_NAME = f"{STEM}.txt", f"{STEM}.ctbl"
GOLDEN = 0.618033988749895  # of the circle of hues: neighbours in order are far apart in colour
SNAP_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
    0     0    0    0        0  0  0    "Clear Label"
"""


@dataclass(frozen=True, eq=False)
class _Label:
    """One structure: its value in the map, its names and colour, and the map that it lies in."""

    value: int
    mask: FoundMask = field(repr=False)
    slug: str
    color: str
    file: str
    voxels: int

    @property
    def rgb(self) -> tuple[int, int, int]:
        red, green, blue = bytes.fromhex(self.color[1:])
        return red, green, blue

    @property
    def plain(self) -> str:
        """Its name in one line without double quotes, which would end it too soon for ITK-SNAP."""
        name = "".join(letter if letter.isprintable() else " " for letter in self.mask.name.replace('"', "'"))
        return " ".join(name.split()) or self.slug

    def to_dict(self) -> dict[str, Any]:
        """``hidden_voxels`` are those of its mask that overlaps gave to others."""
        return {
            "value": self.value,
            "name": self.mask.name,
            "slug": self.slug,
            "color": self.color,
            "file": self.file,
            "voxels": self.voxels,
            "hidden_voxels": int(np.count_nonzero(self.mask.array)) - self.voxels,
        }


def write_label_map(
    folder: Path | str, result: Result, *, overlaps: Overlaps = "smaller", force: bool = False
) -> tuple[Path, ...]:
    """Write the masks of a result as one label map on the scan's own grid, with its tables; returns what was written.

    Values count from 1 in the order of the masks; an empty mask has a value and no voxels. Masks that were only drawn
    to measure them take part unless the answer drew that structure itself.

    Raises:
        ValueError: The result has no masks, or ``overlaps`` is unknown.
        FileExistsError: Something would be replaced and ``force`` is not given; nothing is written then.
        OSError: The disk is full; nothing of the map is left behind.
    """
    if overlaps not in get_args(Overlaps):
        raise ValueError(f"unknown overlaps {overlaps!r}; known: {', '.join(get_args(Overlaps))}")
    numbered = _taking_part(result)
    if not numbered:
        raise ValueError("a label map needs masks, and the result has none; ask for a structure with segment")
    masks = [mask for _, mask in numbered]
    maps = _kept(masks) if overlaps == "keep" else _painted(masks, overlaps)
    files = label_map_files(len(maps))
    labels = _labels(numbered, maps)
    replaced = labels_files(folder) if force else []
    with staged(folder, files, force=force, needed=sum(one.nbytes for one in maps) + 100_000) as stage:
        for name, one in zip(files, maps, strict=False):
            _write_map(stage / name, one, result.volume)
        (stage / SNAP_NAME).write_text(_snap_table(labels), encoding="utf-8")
        (stage / SLICER_NAME).write_text(_slicer_table(labels), encoding="utf-8")
        write_json(stage / LABELS_NAME, _said(result, labels, files, overlaps))
    for name in set(replaced) - set(files):
        (Path(folder) / name).unlink(missing_ok=True)
    return tuple(Path(folder) / name for name in files)


def label_map_files(num_maps: int = 1) -> list[str]:
    """The names of all files, the maps first."""
    maps = [f"{STEM}.nii.gz", *(f"{STEM}-{number}.nii.gz" for number in range(2, num_maps + 1))]
    return [*maps, SNAP_NAME, SLICER_NAME, LABELS_NAME]


def color_of(number: int) -> str:
    """The colour of a result's mask, counted from 0, as ``#RRGGBB``: the pictures' first, then ones of their own."""
    if number < len(PALETTE):
        return PALETTE[number]
    saturation, value = (0.85, 0.55, 0.7)[number % 3], (0.95, 0.75, 0.6)[number // 3 % 3]
    rgb = colorsys.hsv_to_rgb(number * GOLDEN % 1, saturation, value)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)


def _taking_part(result: Result) -> list[tuple[int, FoundMask]]:
    """Masks with their number in the result."""
    drawn = {mask.name for mask in result.masks[result.num_measured :]}
    return [
        (number, mask)
        for number, mask in enumerate(result.masks)
        if number >= result.num_measured or mask.name not in drawn
    ]


def _kept(masks: Sequence[FoundMask]) -> list[npt.NDArray[np.integer[Any]]]:
    return list(layered({str(number): mask.array for number, mask in enumerate(masks)})[0])


def _painted(masks: Sequence[FoundMask], overlaps: Overlaps) -> list[npt.NDArray[np.integer[Any]]]:
    """One map; what is painted later covers what was painted before."""
    order = list(range(len(masks)))
    if overlaps == "smaller":
        order.sort(key=lambda number: -int(np.count_nonzero(masks[number].array)))
    painted: npt.NDArray[np.integer[Any]] = np.zeros(masks[0].array.shape, np.uint8 if len(masks) < 256 else np.uint16)
    for number in order:
        painted[masks[number].array] = number + 1
    return [painted]


def _labels(
    numbered: Sequence[tuple[int, FoundMask]], maps: Sequence[npt.NDArray[np.integer[Any]]]
) -> tuple[_Label, ...]:
    slugs, files = distinct_slugs([mask.name for _, mask in numbered]), label_map_files(len(maps))
    labels = []
    for value, (number, mask) in enumerate(numbered, start=1):
        counts = [int(np.count_nonzero(one[mask.array] == value)) for one in maps]
        at = int(np.argmax(counts))
        labels.append(_Label(value, mask, slugs[value - 1], color_of(number), files[at], counts[at]))
    return tuple(labels)


def _write_map(path: Path, labels: npt.NDArray[np.integer[Any]], volume: Volume) -> None:
    """As a mask; where 255 values are not enough, as uint16 with a mask's header."""
    if labels.dtype == np.uint8:
        write_mask(path, labels, like=volume)
        return
    import nibabel as nib

    write_mask(path, labels > 0, like=volume)
    header = nib.Nifti1Image.from_filename(path).header.copy()
    header.set_data_dtype(np.uint16)
    nib.Nifti1Image(labels, None, header).to_filename(path)


def _snap_table(labels: Sequence[_Label]) -> str:
    rows = [
        f'  {label.value:3d}   {red:3d}  {green:3d}  {blue:3d}  {1:7d}  1  1    "{label.plain}"\n'
        for label in labels
        for red, green, blue in [label.rgb]
    ]
    return SNAP_HEADER + "".join(rows)


def _slicer_table(labels: Sequence[_Label]) -> str:
    """Names are slugs: a space would end them, and Slicer shows an underscore as a space."""
    rows = [f"{label.value} {label.slug} {' '.join(map(str, label.rgb))} 255\n" for label in labels]
    head = f"# Color table file {SLICER_NAME}\n# {len(labels) + 1} values\n0 Background 0 0 0 0\n"
    return head + "".join(rows)


def _said(result: Result, labels: Sequence[_Label], files: Sequence[str], overlaps: Overlaps) -> dict[str, Any]:
    return {
        "schema": LABELS_SCHEMA,
        "files": list(files),
        "tables": {"itk_snap": SNAP_NAME, "slicer": SLICER_NAME},
        "overlaps": overlaps,
        "background": 0,
        "labels": [label.to_dict() for label in labels],
        "scan": describe_scan(result.volume, result.scan_path),
        "model_id": result.model_id,
        "notice": NOTICE,
    }
