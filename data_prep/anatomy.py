"""One patient of the head-and-neck phantom: what the seed draws, and the labelled organs as shapes.

Anatomy mm: R to the right, A forward, S up from the middle between the parotids. Places, sizes and their spread follow
the contours of the OpenKBP training patients.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.analytic import Point, Pose, Rows, Shape, arch, capsule, ellipsoid, plate, rotation, tube

__all__ = ["AIR", "CANAL", "GULLET", "MUSCLE", "Anatomy"]

AIR, MUSCLE = -1000.0, 56.0

# Swept organs: (s, r, a, half r, half a)
BRAINSTEM: Rows = (
    (66, 0, -18, 14, 12),
    (58, 0, -19, 15.8, 13.2),
    (46, 0, -21, 16.2, 14),
    (34, 0, -24, 14.2, 11.6),
    (22, 0, -26, 10.2, 8.6),
    (8, 0, -26, 8.5, 7.4),
)
CANAL = (
    (8, -26),
    (-20, -25),
    (-40, -27),
    (-60, -29),
    (-80, -34),
    (-100, -42),
    (-120, -52),
    (-140, -61),
    (-160, -70),
    (-180, -78),
    (-200, -84),
    (-230, -88),
    (-430, -88),
)
CORD = tuple((s, 0.0, a, 6.9, 6.1) for s, a in CANAL)
GULLET = (
    (-97, -1, -13, 7.5, 5.4),
    (-120, -2, -18, 8.6, 5.8),
    (-140, -4, -26, 8.8, 6),
    (-160, -5, -32, 9, 6.2),
    (-180, -7, -38, 9, 6.4),
    (-205, -7, -44, 9, 6.4),
    (-430, -6, -50, 9, 6.4),
)
JAW = ((0, 87, -27), (11, 84, -27), (24, 66, -25), (36, 42, -22), (46, 17, -19))
RAMUS = ((27, 50, 4, 27), (12, 49.5, 6, 31), (-8, 47.5, 7, 36), (-20, 46, 9, 38), (-29, 45, 16, 34))
PAROTID_HALF: Point = (14.0, 20.0, 26.0)
LARYNX_HALF: Point = (16.0, 16.5, 16.0)
PAROTID_POWER, LARYNX_POWER = 1.7, 3.0
JAW_JOINT: Point = (0.0, 20.0, -10.0)
LOG_VOLUME_SPREAD = {
    "brainstem": 0.16,
    "spinal cord": 0.18,
    "esophagus": 0.28,
    "larynx": 0.32,
    "mandible": 0.12,
    "right parotid": 0.16,
    "left parotid": 0.16,
}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One drawn patient. ``grow`` widens an organ (lengths in all three directions, or across where it is swept)."""

    pose: Pose
    centre: Point
    grow: dict[str, float]
    shift: dict[str, Point]
    hu: dict[str, float]
    fat: float
    stout: float
    shoulders: float
    cord_end: float
    esophagus_end: float
    swallowed_air: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """Sizes, places, pose and HU with the spread of the OpenKBP training patients."""
        glands = rng.normal(0.0, 0.25)
        spread = {name: rng.normal(0.0, sd) + glands * ("parotid" in name) for name, sd in LOG_VOLUME_SPREAD.items()}
        swept = ("brainstem", "spinal cord", "esophagus")
        pose = Pose(
            size=float(np.clip(rng.normal(1.0, 0.045), 0.88, 1.12)),
            turn=rotation(rng.normal(0.0, (3.0, 2.0, 2.0)).tolist()),
            offset=np.zeros(3),
            lean=float(rng.normal(0.0, 0.075)),
            stoop=float(rng.normal(0.0, 0.05)),
            sway=float(rng.normal(0.0, 2.0)),
            phase=float(rng.uniform(0, 6.28)),
        )
        return cls(
            pose=pose,
            centre=(float(rng.normal(0, 5)), float(rng.normal(-20, 10)), 0.0),
            grow={name: float(np.exp(log / (2 if name in swept else 3))) for name, log in spread.items()},
            shift={name: _point(rng.normal(0.0, 0.3 if name == "mandible" else 1.5, 3)) for name in spread},
            hu=_draw_hu(rng),
            fat=float(rng.uniform(3.0, 12.0)),
            stout=float(rng.normal(1.0, 0.05)),
            shoulders=float(rng.normal(0.0, 12.0)),
            cord_end=float(rng.normal(-186.0, 8.0)),
            esophagus_end=float(rng.normal(-172.0, 6.0)),
            swallowed_air=bool(rng.random() < 0.5),
        )

    def organ(self, name: str) -> list[Shape]:
        """The shapes whose union is the labelled organ."""
        return [part.moved(self.shift[name]) for part in _ORGANS[name](self)]

    def inside(self, name: str) -> list[tuple[Shape, float]]:
        """What lies within an organ's contour and looks different: shapes and HU, from the outside in."""
        found = _INSIDE[name](self) if name in _INSIDE else []
        return [(part.moved(self.shift[name]), hu) for part, hu in found]


def _brainstem(anatomy: Anatomy) -> list[Shape]:
    return [tube(BRAINSTEM, grow=anatomy.grow["brainstem"])]


def _cord(anatomy: Anatomy) -> list[Shape]:
    return [tube(_ended(CORD, anatomy.cord_end), grow=anatomy.grow["spinal cord"])]


def _parotid(name: str, side: int) -> Callable[[Anatomy], list[Shape]]:
    def shapes(anatomy: Anatomy) -> list[Shape]:
        half = _point(np.array(PAROTID_HALF) * anatomy.grow[name])
        right = ellipsoid((57.5, 0.0, 0.0), half, power=PAROTID_POWER, yaw=-18)
        return [right if side > 0 else right.mirrored()]

    return shapes


def _esophagus(anatomy: Anatomy) -> list[Shape]:
    return [tube(_ended(GULLET, anatomy.esophagus_end), grow=anatomy.grow["esophagus"])]


def _larynx(anatomy: Anatomy) -> list[Shape]:
    return [ellipsoid((0, 11, -76), _point(np.array(LARYNX_HALF) * anatomy.grow["larynx"]), power=LARYNX_POWER)]


def _mandible(anatomy: Anatomy) -> list[Shape]:
    return [part.scaled(anatomy.grow["mandible"], JAW_JOINT) for part in _jaw(0.0)]


def _jaw(slim: float) -> list[Shape]:
    """The jaw, with ``slim`` mm taken off all round."""
    ramus, condyle = plate(RAMUS, thick=4.3 - slim), ellipsoid((52, 5, 31), (9 - slim, 5.5 - slim, 7 - slim))
    crown = capsule((48, 27, 18), (47, 24, 32), 4 - slim)
    sides = (side for part in (ramus, condyle, crown) for side in (part, part.mirrored()))
    return [arch(JAW, thick=5.2 - slim, tall=12.2 - slim), *sides]


_ORGANS: dict[str, Callable[[Anatomy], list[Shape]]] = {
    "brainstem": _brainstem,
    "spinal cord": _cord,
    "right parotid": _parotid("right parotid", 1),
    "left parotid": _parotid("left parotid", -1),
    "esophagus": _esophagus,
    "larynx": _larynx,
    "mandible": _mandible,
}


def _larynx_inside(anatomy: Anatomy) -> list[tuple[Shape, float]]:
    parts: tuple[tuple[Point, float], ...] = (((13.0, 14.0, 15.0), MUSCLE - 10), ((6.8, 11.0, 17.0), AIR))
    halves = ((_point(np.array(half) * anatomy.grow["larynx"]), hu) for half, hu in parts)
    return [(ellipsoid((0, 10.5, -76), half, power=2.5), hu) for half, hu in halves]


def _mandible_inside(anatomy: Anatomy) -> list[tuple[Shape, float]]:
    """Cortex and marrow, thinner than the contour, which is drawn a little outside the bone."""
    cortex, grow = anatomy.hu["mandible"], anatomy.grow["mandible"]
    layers = ((0.0, MUSCLE), (1.2, cortex), (3.0, cortex - 600))
    return [(part.scaled(grow, JAW_JOINT), hu) for slim, hu in layers for part in _jaw(slim)]


def _esophagus_inside(anatomy: Anatomy) -> list[tuple[Shape, float]]:
    air = [(s, r, a, 2.4, 1.6) for s, r, a, *_ in _ended(GULLET, anatomy.esophagus_end)]
    return [(tube(air), -500.0)] if anatomy.swallowed_air else []


_INSIDE: dict[str, Callable[[Anatomy], list[tuple[Shape, float]]]] = {
    "larynx": _larynx_inside,
    "mandible": _mandible_inside,
    "esophagus": _esophagus_inside,
}


def _draw_hu(rng: np.random.Generator) -> dict[str, float]:
    contrast = rng.random() < 0.5
    hu = {
        "brainstem": rng.normal(31, 4),
        "spinal cord": rng.normal(36, 5),
        "parotid": rng.normal(-4, 22),
        "esophagus": rng.normal(40, 8),
        "larynx": rng.normal(130, 40),
        "mandible": rng.normal(1180, 140),
        "bone": rng.normal(750, 90),
        "vessel": rng.uniform(120, 220) if contrast else rng.normal(46, 5),
        "thyroid": rng.normal(130, 25) if contrast else rng.normal(90, 15),
        "sinus": -1000.0 if rng.random() < 0.75 else 25.0,
    }
    hu["right parotid"], hu["left parotid"] = hu["parotid"] + rng.normal(0, 4, 2)
    return {name: float(value) for name, value in hu.items()}


def _ended(rows: Rows, end: float) -> Rows:
    """The rows above ``end``, and one at it."""
    table = np.array(rows, float)[::-1]
    last = [float(np.interp(end, table[:, 0], table[:, column])) for column in range(1, table.shape[1])]
    return [*(row for row in rows if row[0] > end), (end, *last)]


def _point(values: npt.ArrayLike) -> Point:
    r, a, s = np.asarray(values, float).tolist()
    return r, a, s
