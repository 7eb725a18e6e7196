"""A head and neck that is known exactly: analytic organs in plausible places and HU, randomised by a seed.

Places, sizes and their spread follow the OpenKBP training patients, and so do the layout and the labels, so that one
model can learn from both. Labels are complete: what is left out is certainly absent. One habit of the clinic is kept:
the contours of cord and esophagus end near the fourth and the third thoracic vertebra, though both go on.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from data_prep.analytic import Array, Canvas, Point, Pose, ellipsoid
from data_prep.anatomy import Anatomy
from data_prep.case import Case
from data_prep.openkbp import NAMES
from data_prep.tissue import paint_teeth, paint_tissue
from data_prep.volume import Volume

__all__ = ["NAMES", "Anatomy", "head_neck"]

LABEL_OF = {name: value for value, name in NAMES.items()}


def head_neck(
    seed: int,
    *,
    shape: tuple[int, int, int] | None = None,
    spacing: tuple[float, float, float] | None = None,
    orientation: str = "PLI",
    without: Collection[str] = (),
) -> Case:
    """A patient drawn by ``seed``, in OpenKBP's layout unless told otherwise.

    Args:
        seed: The same seed gives the same patient, whatever the grid.
        shape: Voxels along the axes; drawn (128, 128, 48 to 128) if not given.
        spacing: mm along the axes; drawn (about 3.9 to 5.1 mm in plane, 2 to 3 mm between slices) if not given.
        orientation: Where each index grows to, as nibabel's axis codes. ``shape`` and ``spacing`` are in this order.
        without: Structures that this patient does not have.

    Raises:
        ValueError: ``without`` or ``orientation`` is not known, or ``shape`` or ``spacing`` is no size.
    """
    unknown = sorted(set(without) - set(LABEL_OF))
    if unknown:
        raise ValueError(f"the phantom has no {', '.join(map(repr, unknown))}; it has {', '.join(LABEL_OF)}")
    directions = _directions(orientation)
    rng = np.random.default_rng(seed)
    anatomy = Anatomy.draw(rng)
    drawn_shape, drawn_spacing, middle = _field_of_view(rng)
    along = np.abs(directions).argmax(axis=0).tolist()  # which of R, A, S each axis runs along
    shape = shape or (drawn_shape[along[0]], drawn_shape[along[1]], drawn_shape[along[2]])
    spacing = spacing or (drawn_spacing[along[0]], drawn_spacing[along[1]], drawn_spacing[along[2]])
    if len(shape) != 3 or len(spacing) != 3 or min(shape) < 1 or min(spacing) <= 0:
        raise ValueError(f"shape={shape} and spacing={spacing} must be three numbers above zero each")
    affine = _centred(directions, shape, spacing)
    pose = _aimed(anatomy.pose, (anatomy.centre[0], anatomy.centre[1], middle))
    canvas = Canvas(pose, shape, affine)
    _paint(canvas, anatomy, set(without), rng)
    return Case(
        id=f"phantom_{seed}",
        patient_id=f"phantom_{seed}",
        volume=Volume(_as_scanned(canvas, affine, rng), affine),
        labels=canvas.labels,
        names=NAMES,
        complete=True,
        source={
            "dataset": "M3D head-and-neck phantom",
            "license": "Apache-2.0",
            "seed": seed,
            "region": "head and neck",
        },
    )


def _paint(canvas: Canvas, anatomy: Anatomy, without: set[str], rng: np.random.Generator) -> None:
    """Labelled organs after all other tissue, so that nothing hides a part of them."""
    paint_tissue(canvas, anatomy, rng)
    for label, name in NAMES.items():
        if name not in without:
            for part in anatomy.organ(name):
                canvas.paint(part, anatomy.hu[name], label)
            for part, hu in anatomy.inside(name):
                canvas.paint(part, hu)
    paint_teeth(canvas, anatomy, rng, lower="mandible" not in without)


def _as_scanned(canvas: Canvas, affine: npt.NDArray[np.float64], rng: np.random.Generator) -> Array:
    """Streaks of fillings, the couch, partial volume, texture and noise."""
    hu = canvas.hu
    _streaks(canvas, rng)
    _couch(hu, affine, rng)
    hu = gaussian_filter(hu, rng.uniform(0.4, 0.65))
    noise = rng.uniform(5.0, 18.0)
    grain = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), 0.6, truncate=2.0) / 0.45
    hu += np.where(hu > -900, noise, 3.0).astype(np.float32) * grain
    scanned: Array = np.round(np.clip(hu, -1000, 3000)).astype(np.float32)
    return scanned


def _streaks(canvas: Canvas, rng: np.random.Generator) -> None:
    strength, phase = rng.uniform(20, 90), rng.uniform(0, 6.28)
    if not (canvas.hu >= 3000).any():
        return
    level = ellipsoid((0.0, 40.0, 0.0), (120.0, 110.0, 14.0), power=6)
    window = canvas.window(level)
    if window is not None:
        r, a, s = (axis[window] for axis in canvas.places)
        angle = np.arctan2(a - 50, r)
        fade = np.exp(-np.hypot(r, a - 50) / 50) * (np.abs(s) < 12) * (canvas.hu[window] > -200)
        canvas.hu[window] += (strength * (np.cos(5 * angle + phase) + np.cos(8 * angle)) * fade).astype(np.float32)


def _couch(hu: Array, affine: npt.NDArray[np.float64], rng: np.random.Generator) -> None:
    """A couch, flat in the scanner whatever the patient's pose; in two of five scans it was cut away."""
    kept, top, half, density = rng.uniform((0, -130, 130, -600), (1, -118, 230, -150)).tolist()
    if kept > 0.6:
        return
    grids = np.meshgrid(*(np.arange(side) for side in hu.shape), indexing="ij", sparse=True)
    r, a, _ = (sum(affine[row, axis] * grids[axis] for axis in range(3)) + affine[row, 3] for row in range(3))
    thick = float(np.abs(affine[1, :3]).max()) / 2
    for level in (top, top - 32):
        board = (np.abs(a - level) <= thick) & (np.abs(r) <= half)
        hu[board] = np.maximum(hu[board], density)


def _field_of_view(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[float, float, float], float]:
    """Voxels and mm along R, A, S in OpenKBP's ranges, and the height of the middle slice."""
    plane = float(rng.choice([3.906, 4.297, 4.688, 5.078], p=[0.5, 0.1, 0.3, 0.1]))
    between = float(rng.choice([2.0, 2.5, 3.0], p=[0.1, 0.45, 0.45]))
    if rng.random() < 0.25:
        top, bottom = float(rng.uniform(15, 75)), float(rng.uniform(-125, -75))
    else:
        top, bottom = float(rng.uniform(50, 142)), float(rng.uniform(-250, -155))
    slices = int(np.clip(round((top - bottom) / between), 48, 128))
    return (128, 128, slices), (plane, plane, between), top - slices * between / 2


def _aimed(pose: Pose, middle: Point) -> Pose:
    """The pose that puts an anatomy's point at the patient's origin, where the field of view is centred."""
    at = pose.turn @ np.array(middle) * pose.size
    return dataclasses.replace(pose, offset=-at)


def _directions(codes: str) -> npt.NDArray[np.float64]:
    """Unit columns for axis codes such as "PLI"."""
    pairs = ("RL", "AP", "SI")
    if len(codes) != 3 or any(sum(code in pair for code in codes) != 1 for pair in pairs):
        raise ValueError(f"orientation={codes!r} is not one each of R/L, A/P and S/I, such as 'PLI'")
    columns = np.zeros((3, 3))
    for column, code in enumerate(codes):
        row = next(axis for axis, pair in enumerate(pairs) if code in pair)
        columns[row, column] = 1.0 if code == pairs[row][0] else -1.0
    return columns


def _centred(
    directions: npt.NDArray[np.float64], shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine
