"""Open the files of a store once, say what is wrong with one, and find what labels it holds.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

__all__ = [
    "Broken",
    "Header",
    "array_of",
    "content_hash",
    "is_numpy",
    "parts_of",
    "reaches_of",
    "read_array",
    "read_bytes",
    "read_header",
]

LABELS = "labels"
Header = tuple[tuple[int, ...], np.dtype[Any]]
Reach = tuple[tuple[int, ...], tuple[int, ...]]
_AGAIN = "delete it and run the same `m3d data prepare` again"


class Broken(ValueError):
    """A file that cannot be used; the message says why and what helps."""


def is_numpy(path: str | Path) -> bool:
    """Whether this is a file that numpy writes."""
    return str(path).lower().endswith((".npy", ".npz"))


def read_array(path: Path) -> npt.NDArray[Any]:
    """The array of a ``.npy`` or the labels of a ``.npz``, never unpickled.

    Raises:
        Broken: It is missing, cut short, damaged, pickled or something else.
    """
    return array_of(read_bytes(path))


def array_of(data: bytes) -> npt.NDArray[Any]:
    """The array in a file's bytes, as `read_array` has it.

    Raises:
        Broken: They are cut short, damaged, pickled or something else.
    """
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return np.asarray(loaded[_member(loaded.files)])
        return np.asarray(loaded)
    except Broken:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _told(error, data[:6]) from error


def read_header(path: Path) -> Header:
    """Shape and type of what `read_array` would read, from the file's first bytes.

    Raises:
        Broken: It is missing, shorter than it should be, pickled or something else.
    """
    if not path.is_file():
        raise Broken("missing; run the same `m3d data prepare` again, or check --root")
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if path.suffix.lower() != ".npz":
                return _header(file, path.stat().st_size)
            with zipfile.ZipFile(file) as archive:
                stems = [name.removesuffix(".npy") for name in archive.namelist()]
                name = f"{_member(stems)}.npy"
                with archive.open(name) as member:
                    return _header(member, archive.getinfo(name).file_size)
    except Broken:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _told(error, start) from error


def content_hash(array: npt.NDArray[Any]) -> str:
    """SHA-256 of shape, type and voxels."""
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def reaches_of(layers: npt.NDArray[Any]) -> dict[int, Reach]:
    """The half-open box of every label in label maps ``(L, D, H, W)``."""
    found: dict[int, Reach] = {}
    for layer in layers:
        for value, slices in enumerate(ndimage.find_objects(layer), start=1):
            if slices is None:
                continue
            lo, hi = tuple(side.start for side in slices), tuple(side.stop for side in slices)
            if value in found:
                lo, hi = tuple(map(min, lo, found[value][0])), tuple(map(max, hi, found[value][1]))
            found[value] = (lo, hi)
    return found


def parts_of(layers: npt.NDArray[Any], value: int) -> list[Reach]:
    """The boxes of a label's connected parts, corners counting as contact."""
    mask = (layers == value).any(axis=0)
    numbered, _ = ndimage.label(mask, np.ones((3,) * mask.ndim))
    return [
        (tuple(side.start for side in slices), tuple(side.stop for side in slices))
        for slices in ndimage.find_objects(numbered)
    ]


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        Broken: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Broken("missing; run the same `m3d data prepare` again, or check --root") from None
    except OSError as error:
        raise Broken(
            f"cannot be read ({error.strerror or error}); check the disk and the file's permissions"
        ) from error


def _member(names: list[str]) -> str:
    if LABELS not in names:
        raise Broken(f"holds no array {LABELS!r}, only {', '.join(map(repr, names)) or 'nothing'}; {_AGAIN}")
    return LABELS


def _header(file: IO[bytes], size: int) -> Header:
    readers: Mapping[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise Broken(f"is a .npy of version {version}, which is not read here; {_AGAIN}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays")
    wanted = file.tell() + dtype.itemsize * int(np.prod(shape))
    if size < wanted:
        raise Broken(f"is cut short: {size:,} bytes of {wanted:,}; {_AGAIN}")
    return tuple(shape), dtype


def _told(error: Exception, start: bytes) -> Broken:
    if start[:1] == b"\x80" or "Object arrays" in str(error):
        return Broken("is pickled, which is never opened: it could run code; write it as a plain array (np.save)")
    if not start:
        return Broken(f"is empty; {_AGAIN}")
    if start[:6] != b"\x93NUMPY" and start[:2] != b"PK":
        return Broken(f"is no .npy or .npz file (begins with {start!r}); {_AGAIN}")
    return Broken(f"is damaged or cut short ({error}); {_AGAIN}")
