"""A store of prepared scans: small files that training reads in milliseconds, and the way back to every scan.

::

    store.json preprocess.json         how it was made
    records.jsonl images.jsonl         all entries, sorted by image, and one line an image (`StoredImage`)
    rejects.jsonl                      what could not be prepared, with file and reason
    images/<dataset>/<id>.npy          [0, 1] as uint8 (or uint16, float32) on the grid
    masks/<dataset>/<id>.npz           "labels": the label maps (L, D, H, W), compressed
    parts/<dataset>/<id>.json          an image's records; written last, so a part means that the image is whole
    pseudo/                            regions without names, where `m3d data pseudo` was run

The format of images was chosen by measurement (`benchmarks/store_formats.py`): uncompressed files are read many times
faster than compressed ones, ``.npy`` is what the published data sets use and everything reads, and uint8 keeps a 600 HU
window to 1.2 HU in a quarter of the bytes of float32.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from data_prep.preprocess import Preprocess
from data_prep.record import Media
from data_prep.records import RecordFile
from data_prep.volume import BadScan
from data_prep.way import Way

__all__ = ["FORMAT", "INDEXES", "Kept", "Store", "StoredImage", "file_sha256", "pack", "unpack"]

FORMAT = "m3d.store/1"
INDEXES = ("records.jsonl", "images.jsonl")
Kept = Literal["uint8", "uint16", "float32"]
_TOP: Mapping[str, float] = {"uint8": 255.0, "uint16": 65535.0}


def pack(array: npt.NDArray[np.float32], kept: Kept) -> npt.NDArray[Any]:
    """Values in [0, 1] as they are kept: rounded to the steps of an integer type, or as they are."""
    if kept not in get_args(Kept):
        raise ValueError(f"kept={kept!r} is none of {', '.join(get_args(Kept))}")
    return np.rint(array * np.float32(_TOP[kept])).astype(kept) if kept in _TOP else array.astype(np.float32)


def unpack(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Kept values back to [0, 1]."""
    top = _TOP.get(array.dtype.name)
    return array.astype(np.float32) / np.float32(top) if top else array.astype(np.float32)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredImage:
    """One prepared scan: what is known of it, its files, and the way back to its own voxels.

    ``names`` are those of the labels; ``complete`` says that a name without voxels is certainly absent. ``placed`` is
    False where spacing and orientation are not known. ``sha256`` is that of the scan's own voxels, ``files`` holds
    those of the stored files by their path.
    """

    root: Path
    dataset: str
    patient_id: str
    split: str
    license: str | None
    media: Media
    masks: str | None
    names: dict[int, str]
    complete: bool
    placed: bool
    scan_affine: npt.NDArray[np.float64]
    way: Way
    sha256: str
    warnings: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def image_id(self) -> str:
        """The id that the image's records name."""
        return self.media.image_id

    @property
    def path(self) -> Path:
        """The file of the image."""
        return self.root / self.media.path

    @property
    def mask_path(self) -> Path | None:
        """The file of the label maps, where it has any."""
        return None if self.masks is None else self.root / self.masks

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Grid index -> patient mm (RAS), as far as the scan's own affine is known (``placed``)."""
        return np.asarray(self.scan_affine @ self.way.to_scan_matrix)

    def array(self) -> npt.NDArray[Any]:
        """The image as kept, ``(D, H, W)``; `unpack` maps it to [0, 1].

        Raises:
            BadScan: The file is broken, or not the one that the index speaks of.
        """
        array = _load(self.path)
        if array.shape != self.media.shape or array.dtype.name not in get_args(Kept):
            raise BadScan(
                f"{self.path}: holds {array.dtype} {array.shape}, the index says {self.media.shape}; prepare it again"
            )
        return array

    def labels(self) -> npt.NDArray[Any]:
        """The label maps ``(L, D, H, W)``; no layer where the image has no labels.

        Raises:
            BadScan: The file is broken, or not the one that the index speaks of.
        """
        if self.mask_path is None:
            return np.zeros((0, *self.media.shape), np.uint8)
        labels = _load(self.mask_path)
        if labels.ndim != 4 or labels.shape[1:] != self.media.shape:
            raise BadScan(f"{self.mask_path}: labels {labels.shape} do not lie on {self.media.shape}; prepare it again")
        return labels

    def values(self) -> npt.NDArray[np.float32]:
        """The image in the scan's own units (HU for CT), within the limits of its intensity."""
        limits = self.media.intensity
        assert limits.lo is not None and limits.hi is not None  # every prepared image has them
        return unpack(self.array()) * np.float32(limits.hi - limits.lo) + np.float32(limits.lo)

    def to_row(self) -> dict[str, Any]:
        """The image's line of ``images.jsonl``."""
        return {
            "image_id": self.image_id,
            "dataset": self.dataset,
            "license": self.license,
            "patient_id": self.patient_id,
            "split": self.split,
            "media": self.media.model_dump(mode="json", exclude_none=True),
            "masks": self.masks,
            "names": {str(value): name for value, name in self.names.items()},
            "complete": self.complete,
            "placed": self.placed,
            "scan_affine": self.scan_affine.tolist(),
            "way": self.way.to_dict(),
            "sha256": self.sha256,
            "warnings": list(self.warnings),
            "files": self.files,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], root: Path) -> StoredImage:
        """Build from what `to_row` gave."""
        fields = {key: value for key, value in row.items() if key != "image_id"}
        return cls(
            **fields
            | {
                "root": root,
                "media": Media.model_validate(row["media"]),
                "names": {int(value): name for value, name in row["names"].items()},
                "scan_affine": np.array(row["scan_affine"], dtype=np.float64),
                "way": Way.from_dict(row["way"]),
                "warnings": tuple(row["warnings"]),
            }
        )


class Store:
    """A prepared data set on disk.

    Raises:
        FileNotFoundError: The folder is no store, or its preparation has not come to its end.
        ValueError: It was written in a format that this version does not read.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        path = self.root / "store.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: this is no store; `m3d data prepare CONFIG` makes one")
        self.settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.settings.get("format") != FORMAT:
            raise ValueError(f"{path}: format {self.settings.get('format')!r} is not {FORMAT}; prepare it again")
        for name in INDEXES:
            if not (self.root / name).is_file():
                raise FileNotFoundError(f"{self.root / name} is missing: run the same `m3d data prepare` to its end")

    @cached_property
    def preprocess(self) -> Preprocess:
        """How every scan of the store was prepared."""
        return Preprocess.read(self.root)

    @cached_property
    def images(self) -> dict[str, StoredImage]:
        """Every image by its id, in the order of the records."""
        found = {}
        with (self.root / "images.jsonl").open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    image = StoredImage.from_row(json.loads(line), self.root)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.root / 'images.jsonl'}:{number}: {error}; prepare again") from error
                found[image.image_id] = image
        return found

    @cached_property
    def records(self) -> RecordFile:
        """The entries, by image."""
        return RecordFile(self.root / "records.jsonl")

    def rejects(self) -> list[dict[str, Any]]:
        """What could not be prepared."""
        path = self.root / "rejects.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _load(path: Path) -> npt.NDArray[Any]:
    """An array of a ``.npy``, or the labels of a ``.npz``; never a pickle."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return np.asarray(loaded["labels"])
        return np.asarray(loaded)
    except FileNotFoundError:
        raise BadScan(f"{path}: missing; run the same `m3d data prepare` again") from None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BadScan(f"{path}: broken ({error}); delete it and run the same `m3d data prepare` again") from error
