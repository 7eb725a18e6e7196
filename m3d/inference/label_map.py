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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from data_prep.case import layered
from data_prep.volume import Volume
from data_prep.write import write_mask
from m3d.inference.colors import color_of
from m3d.inference.overlay import save_overlay
from m3d.inference.planes import NOTICE, Finding
from m3d.inference.results import (
    LABELS_NAME,
    LABELS_SCHEMA,
    PICTURE_BYTES,
    FoundMask,
    Result,
    describe_scan,
    distinct_slugs,
    labels_files,
    refuse_scan,
    staged,
    write_json,
)

__all__ = ["Overlaps", "label_map_files", "write_label_map"]

Overlaps = Literal["smaller", "last", "keep"]
STEM = Path(LABELS_NAME).stem
SNAP_NAME, SLICER_NAME, PICTURE_NAME = f"{STEM}.txt", f"{STEM}.ctbl", f"{STEM}.png"
Labels = npt.NDArray[np.unsignedinteger[Any]]
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
    """One structure: its value, its mask if it has one, its names and colour, and the map that it lies in."""

    value: int
    name: str
    mask: FoundMask | None = field(repr=False)
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
        name = "".join(letter if letter.isprintable() else " " for letter in self.name.replace('"', "'"))
        return " ".join(name.split()) or self.slug

    def to_dict(self) -> dict[str, Any]:
        """``hidden_voxels`` are those of its mask that overlaps gave to others; what was not drawn has no mask."""
        return {
            "value": self.value,
            "name": self.name,
            "drawn": self.mask is not None,
            "present": None if self.mask is None or self.mask.present is None else round(self.mask.present, 6),
            "slug": self.slug,
            "color": self.color,
            "file": self.file,
            "voxels": self.voxels,
            "hidden_voxels": 0 if self.mask is None else int(np.count_nonzero(self.mask.array)) - self.voxels,
        }


def write_label_map(
    folder: Path | str,
    result: Result,
    *,
    overlaps: Overlaps = "smaller",
    doubtful: bool = False,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write the masks of a result as one label map on the scan's own grid, with its tables; returns what was written.

    Where several structures were asked for by name, values count from 1 in that order, so that they mean the same for
    every scan; what was not drawn keeps its value and has no voxels. Else they count in the order of the masks; masks
    that were only drawn to measure them take part unless the answer drew that structure itself. ``label-map.png`` shows
    all masks where most of them are seen. A structure that is probably not in the scan (`FoundMask.present`) is not
    painted unless ``doubtful`` is given; it keeps its value.

    Raises:
        ValueError: The result has no masks and names none, or ``overlaps`` is unknown.
        FileExistsError: Something would be replaced and ``force`` is not given; nothing is written then.
        OSError: The disk is full; nothing of the map is left behind.
    """
    if overlaps not in get_args(Overlaps):
        raise ValueError(f"unknown overlaps {overlaps!r}; known: {', '.join(get_args(Overlaps))}")
    if not result.masks and not result.asked:
        raise ValueError("a label map needs masks, and the result has none; ask for a structure with segment")
    maps, labels = _labels(result if doubtful else _without_doubtful(result), overlaps)
    files = label_map_files(len(maps))
    refuse_scan(folder, files, result.scan_path)
    replaced = labels_files(folder) if force else []
    needed = sum(one.nbytes for one in maps) + PICTURE_BYTES + 100_000
    with staged(folder, files, force=force, needed=needed) as stage:
        for name, one in zip(files, maps, strict=False):
            _write_map(stage / name, one, result.volume)
        (stage / SNAP_NAME).write_text(_snap_table(labels), encoding="utf-8")
        (stage / SLICER_NAME).write_text(_slicer_table(labels), encoding="utf-8")
        _draw(stage / PICTURE_NAME, labels, result)
        write_json(stage / LABELS_NAME, _said(result, labels, files, overlaps))
    for name in set(replaced) - set(files):
        (Path(folder) / name).unlink(missing_ok=True)
    return tuple(Path(folder) / name for name in files)


def label_map_files(num_maps: int = 1) -> list[str]:
    """The names of all files, the maps first."""
    maps = [f"{STEM}.nii.gz", *(f"{STEM}-{number}.nii.gz" for number in range(2, num_maps + 1))]
    return [*maps, SNAP_NAME, SLICER_NAME, PICTURE_NAME, LABELS_NAME]


def _without_doubtful(result: Result) -> Result:
    """The same masks, empty where the structure is probably not there."""
    masks = (replace(mask, array=np.zeros_like(mask.array)) if mask.doubtful else mask for mask in result.masks)
    return replace(result, masks=tuple(masks))


def _taking_part(result: Result) -> list[tuple[int, FoundMask]]:
    """Masks with the place that their colour goes by; those that were only measured, if the answer has none of them."""
    drawn = {mask.name for mask in result.masks[result.num_measured :]}
    return [
        (place, mask)
        for number, (place, mask) in enumerate(zip(result.places, result.masks, strict=True))
        if number >= result.num_measured or mask.name not in drawn
    ]


def _values(result: Result, masks: Sequence[tuple[int, FoundMask]]) -> list[int]:
    """Of each mask: its name's place among those that were asked for, else as they come."""
    return [place + 1 for place, _ in masks] if result.asked else list(range(1, len(masks) + 1))


def _kept(values: Sequence[int], masks: Sequence[FoundMask]) -> list[Labels]:
    """As many maps as it takes."""
    packed, _ = layered({str(number): mask.array for number, mask in enumerate(masks)})
    return list(np.array([0, *values], _kind(values))[packed])


def _painted(values: Sequence[int], masks: Sequence[FoundMask], overlaps: Overlaps) -> list[Labels]:
    """One map; what is painted later covers what was painted before."""
    order = list(range(len(masks)))
    if overlaps == "smaller":
        order.sort(key=lambda number: -int(np.count_nonzero(masks[number].array)))
    painted: Labels = np.zeros(masks[0].array.shape, _kind(values))
    for number in order:
        painted[masks[number].array] = values[number]
    return [painted]


def _kind(values: Sequence[int]) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if max(values) < 256 else np.uint16


def _labels(result: Result, overlaps: Overlaps) -> tuple[list[Labels], tuple[_Label, ...]]:
    """The maps, and what their values mean: those of the masks and of what was asked for and is not drawn."""
    numbered = _taking_part(result)
    values, masks = _values(result, numbered), [mask for _, mask in numbered]
    if not masks:
        maps = [np.zeros(result.volume.shape, _kind([len(result.asked)]))]
    else:
        maps = _kept(values, masks) if overlaps == "keep" else _painted(values, masks, overlaps)
    meant: dict[int, tuple[str, str, FoundMask | None]] = {
        value: (mask.name, color_of(place), mask) for value, (place, mask) in zip(values, numbered, strict=True)
    }
    for place, name in enumerate(result.asked):
        meant.setdefault(place + 1, (name, color_of(place), None))
    slugs, files = distinct_slugs([meant[value][0] for value in sorted(meant)]), label_map_files(len(maps))
    labels = []
    for value, name_slug in zip(sorted(meant), slugs, strict=True):
        name, color, mask = meant[value]
        counts = [0 if mask is None else int(np.count_nonzero(one[mask.array] == value)) for one in maps]
        at = int(np.argmax(counts))
        labels.append(_Label(value, name, mask, name_slug, color, files[at], counts[at]))
    return maps, tuple(labels)


def _write_map(path: Path, labels: Labels, volume: Volume) -> None:
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


def _draw(path: Path, labels: Sequence[_Label], result: Result) -> None:
    masks = [label.mask for label in labels if label.mask is not None]
    findings = [
        Finding(
            label.name,
            mask=None if label.mask is None else label.mask.array,
            note="not drawn" if label.mask is None else f"{label.mask.volume_ml:.1f} mL",
            color=label.color,
        )
        for label in labels
    ]
    save_overlay(
        path,
        result.volume,
        findings,
        centre=_most_seen([mask.array for mask in masks], result.volume.shape),
        title=f"{sum(bool(mask.array.any()) for mask in masks)} of {len(labels)} structures",
        notes=[f"Drawn by {result.model_id}."],
    )


def _most_seen(masks: Sequence[npt.NDArray[np.bool_]], shape: Sequence[int]) -> tuple[int, ...]:
    """A voxel through which the three planes cut as many masks as they can."""
    found = []
    for axis, side in enumerate(shape):
        others = tuple(other for other in range(len(shape)) if other != axis)
        cut = sum((mask.any(axis=others).astype(int) for mask in masks), np.zeros(side, int))
        best = np.flatnonzero(cut == cut.max())
        found.append(int(best[len(best) // 2]))
    return tuple(found)


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
