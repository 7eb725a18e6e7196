"""A head and neck that is known exactly: analytic organs in plausible places and HU, randomised by a seed.

Every shape is evaluated in patient millimetres, so any grid, spacing and orientation shows the same anatomy. Labels are
OpenKBP's, so that one model can learn from both, and complete: what is left out is certainly absent.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from data_prep.case import Case
from data_prep.volume import Volume

__all__ = ["NAMES", "head_neck"]

NAMES = {
    1: "brainstem",
    2: "spinal cord",
    3: "right parotid",
    4: "left parotid",
    5: "esophagus",
    6: "larynx",
    7: "mandible",
}
LABEL_OF = {name: value for value, name in NAMES.items()}
AIR, FAT, MUSCLE, BRAIN = -1000.0, -100.0, 50.0, 36.0

Array = npt.NDArray[np.float32]
Shape = Callable[[Array, Array, Array], npt.NDArray[np.bool_]]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Anatomy:
    """One drawn patient, in mm with the mandible at the origin: R to the right, A forward, S up."""

    size: float
    lean: float
    width: dict[str, float]
    shift: dict[str, Point]
    turn: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]
    hu: dict[str, float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """Sizes, places, pose and HU within what the OpenKBP training patients show."""
        organs = [*NAMES.values(), "body"]
        hu = {
            "brainstem": rng.normal(33, 3),
            "spinal cord": rng.normal(38, 4),
            "parotid": rng.normal(-2, 18),
            "esophagus": rng.normal(38, 8),
            "cartilage": rng.normal(140, 40),
            "mandible": rng.normal(850, 120),
            "bone": rng.normal(700, 100),
        }
        return cls(
            size=float(rng.normal(1.0, 0.04)),
            lean=float(rng.normal(0.0, 0.06)),
            width={name: float(np.exp(rng.normal(0.0, 0.07))) for name in organs},
            shift={name: tuple(rng.normal(0.0, 2.0, 3).tolist()) for name in organs},
            turn=_rotation(np.deg2rad(rng.normal(0.0, 3.0, 3))),
            offset=rng.normal(0.0, 6.0, 3),
            hu={name: float(value) for name, value in hu.items()},
        )


class Canvas:
    """Voxels with their places; painting evaluates a shape only where its bounding box lies."""

    def __init__(self, anatomy: Anatomy, shape: tuple[int, int, int], affine: npt.NDArray[np.float64]) -> None:
        self.anatomy, self.shape = anatomy, shape
        self.hu = np.full(shape, AIR, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        inverse = np.eye(4)  # patient mm -> anatomy mm
        inverse[:3, :3] = anatomy.turn.T / anatomy.size
        inverse[:3, 3] = -inverse[:3, :3] @ anatomy.offset
        self.to_anatomy = inverse @ affine
        self.to_voxel = np.linalg.inv(self.to_anatomy)

    def paint(self, inside: Shape, centre: Point, half: Point, hu: float, label: int | None = None) -> None:
        """Fill a shape that lies within ``centre`` +- ``half``; a label of 0 erases what was there."""
        window = self._window(np.array(centre, float), np.array(half, float))
        if window is None:
            return
        within = inside(*self._places(window))
        self.hu[window][within] = hu
        if label is not None:
            self.labels[window][within] = label

    def _window(self, centre: npt.NDArray[np.float64], half: npt.NDArray[np.float64]) -> tuple[slice, ...] | None:
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
        corners = centre + signs * half
        corners = np.concatenate([self._bend(corners, -1), corners])
        at = corners @ self.to_voxel[:3, :3].T + self.to_voxel[:3, 3]
        lo = np.maximum(np.floor(at.min(axis=0)).astype(int) - 1, 0)
        hi = np.minimum(np.ceil(at.max(axis=0)).astype(int) + 2, self.shape)
        return None if (lo >= hi).any() else tuple(slice(a, b) for a, b in zip(lo.tolist(), hi.tolist(), strict=True))

    def _places(self, window: tuple[slice, ...]) -> tuple[Array, Array, Array]:
        axes = [np.arange(side.start, side.stop, dtype=np.float32) for side in window]
        grids = np.meshgrid(*axes, indexing="ij", sparse=True)
        matrix = self.to_anatomy.astype(np.float32)
        r, a, s = (sum(matrix[row, i] * grids[i] for i in range(3)) + matrix[row, 3] for row in range(3))
        return r, a - self.anatomy.lean * s, s

    def _bend(self, places: npt.NDArray[np.float64], sign: int) -> npt.NDArray[np.float64]:
        bent = places.copy()
        bent[:, 1] -= sign * self.anatomy.lean * places[:, 2]
        return bent


def head_neck(
    seed: int,
    *,
    shape: tuple[int, int, int] | None = None,
    spacing: tuple[float, float, float] | None = None,
    without: Collection[str] = (),
) -> Case:
    """A patient drawn by ``seed``, in OpenKBP's layout (axes P, L, I; 128 x 128 x 51..128 voxels of about 4 x 4 x 2.5 mm).

    Raises:
        ValueError: ``without`` names no structure of the phantom.
    """
    unknown = sorted(set(without) - set(LABEL_OF))
    if unknown:
        raise ValueError(f"the phantom has no {', '.join(unknown)}; it has {', '.join(LABEL_OF)}")
    rng = np.random.default_rng(seed)
    anatomy = Anatomy.draw(rng)
    drawn_shape, drawn_spacing, top = _field_of_view(rng)
    shape, spacing = shape or drawn_shape, spacing or drawn_spacing
    canvas = Canvas(anatomy, shape, _affine(shape, spacing, top))
    _body(canvas)
    _head(canvas, rng)
    _spine(canvas)
    _airway(canvas)
    _organs(canvas, set(without))
    hu = _as_scanned(canvas, rng)
    return Case(
        id=f"phantom_{seed}",
        patient_id=f"phantom_{seed}",
        volume=Volume(hu, _affine(shape, spacing, top)),
        labels=canvas.labels,
        names=NAMES,
        complete=True,
        source={"dataset": "M3D head-and-neck phantom", "license": "Apache-2.0", "seed": seed},
    )


def ellipsoid(centre: Point, half: Point, power: float = 2.0) -> Shape:
    """``|x/a|^p + |y/b|^p + |z/c|^p <= 1``."""

    def inside(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
        terms = (np.abs((x - c) / h) ** power for x, c, h in zip((r, a, s), centre, half, strict=True))
        return np.asarray(sum(terms) <= 1)

    return inside


def tube(path: npt.NDArray[np.float64], half_r: float, half_a: float) -> Shape:
    """An elliptic tube along a path (r, a) of s: rows of (s, r, a), s falling."""

    def inside(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
        at_r, at_a = (np.interp(s, path[::-1, 0], path[::-1, i]).astype(np.float32) for i in (1, 2))
        within = (s >= path[-1, 0]) & (s <= path[0, 0])
        return np.asarray((((r - at_r) / half_r) ** 2 + ((a - at_a) / half_a) ** 2 <= 1) & within)

    return inside


CORD = np.array([[30.0, 0, -80], [0, 0, -88], [-40, 0, -86], [-80, 0, -86], [-120, 0, -96], [-230, 0, -118]])


def _body(canvas: Canvas) -> None:
    wide = canvas.anatomy.width["body"]
    everywhere: tuple[Point, Point] = ((0, -80, -50), (300, 180, 260))
    parts = (
        ellipsoid((0, -48, 58), (83 * wide, 104, 112), 2.4),  # head
        ellipsoid((0, -42, -8), (70 * wide, 92, 62), 2.6),  # face and jaw
        ellipsoid((0, -74, -60), (68 * wide, 72, 90), 3.0),  # neck
        ellipsoid((0, -96, -240), (245 * wide, 108, 178), 2.9),  # shoulders and upper chest
    )

    def skin(grow: float) -> Shape:
        def inside(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
            middle = -75.0
            place = (r * grow, (a - middle) * grow + middle, s)
            return np.asarray(np.logical_or.reduce([part(*place) for part in parts]))

        return inside

    canvas.paint(skin(1.0), *everywhere, FAT)
    canvas.paint(skin(1.10), *everywhere, MUSCLE)
    for side in (-1, 1):  # lung tops
        canvas.paint(ellipsoid((75 * side, -95, -235), (58, 70, 80)), (75 * side, -95, -235), (58, 70, 80), -820)


def _head(canvas: Canvas, rng: np.random.Generator) -> None:
    bone = canvas.anatomy.hu["bone"]
    for half, hu in (((72.0, 93.0, 90.0), bone + 150), ((65.0, 86.0, 83.0), BRAIN)):
        shell = ellipsoid((0, -50, 72), half, 2.2)
        canvas.paint(lambda r, a, s, shell=shell: shell(r, a, s) & (s > 24), (0, -50, 72), half, hu)  # type: ignore[misc]
    for centre, half, hu in (
        ((0.0, 22.0, 34.0), (34.0, 26.0, 20.0), bone - 250),  # upper jaw and cheeks
        ((0.0, 20.0, 42.0), (14.0, 26.0, 16.0), -850.0),  # nose
        ((30.0, 24.0, 46.0), (13.0, 14.0, 14.0), -900.0),  # right maxillary sinus
        ((-30.0, 24.0, 46.0), (13.0, 14.0, 14.0), -900.0),  # left maxillary sinus
        ((32.0, 34.0, 78.0), (13.0, 13.0, 13.0), 20.0),  # right eye
        ((-32.0, 34.0, 78.0), (13.0, 13.0, 13.0), 20.0),  # left eye
        ((0.0, -78.0, 58.0), (30.0, 28.0, 26.0), 10.0),  # CSF around the brainstem
        ((0.0, -112.0, 56.0), (45.0, 26.0, 24.0), BRAIN + 3),  # cerebellum
    ):
        canvas.paint(ellipsoid(centre, half), centre, half, hu)
    if rng.random() < 0.5:  # dental fillings
        canvas.paint(ellipsoid((28, 20, 8), (6, 8, 4)), (28, 20, 8), (6, 8, 4), 2200)


def _spine(canvas: Canvas) -> None:
    bone = canvas.anatomy.hu["bone"]
    for number, s in enumerate(np.arange(10.0, -240.0, -20.0).tolist()):
        r, a = float(np.interp(s, CORD[::-1, 0], CORD[::-1, 1])), float(np.interp(s, CORD[::-1, 0], CORD[::-1, 2]))
        grow = 1 + 0.02 * number
        for centre, half, hu, power in (
            ((r, a + 20, s), (13 * grow, 11 * grow, 8.5), bone - 330, 4.0),  # vertebral body
            ((r, a, s), (19 * grow, 13 * grow, 8.0), bone - 150, 3.0),  # arch
            ((r, a - 24, s - 6), (4.0, 18.0, 6.0), bone - 200, 2.5),  # spinous process
            ((r, a + 20, s - 10), (12 * grow, 10 * grow, 2.5), 90.0, 3.0),  # disc
        ):
            canvas.paint(ellipsoid(centre, half, power), centre, half, hu)
    canvas.paint(tube(CORD, 11, 9.5), (0, -95, -100), (20, 50, 140), -20)


def _airway(canvas: Canvas) -> None:
    pharynx = np.array([[42.0, 0, -34], [0, 0, -46], [-44, 0, -40]])
    trachea = np.array([[-76.0, 0, -40], [-120, 0, -52], [-230, 0, -80]])
    canvas.paint(tube(pharynx, 10, 6), (0, -40, 0), (12, 20, 46), AIR)
    canvas.paint(tube(trachea, 11, 11), (0, -60, -150), (14, 50, 90), canvas.anatomy.hu["cartilage"] - 60)
    canvas.paint(tube(trachea, 9, 9), (0, -60, -150), (14, 50, 90), AIR)


def _organs(canvas: Canvas, without: set[str]) -> None:
    painters: dict[str, Callable[[Canvas, int], None]] = {
        "brainstem": _brainstem,
        "spinal cord": _cord,
        "right parotid": lambda on, label: _parotid(on, label, "right parotid", 1),
        "left parotid": lambda on, label: _parotid(on, label, "left parotid", -1),
        "esophagus": _esophagus,
        "larynx": _larynx,
        "mandible": _mandible,
    }
    for name, painter in painters.items():
        if name not in without:
            painter(canvas, LABEL_OF[name])


def _brainstem(canvas: Canvas, label: int) -> None:
    wide = canvas.anatomy.width["brainstem"]
    path = np.array([[80.0, 0, -66], [50, 0, -72], [28, 0, -80]])  # (s, r, a)

    def inside(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
        belly = 1.0 + 0.25 * np.exp(-(((s - 58) / 14) ** 2))  # the pons
        at = np.interp(s, path[::-1, 0], path[::-1, 2])
        return np.asarray(((r / 13) ** 2 + ((a - at) / 11) ** 2 <= (wide * belly) ** 2) & (s >= 28) & (s <= 80))

    canvas.paint(inside, (0, -73, 54), (24, 28, 30), canvas.anatomy.hu["brainstem"], label)


def _cord(canvas: Canvas, label: int) -> None:
    wide = canvas.anatomy.width["spinal cord"]
    path = CORD.copy()
    path[0, 0] = 27.9
    canvas.paint(
        tube(path, 7.2 * wide, 6.2 * wide), (0, -95, -100), (16, 50, 140), canvas.anatomy.hu["spinal cord"], label
    )


def _parotid(canvas: Canvas, label: int, name: str, side: int) -> None:
    wide, (r, a, s) = canvas.anatomy.width[name], canvas.anatomy.shift[name]
    centre = (side * (60 + r), -48 + a, 13 + s)
    half = (12 * wide, 18.5 * wide, 25 * wide)
    canvas.paint(ellipsoid(centre, half, 2.2), centre, half, canvas.anatomy.hu["parotid"], label)


def _esophagus(canvas: Canvas, label: int) -> None:
    wide = canvas.anatomy.width["esophagus"]
    path = np.array([[-94.0, -2, -62], [-130, -4, -70], [-172, -4, -84]])
    canvas.paint(tube(path, 8 * wide, 6.2 * wide), (0, -72, -133), (16, 30, 42), canvas.anatomy.hu["esophagus"], label)
    canvas.paint(tube(path, 2.0, 1.2), (0, -72, -133), (16, 30, 42), -300)


def _larynx(canvas: Canvas, label: int) -> None:
    wide = canvas.anatomy.width["larynx"]
    r, a, s = canvas.anatomy.shift["larynx"]
    centre = (r / 2, -33 + a, -61 + s)
    for half_r, half_a, hu in ((15.5, 16, canvas.anatomy.hu["cartilage"]), (12, 12.5, MUSCLE), (6, 8, AIR)):
        half = (half_r * wide, half_a * wide, 15.5 * wide)
        canvas.paint(ellipsoid(centre, half, 5.0), centre, half, hu, label)


def _mandible(canvas: Canvas, label: int) -> None:
    wide = canvas.anatomy.width["mandible"]
    cortex = canvas.anatomy.hu["mandible"]

    def arch(thick: float, tall: float) -> Shape:
        def inside(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
            radius = np.sqrt((r / (48 * wide)) ** 2 + ((a + 36) / (70 * wide)) ** 2)
            drop = s + 14 + 0.06 * (a + 36)
            return np.asarray((np.abs(radius - 1) * 52 <= thick) & (np.abs(drop) <= tall) & (a > -36))

        return inside

    for thick, tall, hu in ((4.7, 9.5, cortex), (2.2, 6.5, cortex - 350)):
        canvas.paint(arch(thick, tall), (0, 0, -14), (66, 90, 24), hu, label)
    for side in (-1, 1):
        centre, half = (side * 51.0 * wide, -40.0, 9.0), (4.2, 12.5, 34.0)
        canvas.paint(ellipsoid(centre, half, 3.5), centre, half, cortex, label)

    def teeth(r: Array, a: Array, s: Array) -> npt.NDArray[np.bool_]:
        radius = np.sqrt((r / (44 * wide)) ** 2 + ((a + 36) / (65 * wide)) ** 2)
        return np.asarray((np.abs(radius - 1) * 50 <= 3.5) & (s > -2) & (s < 12) & (a > 0))

    canvas.paint(teeth, (0, 10, 5), (60, 60, 10), 1700)


def _as_scanned(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Partial volume, soft texture, noise, and sometimes the couch."""
    hu = gaussian_filter(canvas.hu, 0.55)
    inside = hu > -500
    coarse = rng.normal(0, 1, [side // 8 + 2 for side in hu.shape]).astype(np.float32)
    texture = np.kron(coarse, np.ones((8, 8, 8), np.float32))[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    hu += np.where(inside, 8 * gaussian_filter(texture, 4) / 0.35, 0)
    hu += np.where(inside, rng.uniform(6, 18), 3) * rng.standard_normal(hu.shape, dtype=np.float32)
    if rng.random() < 0.5:
        row = int(0.93 * hu.shape[0])
        hu[row : row + 1] = np.maximum(hu[row : row + 1], -350)
    clipped: Array = np.round(np.clip(hu, -1000, 3000)).astype(np.float32)
    return clipped


def _field_of_view(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[float, float, float], float]:
    """Shape, spacing and the S of the top slice, in OpenKBP's ranges."""
    plane, slice_mm = float(rng.choice([3.906, 4.297, 4.688, 5.078])), float(rng.choice([2.0, 2.5, 3.0]))
    top, bottom = float(rng.uniform(62, 165)), float(rng.uniform(-215, -70))
    slices = int(np.clip(round((top - bottom) / slice_mm), 51, 128))
    return (128, 128, slices), (plane, plane, slice_mm), top


def _affine(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], top: float
) -> npt.NDArray[np.float64]:
    """Axes P, L, I; the field is centred on the patient, its first slice at ``top``."""
    affine = np.zeros((4, 4))
    affine[1, 0], affine[0, 1], affine[2, 2], affine[3, 3] = -spacing[0], -spacing[1], -spacing[2], 1.0
    affine[1, 3] = -70 + spacing[0] * (shape[0] - 1) / 2
    affine[0, 3] = spacing[1] * (shape[1] - 1) / 2
    affine[2, 3] = top
    return affine


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    turn = np.eye(3)
    for (i, j), angle in zip(((0, 1), (0, 2), (1, 2)), angles.tolist(), strict=True):
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    return turn
