"""One image against what is said of it: its voxels, its labels and its boxes, each file opened once.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.boxes import Box
from data_prep.read import SUFFIXES, read_volume
from data_prep.verify.arrays import (
    Broken,
    array_of,
    content_hash,
    is_numpy,
    parts_of,
    reaches_of,
    read_bytes,
    read_header,
)
from data_prep.verify.facts import ImageFacts, same_name
from data_prep.verify.findings import Finding
from data_prep.volume import BadScan

__all__ = ["ImageResult", "check_image"]

BLANK = 0.999
_KINDS = {"uint8": "u1", "uint16": "u2"}  # what a unit's name already says of the type; others may be floats
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageResult:
    """What came of one image: findings, and the hash of its voxels where they were read."""

    findings: tuple[Finding, ...]
    digest: str | None = None


@dataclass(frozen=True)
class _Place:
    """Where findings about an image lie."""

    facts: ImageFacts
    root: Path

    def error(self, check: str, path: str, message: str, *, where: str | None = None) -> Finding:
        return Finding("error", check, where or f"image {self.facts.media.image_id}", f"{path}: {message}")


def check_image(facts: ImageFacts, *, root: Path, fast: bool = False) -> ImageResult:
    """Open the files of one image and compare; ``fast`` looks at headers only."""
    place = _Place(facts, root)
    findings = list(_check_shared_names(facts))
    digest = None
    try:
        found, digest = _check_voxels(place, fast)
        findings += found
    except (Broken, BadScan, OSError) as error:
        findings.append(place.error("files", facts.media.path, _shortened(error, root / facts.media.path)))
    for path in facts.mask_paths:
        try:
            findings += _check_masks(place, path, fast)
        except (Broken, OSError) as error:
            findings.append(place.error("files", path, _shortened(error, root / path)))
    return ImageResult(tuple(findings), digest)


def _check_shared_names(facts: ImageFacts) -> Iterator[Finding]:
    if facts.names is not None:
        labels = list(facts.names.items())
    else:
        labels = sorted({(label, name) for _, label, name in facts.said})
    by_name: dict[str, list[int]] = {}
    for label, name in labels:
        by_name.setdefault(" ".join(name.casefold().split()), []).append(label)
    for name, shared in by_name.items():
        if len(shared) > 1:
            message = f"labels {', '.join(map(str, shared))} are all called {name!r}; give each label a name of its own"
            yield Finding("error", "names", f"image {facts.media.image_id}", message)


def _check_voxels(place: _Place, fast: bool) -> tuple[list[Finding], str | None]:
    media, path = place.facts.media, place.root / place.facts.media.path
    if not is_numpy(path):
        if not path.is_file() and not path.is_dir():
            raise Broken("missing; check the record's path and --root")
        if fast or media.kind != "volume" or not media.path.lower().endswith(SUFFIXES):
            return [], None
        array: Array = read_volume(path).array
        return list(_check_array(place, array.shape, array.dtype)) + list(_check_values(place, array)), None
    if fast:
        return list(_check_array(place, *read_header(path))), None
    data = read_bytes(path)
    array = array_of(data)
    found = [*_check_sum(place, media.path, data), *_check_array(place, array.shape, array.dtype)]
    return [*found, *_check_values(place, array)], content_hash(array)


def _check_sum(place: _Place, path: str, data: bytes) -> Iterator[Finding]:
    """Whether a file has the bytes that its image's line promises; a line without checksums promises none."""
    wanted = place.facts.checksums.get(path)
    if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
        message = "is not as preparation wrote it (its sha256 differs); delete it and run `m3d data prepare` again"
        yield place.error("checksums", path, message)


def _check_array(place: _Place, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Finding]:
    media = place.facts.media
    if _bare(shape) != _bare(media.shape):
        message = f"has shape {shape}, the record says {media.shape}; prepare it again, or correct the record"
        yield place.error("arrays", media.path, message)
    unit = media.intensity.unit
    wanted = _KINDS.get(unit)
    fits = dtype.str[1:] == wanted if wanted else dtype.kind in "fu" or (dtype.kind == "i" and unit != "norm01")
    if not fits:
        message = f"has voxels of type {dtype}, which cannot be unit={unit!r}; prepare it again, or correct the record"
        yield place.error("arrays", media.path, message)


def _check_values(place: _Place, array: Array) -> Iterator[Finding]:
    media = place.facts.media
    if array.dtype.kind not in "fiub" or not array.size:
        return
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        number = int(np.count_nonzero(~np.isfinite(array)))
        yield place.error(
            "values", media.path, f"{number:,} voxels are NaN or infinite; find out why and prepare again"
        )
        return
    lowest, highest = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and media.intensity.unit == "norm01" and not 0 <= lowest <= highest <= 1:
        message = f"voxels from {lowest:g} to {highest:g}, but unit='norm01' is 0 to 1; correct the unit or the file"
        yield place.error("values", media.path, message)
    if lowest == highest:
        message = f"every voxel is {lowest:g}: there is nothing to see; are window and crop right for this scan?"
        yield place.error("blank", media.path, message)
    elif (same := max(np.mean(array == lowest), np.mean(array == highest))) >= BLANK:
        message = f"{same:.2%} of the voxels have one value; is the window right for this scan?"
        yield Finding("warning", "blank", f"image {media.image_id}", f"{media.path}: {message}")


def _check_masks(place: _Place, path: str, fast: bool) -> Iterator[Finding]:
    facts, file = place.facts, place.root / path
    yield from _check_label_names(place, path)
    if not is_numpy(file):
        if not file.is_file():
            raise Broken("missing; check the record's path and --root")
        return
    if fast:
        yield from _check_layers(place, path, *read_header(file))
        return
    data = read_bytes(file)
    labels = array_of(data)
    yield from _check_sum(place, path, data)
    wrong = list(_check_layers(place, path, labels.shape, labels.dtype))
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        wrong.append(
            place.error("arrays", path, f"has the label {labels.min()}; labels are 0 and above; prepare it again")
        )
    yield from wrong
    if wrong:
        return
    layers = labels.reshape(-1, *labels.shape[-len(facts.media.size) :])
    reaches = reaches_of(layers.astype(np.uint8) if layers.dtype.kind == "b" else layers)
    yield from _check_presence(place, path, reaches)
    yield from _check_boxes(place, path, layers, reaches)


def _check_layers(place: _Place, path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Finding]:
    size = place.facts.media.size
    if shape[-len(size) :] != size or len(shape) not in (len(size), len(size) + 1):
        message = (
            f"has shape {shape}; on this image label maps are (layers, {', '.join(map(str, size))}); prepare again"
        )
        yield place.error("arrays", path, message)
    if dtype.kind not in "biu":
        yield place.error("arrays", path, f"has labels of type {dtype}; whole numbers are needed; prepare it again")


def _check_label_names(place: _Place, path: str) -> Iterator[Finding]:
    """Whether records call labels by the index's names, or where there is no index, by one name each."""
    facts = place.facts
    indexed = facts.names is not None and path == facts.masks
    names = dict(facts.names or {}) if indexed else {}
    source = "in images.jsonl"
    for (mask_path, label, name), where in facts.said.items():
        if mask_path != path:
            continue
        if not indexed and label not in names:
            names[label], source = name, "elsewhere"
        known = names.get(label)
        if known is None:
            message = f"label {label} ({name!r}) has no name in images.jsonl, which knows {names}; prepare again"
            yield place.error("labels", path, message, where=where)
        elif not same_name(known, name):
            message = f"label {label} is called {name!r} here and {known!r} {source}; correct the wrong one"
            yield place.error("labels", path, message, where=where)


def _check_presence(place: _Place, path: str, reaches: Mapping[int, object]) -> Iterator[Finding]:
    facts = place.facts
    if facts.names is not None and path == facts.masks:
        nameless = sorted(set(reaches) - set(facts.names))
        if nameless:
            message = f"labels {nameless} have voxels and no name in images.jsonl; name them, or prepare again"
            yield place.error("labels", path, message)
        for name, where in facts.absent.items():
            drawn = [label for label, known in facts.names.items() if same_name(known, name) and label in reaches]
            if drawn:
                message = f"the record says that there is no {name!r}, but label {drawn[0]} has voxels; drop the record"
                yield place.error("empty", path, message, where=where)
    told = set()
    for (mask_path, label, name), where in facts.said.items():
        if mask_path == path and label not in reaches and label not in told:
            told.add(label)
            message = (
                f"the mask of {name!r} (label {label}) has no voxel; drop what asks for it, or say that it is absent"
            )
            yield place.error("empty", path, message, where=where)
    labels = _labels_by_name(facts, path)
    for box, where in facts.boxes.items():
        boxed = labels.get(box.name)
        if boxed is not None and boxed not in reaches and boxed not in told:
            told.add(boxed)
            message = f"a box is drawn around {box.name!r}, but its label {boxed} has no voxel; drop the box"
            yield place.error("empty", path, message, where=where)


def _check_boxes(
    place: _Place, path: str, layers: Array, reaches: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]
) -> Iterator[Finding]:
    labels = _labels_by_name(place.facts, path)
    for box, where in place.facts.boxes.items():
        label = labels.get(box.name)
        if label is None or label not in reaches or _agree(box, reaches[label]):
            continue
        if any(_agree(box, part) for part in parts_of(layers, label)):
            continue
        lo, hi = reaches[label]
        message = (
            f"the box of {box.name!r} is {_numbers(box.lo)} to {_numbers(box.hi)}, its mask (label {label}) reaches "
            f"from {_numbers(lo)} to {_numbers(hi)} (half-open); take the box from the mask"
        )
        yield place.error("boxes", path, message, where=where)


def _labels_by_name(facts: ImageFacts, path: str) -> dict[str, int]:
    """Labels whose name is theirs alone."""
    if facts.names is not None and path == facts.masks:
        pairs = [(name, label) for label, name in facts.names.items()]
    else:
        pairs = [(name, label) for mask_path, label, name in facts.said if mask_path == path]
    names = [name for name, _ in pairs]
    return {name: label for name, label in pairs if names.count(name) == 1}


def _agree(box: Box, reach: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return all(abs(one - other) < 1 for one, other in zip(box.lo + box.hi, reach[0] + reach[1], strict=True))


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of length one, which the published files have."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _shortened(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
