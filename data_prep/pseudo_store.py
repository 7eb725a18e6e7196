"""Pseudo-masks of a store's images, beside it: ``pseudo/pseudo.json`` and ``pseudo/<dataset>/<id>.npz``.

Indexes, parts and records stay as they are: a pseudo-mask has no name, so that nothing is said of it.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.pseudo import PseudoMasks, pseudo_labels
from data_prep.store import Store, StoredImage, unpack
from data_prep.volume import BadScan

__all__ = ["FORMAT", "Found", "has_pseudo", "pseudo_path", "read_pseudo", "write_pseudo"]

FORMAT = "m3d.pseudo/1"
Progress = Callable[[list[StoredImage]], Iterable[StoredImage]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """How many images have pseudo-masks now, how many were done already, and regions of the new ones."""

    images: int
    there: int
    regions: int


def pseudo_path(image: StoredImage) -> Path:
    """Where an image's pseudo-masks lie."""
    return image.root / "pseudo" / f"{image.image_id}.npz"


def has_pseudo(root: Path | str) -> bool:
    """Whether `write_pseudo` has come to its end for a store."""
    return (Path(root) / "pseudo" / "pseudo.json").is_file()


def write_pseudo(store: Store, how: PseudoMasks, *, force: bool = False, progress: Progress = list) -> Found:
    """Find the pseudo-masks of every image; what is done already stays, so that a stopped run goes on.

    ``pseudo.json`` is written last. ``force`` makes those of other settings anew.

    Raises:
        ValueError: The store has pseudo-masks of other settings.
        BadScan: An image is broken.
    """
    settings = {"format": FORMAT, **how.to_dict()}
    known = _known(store)
    if known is not None and known != settings and not force:
        raise ValueError(f"{store.root} has pseudo-masks of other settings ({known}); give --force to make them anew")
    images = list(store.images.values())
    todo = [image for image in images if not _done(image, settings)]
    if todo:
        (store.root / "pseudo" / "pseudo.json").unlink(missing_ok=True)
    regions = 0
    for image in progress(todo):
        labels = pseudo_labels(unpack(image.array()), how)
        regions += int(labels.max())
        with atomic_path(pseudo_path(image)) as temporary:
            np.savez_compressed(temporary, labels=labels[None], of=_of(image, settings))
    with atomic_path(store.root / "pseudo" / "pseudo.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return Found(images=len(images), there=len(images) - len(todo), regions=regions)


def read_pseudo(image: StoredImage) -> npt.NDArray[np.int16]:
    """The regions of an image ``(1, D, H, W)``: 0 for none, then 1, 2, ...

    Raises:
        BadScan: There are none, or they are broken, or those of another image.
    """
    path = pseudo_path(image)
    labels, of = _load(path)
    if labels.shape != (1, *image.media.shape) or json.loads(of)["image"] != _checksum(image):
        raise BadScan(f"{path}: its regions are those of another image; run `m3d data pseudo {image.root}` again")
    return labels


def _known(store: Store) -> dict[str, Any] | None:
    path = store.root / "pseudo" / "pseudo.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _done(image: StoredImage, settings: dict[str, Any]) -> bool:
    if not pseudo_path(image).is_file():
        return False
    try:
        return _load(pseudo_path(image))[1] == _of(image, settings)
    except BadScan:
        return False


def _of(image: StoredImage, settings: dict[str, Any]) -> str:
    return json.dumps({"image": _checksum(image), **settings}, sort_keys=True)


def _checksum(image: StoredImage) -> str | None:
    return image.files.get(image.media.path)


def _load(path: Path) -> tuple[npt.NDArray[np.int16], str]:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return np.asarray(kept["labels"], np.int16), str(kept["of"])
    except FileNotFoundError:
        raise BadScan(f"{path}: missing; `m3d data pseudo` makes it") from None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BadScan(f"{path}: broken ({error}); delete it and run `m3d data pseudo` again") from error
