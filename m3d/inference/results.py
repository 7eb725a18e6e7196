"""What a scan answered: words, boxes and masks on the scan's own grid, and how they are kept as files.

A result is written as a whole or not at all: every file is made in a hidden folder beside its place and moved there
once all of them are complete, `result.json` last.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import refuse_overwrite
from data_prep.boxes import Box
from data_prep.volume import Volume
from data_prep.write import write_mask
from m3d.inference.colors import color_of
from m3d.inference.measurements import Measurements, measure_mask, unit_of
from m3d.inference.planes import NOTICE, Finding
from m3d.inference.postprocess import PostProcess
from m3d.tasks.evidence import Asking, value_words

__all__ = [
    "LABELS_NAME",
    "LABELS_SCHEMA",
    "RESULT_NAME",
    "FoundBox",
    "FoundMask",
    "FoundMeasure",
    "NotDrawn",
    "Result",
    "describe_scan",
    "distinct_slugs",
    "labels_files",
    "slug",
    "staged",
    "write_json",
]

SCHEMA = "m3d.result/1"
RESULT_NAME = "result.json"
LABELS_SCHEMA = "m3d.labels/1"
LABELS_NAME = "label-map.json"  # no slug has a hyphen, so no mask is called so
PICTURE_BYTES = 1_500_000  # more than any of our pictures takes
DOUBT = 0.5  # below this probability a structure counts as not present


@dataclass(frozen=True)
class FoundBox:
    """A structure's box, in the scan's voxels and in patient mm (RAS)."""

    name: str
    voxel: Box
    mm: Box

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "voxel": _corners(self.voxel), "mm": _corners(self.mm)}


@dataclass(frozen=True, eq=False)
class FoundMask:
    """A structure's voxels on the scan's own grid; ``score`` is the mean probability inside as drawn, 0 to 1.

    ``logits`` are those of the model's grid, where they were asked for. ``present`` is the calibrated probability that
    the structure is in the scan at all; None where it was not asked for by name alone, or the model has no calibration
    of that name (`m3d calibrate`).
    """

    name: str
    array: npt.NDArray[np.bool_] = field(repr=False)
    score: float
    volume_ml: float
    logits: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    present: float | None = None

    @property
    def doubtful(self) -> bool:
        """Whether the structure is probably not in the scan, whatever was drawn."""
        return self.present is not None and self.present < DOUBT


@dataclass(frozen=True)
class NotDrawn:
    """A structure that was asked for by name and not drawn: why, and how likely it is in the scan (see `FoundMask`)."""

    name: str
    reason: str
    present: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "reason": self.reason, "present": _rounded(self.present)}


@dataclass(frozen=True)
class FoundMeasure:
    """What an answer rests on: ``measure`` of masks that the model drew, None where they show nothing, in ``unit``.

    A measure that compares has a positive value where its name holds for the first structure beside the second: it
    is larger, denser, higher, closer to the third.
    """

    measure: str
    names: tuple[str, ...]
    value: float | None
    unit: str

    def __str__(self) -> str:
        of = f"{', '.join(self.names)}: " if self.names else ""
        return f"{of}{self.measure} {value_words(Asking(self.measure, self.names), self.value)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        value = None if self.value is None else round(self.value, 4)
        return {"measure": self.measure, "names": list(self.names), "value": value, "unit": self.unit}


@dataclass(frozen=True, eq=False)
class Result:
    """One answer about one scan; ``measured`` is what it rests on, of masks that are among ``masks``.

    ``evidence`` is how the model asked for that, word by word, and the first ``num_measured`` masks are what it drew
    for it; the others are its answer's. ``postprocess`` is what was done to those after they were drawn, in order.
    Where several structures were asked for by name, ``asked`` has all of them, in the order of a label map's values,
    and ``not_drawn`` those that have no mask. ``drawn_at_mm`` is the voxel size that masks were drawn at, along the
    model's axes, where that is finer than the model's grid.
    """

    task: str
    prompt: str
    text: str
    boxes: tuple[FoundBox, ...]
    masks: tuple[FoundMask, ...]
    volume: Volume = field(repr=False)
    scan_path: Path | None
    model_id: str
    preprocess: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...]
    seconds: float
    measured: tuple[FoundMeasure, ...] = ()
    evidence: str = ""
    num_measured: int = 0
    postprocess: tuple[PostProcess, ...] = ()
    drawn_at_mm: tuple[float, float, float] | None = None
    asked: tuple[str, ...] = ()
    not_drawn: tuple[NotDrawn, ...] = ()

    def __post_init__(self) -> None:
        for mask in self.masks:
            assert mask.array.dtype == bool and mask.array.shape == self.volume.shape, mask.name

    @property
    def absent(self) -> tuple[str, ...]:
        """The names that were asked for and not drawn."""
        return tuple(one.name for one in self.not_drawn)

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each mask, from 0, which its colour goes by: among what was asked for, else in the result."""
        known = {name: place for place, name in enumerate(self.asked)}
        return tuple(known.get(mask.name, len(known) + number) for number, mask in enumerate(self.masks))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What there is to draw: masks, then boxes."""
        masks = [
            Finding(
                mask.name, mask=mask.array, note=f"{mask.volume_ml:.1f} mL, score {mask.score:.2f}", color=color_of(at)
            )
            for mask, at in zip(self.masks, self.places, strict=True)
        ]
        boxes = [Finding(box.name or "box", box=box.voxel, note=_size(box.mm)) for box in self.boxes]
        return (*masks, *boxes)

    @cached_property
    def measurements(self) -> tuple[Measurements, ...]:
        """Size, place, intensities and longest diameter of each mask."""
        unit = unit_of(self.volume) if self.masks else None
        return tuple(measure_mask(mask.array, self.volume, unit=unit) for mask in self.masks)

    def postprocessed(self, how: PostProcess) -> Result:
        """The same result with its answer's masks cleaned, and warnings of what lost more than half of its volume.

        Masks that measures rest on stay as they were measured; scores, boxes and text stay as the model gave them.
        """
        if not how:
            return self
        masks, notes = list(self.masks[: self.num_measured]), []
        for mask in self.masks[self.num_measured :]:
            voxel_ml = self.volume.voxel_ml
            array = how.apply(mask.array, self.volume.spacing, voxel_ml=voxel_ml)
            cleaned = replace(mask, array=array, volume_ml=float(np.count_nonzero(array) * voxel_ml))
            masks.append(cleaned)
            notes.extend(_losses(mask, cleaned, how))
        steps = (*self.postprocess, how)
        return replace(self, masks=tuple(masks), warnings=(*self.warnings, *notes), postprocess=steps)

    @property
    def mask_files(self) -> tuple[str, ...]:
        """A file name for each mask, made from its name."""
        return tuple(f"{name}.nii.gz" for name in distinct_slugs([mask.name for mask in self.masks]))

    @property
    def pictures(self) -> tuple[str, ...]:
        """A file name for each picture: one through the middle of every finding that can be seen."""
        return tuple(f"{name}.png" for name, _ in self._pictured())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, schema ``m3d.result/1``; files are named relative to the folder of ``result.json``."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "prompt": self.prompt,
            "text": self.text,
            "measured": [one.to_dict() for one in self.measured],
            "boxes": [box.to_dict() for box in self.boxes],
            "masks": [
                {
                    "name": mask.name,
                    "file": file,
                    "score": round(mask.score, 6),
                    "present": _rounded(mask.present),
                    "volume_ml": round(mask.volume_ml, 6),
                    "voxels": measured.voxels,
                    "measurements": measured.to_dict(),
                }
                for mask, file, measured in zip(self.masks, self.mask_files, self.measurements, strict=True)
            ],
            "absent": [one.to_dict() for one in self.not_drawn],
            "postprocess": [how.to_dict() for how in self.postprocess],
            "drawn_at_mm": None if self.drawn_at_mm is None else [round(side, 4) for side in self.drawn_at_mm],
            "pictures": list(self.pictures),
            "scan": describe_scan(self.volume, self.scan_path),
            "model_id": self.model_id,
            "preprocess": self.preprocess,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "notice": NOTICE,
        }

    def save(self, folder: Path | str, *, force: bool = False) -> tuple[Path, ...]:
        """Write ``result.json``, a NIfTI for each mask and pictures into a folder; returns what was written.

        With ``force`` an earlier result there goes, and with it the label map that was made of it.

        Raises:
            FileExistsError: Something would be replaced and ``force`` is not given; nothing is written then.
            OSError: The disk is full; nothing of the result is left behind.
        """
        names = [*self.mask_files, *self.pictures, RESULT_NAME]
        refuse_scan(folder, names, self.scan_path)
        needed = sum(mask.array.size for mask in self.masks) + PICTURE_BYTES * len(self.pictures) + 100_000
        replaced = [*_files_of(Path(folder) / RESULT_NAME), *labels_files(folder)] if force else []
        with staged(folder, names, force=force, needed=needed) as stage:
            for mask, file in zip(self.masks, self.mask_files, strict=True):
                write_mask(stage / file, mask.array, like=self.volume)
            self._draw(stage)
            write_json(stage / RESULT_NAME, self.to_dict())
        for name in set(replaced) - set(names):
            (Path(folder) / name).unlink(missing_ok=True)
        return tuple(Path(folder) / name for name in names)

    def _draw(self, folder: Path) -> None:
        from m3d.inference.overlay import save_overlay

        findings = self.findings
        for stem, number in self._pictured():
            save_overlay(
                folder / f"{stem}.png",
                self.volume,
                findings,
                centre_on=number,
                title=findings[number].name,
                notes=[f"Drawn by {self.model_id}.", *(f"Warning: {warning}" for warning in self.warnings)],
            )

    def _pictured(self) -> list[tuple[str, int]]:
        """Stem and number of each finding that deserves a picture: empty masks cannot be seen."""
        findings = self.findings
        seen = [number for number, finding in enumerate(findings) if finding.visible]
        return list(zip(distinct_slugs([findings[i].name for i in seen]), seen, strict=True))


def describe_scan(volume: Volume, path: Path | None) -> dict[str, Any]:
    """Where a scan lies: its file's name, never a path, and nothing of its header but geometry."""
    return {
        "file": None if path is None else path.absolute().name,
        "shape": list(volume.shape),
        "spacing_mm": [round(side, 6) for side in volume.spacing],
        "orientation": volume.orientation,
        "affine": volume.affine.tolist(),
    }


def slug(name: str) -> str:
    """A structure's name as a file name: ``Left Parotid (deep)`` -> ``left_parotid_deep``."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return (
        re.sub(r"[^\w]+", "_", "".join(c for c in plain if not unicodedata.combining(c))).strip("_")[:60] or "finding"
    )


def distinct_slugs(names: Sequence[str]) -> list[str]:
    """Slugs, numbered where two names have the same one."""
    taken: list[str] = []
    for name in names:
        plain = candidate = slug(name)
        count = 1
        while candidate in taken:
            count += 1
            candidate = f"{plain}_{count}"
        taken.append(candidate)
    return taken


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that a person can read and any parser accepts."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def refuse_scan(folder: Path | str, names: Sequence[str], scan: Path | None) -> None:
    """Never write over the scan itself, whatever else may be replaced.

    Raises:
        FileExistsError: One of the files that are to be written is the scan, or holds it.
    """
    for path in (Path(folder) / name for name in names):
        if scan is not None and path.exists() and scan.exists() and path.samefile(scan):
            raise FileExistsError(f"{path} is the scan itself and is not replaced; choose another folder with --out")


@contextmanager
def staged(folder: Path | str, names: Sequence[str], *, force: bool, needed: int) -> Iterator[Path]:
    """Give an empty folder to write ``names`` in; they move to ``folder`` when all are there, else no trace is left.

    ``needed`` is how many bytes they may take, for the message on a full disk.

    Raises:
        FileExistsError: One of them exists and ``force`` is not given; before anything is written.
        OSError: They cannot be written.
    """
    folder = Path(folder)
    for name in names:
        refuse_overwrite(folder / name, force)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose another folder with --out")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    stage: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".m3d-", dir=folder))
        yield stage
        for name in names:
            (stage / name).replace(folder / name)
        made = []
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, _disk_full(folder, needed)) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not made yet, or somebody else uses it by now
                parent.rmdir()


def _disk_full(folder: Path, needed: int) -> str:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return (
        f"{folder}: the disk is full: up to {needed:,} bytes are needed and {free:,} are free; nothing was written; "
        "make room or choose another folder with --out"
    )


def _files_of(path: Path) -> list[str]:
    """The masks and pictures that an earlier result wrote beside it: they go with it when it is replaced."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        names = [*(mask["file"] for mask in old["masks"]), *old["pictures"]] if old["schema"] == SCHEMA else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return [name for name in map(str, names) if name == Path(name).name and name.endswith((".nii.gz", ".png"))]


def labels_files(folder: Path | str) -> list[str]:
    """The files of a label map that lies in a folder, by name; none where there is no map of ours."""
    try:
        old = json.loads((Path(folder) / LABELS_NAME).read_text(encoding="utf-8"))
        names = [*map(str, old["files"]), LABELS_NAME] if old["schema"] == LABELS_SCHEMA else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    stem = Path(LABELS_NAME).stem
    return [name for name in names if name == Path(name).name and name.startswith(stem)]


def _losses(before: FoundMask, after: FoundMask, how: PostProcess) -> list[str]:
    """What a reader should know of a mask that post-processing has changed a lot."""
    if before.array.any() and not after.array.any():
        return [f"the mask of {before.name!r} is empty after post-processing ({how}): it had {before.volume_ml:.3g} mL"]
    if after.volume_ml < before.volume_ml / 2:
        change = f"{before.volume_ml:.3g} to {after.volume_ml:.3g} mL"
        return [f"the mask of {before.name!r} lost more than half of its volume in post-processing ({how}): {change}"]
    return []


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 6)


def _corners(box: Box) -> dict[str, list[float]]:
    return {"lo": [round(float(side), 4) for side in box.lo], "hi": [round(float(side), 4) for side in box.hi]}


def _size(box: Box) -> str:
    return " x ".join(f"{side:.0f}" for side in box.sides) + " mm"
