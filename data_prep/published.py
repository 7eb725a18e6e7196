"""The published preparations of M3D and SegVol, step by step, for data that was prepared with them.

Part of m3d-lamed; import through `m3d`.

They keep no spacing, no orientation and no crop box: use `Preprocess` for anything new. Arrays in, arrays out; the raw
layouts are those of M3D-Cap, M3D-Seg, M3D-RefSeg and of SegVol's demonstration script.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.preprocess import rescale
from data_prep.steps import Axis, Lattice, foreground
from data_prep.volume import BadScan

__all__ = ["GRID", "prepare_cap", "prepare_refseg", "prepare_seg", "prepare_segvol", "zoom_out"]

# C = classes (masks); D, H, W = slices, rows, columns; X, Y, Z = the NIfTI order that M3D-Seg and M3D-RefSeg keep
GRID = (32, 256, 256)
Array = npt.NDArray[Any]


def prepare_cap(slices: Array, *, grid: tuple[int, int, int] = GRID) -> Array:
    """M3D-Cap: sorted 8-bit slices to the model's input: ``(D, H, W) -> (1, *grid)``."""
    scaled = _min_max(slices / np.float32(255))
    return _stretch(scaled[_crop(scaled)], grid)[None]


def prepare_refseg(ct: Array, mask: Array, *, grid: tuple[int, int, int] = GRID) -> tuple[Array, Array]:
    """M3D-RefSeg: a CT and its label map: ``(X, Y, Z), (X, Y, Z) -> (1, *grid), (1, *grid)``."""
    ct, mask = ct.transpose(2, 0, 1), mask.transpose(2, 0, 1)
    low, high = np.percentile(ct, [0.5, 99.5]).tolist()
    scaled = rescale(ct, low, high)
    box = _crop(scaled)
    return _stretch(scaled[box], grid)[None], _nearest(mask[box], grid)[None]


def prepare_seg(image: Array, label: Array, *, grid: tuple[int, int, int] = GRID) -> tuple[Array, Array]:
    """M3D-Seg: an image and its class masks: ``(1, X, Y, Z), (C, X, Y, Z) -> (1, *grid), (C, *grid)``."""
    scaled = _min_max(image[0].transpose(2, 1, 0))
    box = _crop(scaled)
    masks = [_nearest(one.transpose(2, 1, 0)[box], grid) for one in label]
    return _stretch(scaled[box], grid)[None], np.stack(masks)


def prepare_segvol(image: Array, label: Array) -> tuple[Array, Array]:
    """SegVol's test-time preparation, before zooming out: ``(1, X, Y, Z), (C, X, Y, Z) -> (1, D, H, W), (C, D, H, W)``.

    The released script also divides by the foreground's standard deviation and pads with zeros; the min-max scaling and
    the crop that follow undo both.
    """
    scan = image[0].transpose(2, 1, 0)
    low, high = np.percentile(scan[scan > scan.mean()], [0.05, 99.95]).tolist()
    scaled = _min_max(scan.clip(low, high))
    box = _crop(scaled)
    return scaled[box][None], np.stack([one.transpose(2, 1, 0)[box] for one in label])


def zoom_out(image: Array, *, grid: tuple[int, int, int] = GRID) -> Array:
    """SegVol's coarse view of images or masks, nearest voxel by centres: ``(C, D, H, W) -> (C, *grid)``."""
    return np.stack([_nearest(one, grid, centre=0.5) for one in image])


def _min_max(array: Array) -> npt.NDArray[np.float32]:
    return rescale(array, float(array.min()), float(array.max()))


def _crop(scaled: npt.NDArray[np.float32]) -> tuple[slice, ...]:
    box = foreground(scaled, 0.0)
    if box is None:
        raise BadScan("nothing is above zero after scaling; an empty scan?")
    return tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))


def _stretch(array: npt.NDArray[np.float32], grid: tuple[int, int, int]) -> Array:
    d, h, w = (Axis(size, side, size / side) for size, side in zip(array.shape, grid, strict=True))
    return Lattice((d, h, w)).apply(array)


def _nearest(array: Array, grid: tuple[int, int, int], *, centre: float = 0.0) -> Array:
    """PyTorch's ``nearest`` (``centre`` 0, half a voxel off) and ``nearest-exact`` (0.5), float32 rounding included."""
    for axis, (size, side) in enumerate(zip(array.shape, grid, strict=True)):
        where = (np.arange(side, dtype=np.float32) + np.float32(centre)) * np.float32(size / side)
        array = np.take(array, np.floor(where).astype(np.intp).clip(0, size - 1), axis=axis)
    return array
