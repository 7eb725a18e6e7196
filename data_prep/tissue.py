"""Everything of the head-and-neck phantom that no label names: skin, fat, muscle, bone, air, vessels, teeth.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.analytic import Array, Canvas, Mask, arch, capsule, ellipsoid, stack, tube
from data_prep.anatomy import AIR, CANAL, GULLET, JAW_JOINT, MUSCLE, Anatomy

__all__ = ["paint_teeth", "paint_tissue"]

LUNG, FAT, SKIN, CSF, BRAIN, MARROW = -830.0, -105.0, -20.0, 8.0, 36.0, 320.0

# Body outlines: (s, front, back, a where widest, half width, power in front, power behind)
HEAD = (
    (156, -10, -36, -22, 14, 2, 2),
    (148, 22, -70, -22, 46, 2, 2),
    (135, 48, -90, -21, 62, 2.1, 2.1),
    (118, 68, -102, -20, 72, 2.2, 2.2),
    (100, 76, -108, -18, 77, 2.3, 2.2),
    (80, 78, -111, -16, 79, 2.3, 2.2),
    (60, 82, -111, -14, 79, 2.1, 2.3),
    (40, 89, -107, -8, 78, 1.8, 2.3),
    (20, 92, -99, -5, 78, 1.7, 2.4),
    (0, 95, -88, -4, 74, 1.55, 2.5),
    (-20, 95, -80, -4, 70, 1.4, 2.6),
    (-40, 86, -78, -8, 65, 1.4, 2.6),
    (-54, 62, -82, -20, 63, 1.45, 2.6),
    (-64, 46, -88, -30, 62, 1.6, 2.5),
    (-80, 36, -98, -48, 66, 1.55, 2.3),
    (-100, 30, -113, -58, 70, 1.6, 2.2),
    (-125, 26, -122, -60, 72, 1.8, 2.2),
    (-160, 26, -122, -45, 62, 2, 2),
)
TORSO = (
    (-74, -52, -88, -70, 42, 2, 2),
    (-86, -30, -103, -68, 84, 1.7, 2.2),
    (-100, -16, -117, -62, 124, 1.8, 2.4),
    (-120, 8, -132, -58, 150, 2.0, 2.8),
    (-140, 34, -140, -55, 166, 2.1, 3.0),
    (-165, 50, -144, -50, 170, 2.3, 3.0),
    (-200, 72, -144, -42, 168, 2.5, 3.0),
    (-240, 90, -143, -35, 164, 2.6, 3.0),
    (-420, 98, -143, -30, 160, 2.6, 3.0),
)
# Airway: (s, r, a, half r, half a)
PHARYNX = (
    (34, 0, 22, 13, 9),
    (15, 0, 15, 13, 9),
    (-10, 0, 13, 11, 6),
    (-35, 0, 13, 12, 8),
    (-58, 0, 10, 13, 7),
    (-74, 0, 11, 7, 9),
)
TRACHEA = (
    (-72, 0, 11, 7, 9),
    (-92, 0, 8, 8, 9),
    (-120, 0, 1, 8.5, 8.5),
    (-150, 1, -10, 8.5, 8.5),
    (-200, 2, -24, 8.5, 8.5),
    (-250, 2, -34, 9, 8.5),
)
CAROTID = ((10, 30, -6, 3, 3), (-60, 29, 2, 4, 4), (-150, 20, -6, 4.5, 4.5), (-230, 10, 0, 7, 7))
JUGULAR = ((10, 35, -12, 5, 4), (-60, 36, -3, 6.5, 6), (-150, 28, 4, 7, 7), (-200, 12, 16, 8, 8))
# Under the brain: (a, s) in the middle plane
SKULL_FLOOR = np.array(
    [(-110, 34), (-88, 24), (-60, 12), (-34, 8), (-18, 10), (-6, 22), (6, 42), (20, 52), (32, 62), (80, 68)], float
)
# Middles of the vertebrae, from the third of the neck down
VERTEBRAE = (-34, -51, -68, -85, -103, -122, -142, -163, -185, -208, -232, -257, -283, -310, -338, -367)


def paint_tissue(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Paint from the outside in; organs and teeth come after it."""
    _body(canvas, anatomy, rng)
    _chest(canvas, anatomy)
    _skull(canvas, anatomy)
    _face(canvas, anatomy)
    _spine(canvas, anatomy)
    _neck(canvas, anatomy, rng)


def _body(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    fat, stout, lift = anatomy.fat, anatomy.stout, anatomy.shoulders
    layers = ((0.0, SKIN), (2.0, FAT), (2.0 + fat, MUSCLE))
    for shrink, hu in layers:
        scalp = 2.0 + 0.3 * (shrink - 2.0) if shrink else 0.0
        limb = ellipsoid((156, -62, -154 + lift), (86 - shrink, 54 - shrink, 62 - shrink), power=2.2)
        arm = tube([(-150 + lift, 192, -68, 48 - shrink, 50 - shrink), (-430, 214, -66, 44 - shrink, 46 - shrink)])
        canvas.paint(stack(TORSO, shrink=shrink, wide=stout).moved((0, 0, lift / 3)), hu)
        canvas.paint_pair(limb, hu)
        canvas.paint_pair(arm, hu)
        canvas.paint(stack(HEAD, shrink=scalp), hu)
    canvas.paint_pair(ellipsoid((81, -12, 30), (5, 13, 24)), SKIN)  # ears
    canvas.paint(ellipsoid((0, 90, 36), (13, 17, 17)), SKIN)  # nose
    _marble(canvas, rng)


def _marble(canvas: Canvas, rng: np.random.Generator) -> None:
    """Sheets of fat between the muscles: where a sum of waves in anatomy mm is near zero."""
    muscle = canvas.hu == MUSCLE
    places = [axis[muscle] for axis in canvas.places]
    waves = np.zeros(np.count_nonzero(muscle), np.float32)
    for length in (22.0, 30.0, 38.0, 52.0):
        direction = rng.normal(size=3) * (1.0, 1.0, 0.45)
        rate = (2 * np.pi / length * direction / np.linalg.norm(direction)).astype(np.float32)
        waves += np.sin(sum(k * axis for k, axis in zip(rate, places, strict=True)) + np.float32(rng.uniform(0, 6.28)))
    share, thick = rng.uniform(0.25, 0.8), rng.uniform(0.2, 0.45)
    canvas.hu[muscle] = MUSCLE + share * (FAT - MUSCLE) * np.clip(1.3 - np.abs(waves) / thick, 0, 1)


def _chest(canvas: Canvas, anatomy: Anatomy) -> None:
    bone, lift = anatomy.hu["bone"], anatomy.shoulders
    ribs = ellipsoid((62, -38, -262), (60, 78, 152))

    def hoops(r: Array, a: Array, s: Array) -> Mask:
        return np.asarray(np.mod(s - 0.45 * a, 25.0) < 9.0)

    canvas.paint_pair(ribs, MUSCLE)
    canvas.paint_pair(ribs.where(hoops), bone - 450)
    canvas.paint_pair(ellipsoid((62, -38, -262), (52, 70, 145)), LUNG)
    canvas.paint(ellipsoid((4, 5, -280), (34, 52, 80), power=2.5), anatomy.hu["vessel"])  # heart and great vessels
    canvas.paint(capsule((0, 36, -165), (0, 66, -290), 10), MARROW - 120)  # breastbone
    for side in (1, -1):
        canvas.paint(capsule((side * 16, 30, -152), (side * 70, 8, -138 + lift / 2), 6), bone - 250)  # collarbone
        canvas.paint(capsule((side * 70, 8, -138 + lift / 2), (side * 158, -48, -124 + lift), 6), bone - 250)
        canvas.paint(ellipsoid((side * 182, -62, -148 + lift), (23, 24, 24)), bone)
        canvas.paint(ellipsoid((side * 182, -62, -148 + lift), (20, 21, 21)), MARROW - 150)
        canvas.paint(capsule((side * 190, -62, -165 + lift), (side * 212, -64, -420), 11), bone + 150)
        canvas.paint(capsule((side * 190, -62, -165 + lift), (side * 212, -64, -420), 5), FAT + 60)
        canvas.paint(capsule((side * 78, -118, -130 + lift), (side * 148, -82, -132 + lift), 6), bone - 250)
        canvas.paint(capsule((side * 92, -117, -140 + lift), (side * 108, -120, -250), 5), bone - 250)  # shoulder blade
        canvas.paint(capsule((side * 150, -75, -150 + lift), (side * 108, -114, -230), 5), bone - 250)


def _skull(canvas: Canvas, anatomy: Anatomy) -> None:
    bone, centre = anatomy.hu["bone"], (0.0, -20.0, 62.0)

    def above(drop: float) -> Callable[[Array, Array, Array], Mask]:
        def inside(r: Array, a: Array, s: Array) -> Mask:
            level = np.interp(a + 0.008 * r**2, SKULL_FLOOR[:, 0], SKULL_FLOOR[:, 1]) + 0.003 * r**2
            return np.asarray(s > np.where(np.abs(r) > 20, np.minimum(level, 40), level) - drop)

        return inside

    vault = ellipsoid(centre, (72, 82, 90), power=2.2)
    hollow = ellipsoid(centre, (65.5, 75.5, 83.5), power=2.2)
    canvas.paint_pair(ellipsoid((0, 53, 62), (34, 20, 16), power=3), FAT)  # orbits
    canvas.paint(vault.where(above(6)), bone + 250)
    canvas.paint(hollow.where(above(0)), CSF + 12)
    canvas.paint(ellipsoid(centre, (63.5, 73.5, 81.5), power=2.2).where(above(1)), BRAIN)
    canvas.paint(ellipsoid((0, -62, 34), (46, 30, 24)).where(above(1)), BRAIN + 4)  # cerebellum
    canvas.paint_pair(ellipsoid((11, -6, 92), (7, 30, 12)), CSF)  # ventricles
    canvas.paint(ellipsoid((0, -42, 34), (8, 5, 12)), CSF)  # fourth ventricle
    canvas.paint(tube([(72, 0, -15, 19, 16), (46, 0, -16, 19, 18), (20, 0, -24, 13, 12), (10, 0, -26, 11, 10)]), CSF)
    canvas.paint(capsule((0, 14, 46), (0, -11, 12), 6.5), bone - 250)  # clivus
    canvas.paint_pair(ellipsoid((43, -6, 34), (27, 12, 14), yaw=-22), bone + 150)  # petrous bone
    canvas.paint_pair(ellipsoid((56, -24, 20), (9, 13, 17)), bone - 300)  # mastoid and its air cells
    canvas.paint_pair(ellipsoid((57, -24, 23), (6, 9, 11)), -350)
    canvas.paint_pair(ellipsoid((22, 8, 36), (9, 8, 9)), bone - 350)
    canvas.paint_pair(ellipsoid((31, 62, 63), (12.5, 12.5, 12.5)), 18)  # eyes
    if anatomy.hu["sinus"] < -500:
        canvas.paint(ellipsoid((4, 62, 82), (15, 6, 10)), AIR)  # frontal sinus


def _face(canvas: Canvas, anatomy: Anatomy) -> None:
    bone, sinus = anatomy.hu["bone"], anatomy.hu["sinus"]
    canvas.paint(ellipsoid((0, 56, 30), (38, 28, 22), power=3.0), MUSCLE - 20)
    canvas.paint(arch([(0, 82, 22), (12, 78, 22), (23, 62, 22), (29, 42, 22)], thick=6, tall=10), bone - 150)
    canvas.paint(ellipsoid((0, 56, 22), (23, 26, 1.8)), bone - 450)  # hard palate
    for side, hu in ((1, sinus), (-1, AIR)):
        canvas.paint(ellipsoid((side * 27, 51, 40), (17, 20, 19), power=2.5), bone - 350)
        canvas.paint(ellipsoid((side * 27, 51, 40), (14, 17, 16), power=2.5), hu)
    canvas.paint(ellipsoid((0, 50, 42), (10, 38, 17), power=2.5), -700)  # nose
    canvas.paint(ellipsoid((0, 42, 58), (11, 26, 12), power=2.5), -620)  # ethmoid cells
    canvas.paint(ellipsoid((0, 50, 42), (1.6, 36, 20)), 150)  # septum
    canvas.paint_pair(capsule((19, 28, 36), (20, 24, 8), 3.5), bone - 350)  # pterygoid plates
    canvas.paint_pair(capsule((34, 66, 40), (58, 46, 38), 6), bone - 100)  # cheekbone and arch
    canvas.paint_pair(capsule((58, 46, 38), (66, 4, 36), 3.2), bone)
    canvas.paint_pair(capsule((42, 62, 46), (48, 56, 76), 3.5), bone - 100)
    canvas.paint_pair(ellipsoid((52, 25, -2), (8, 15, 24)), MUSCLE + 6)  # masseter
    canvas.paint_pair(ellipsoid((34, 22, 2), (8, 14, 20)), MUSCLE + 6)  # pterygoid muscles
    canvas.paint_pair(ellipsoid((38, 48, 4), (9, 12, 15)), FAT)  # cheek fat
    canvas.paint(ellipsoid((0, 50, -4), (23, 30, 20)), MUSCLE)  # tongue
    canvas.paint(ellipsoid((0, 44, 18), (20, 26, 2.5)), AIR)  # mouth


def _spine(canvas: Canvas, anatomy: Anatomy) -> None:
    bone, canal = anatomy.hu["bone"], np.array(CANAL[::-1], float)
    canvas.paint(tube([(3, 0, -21, 24, 20), (-6, 0, -21, 24, 20)]), bone - 150)  # atlas
    canvas.paint(tube([(3, 0, -21, 20, 16), (-6, 0, -21, 20, 16)]), MUSCLE)
    canvas.paint_pair(ellipsoid((19, -15, -1), (8, 9, 8)), bone - 150)
    canvas.paint(tube([(-9, 0, -20, 22, 17), (-22, 0, -21, 22, 20)]), bone - 150)  # axis, and its dens
    canvas.paint(capsule((0, -6, 6), (0, -8, -24), 7), bone - 150)
    canvas.paint(capsule((0, -40, -18), (0, -58, -26), 4), bone - 250)
    for number, s in enumerate(VERTEBRAE):
        a, grow = float(np.interp(s, canal[:, 0], canal[:, 1])), 1 + 0.035 * min(number, 9)
        chest = number >= 5
        reach = 17 + 12 * min(number / 5, 1.0)
        canvas.paint(ellipsoid((0, a + 10 + 9 * grow, s - 9), (11 * grow, 9 * grow, 3), power=3), 90)  # disc
        canvas.paint(ellipsoid((0, a + 10 + 9 * grow, s), (13 * grow, 10 * grow, 8 * grow), power=4), bone - 150)
        canvas.paint(ellipsoid((0, a + 10 + 9 * grow, s), (11 * grow, 7.5 * grow, 6 * grow), power=4), MARROW - 60)
        canvas.paint(ellipsoid((0, a - 2, s), (20 * grow, 14.5, 7 * grow), power=3), bone - 150)  # arch
        canvas.paint_pair(capsule((14, a + 2, s), (23 + 10 * chest, a + 2 - 18 * chest, s), 4), bone - 300)
        canvas.paint(capsule((0, a - 14, s - 2), (0, a - 14 - reach, s - 8 - 10 * chest), 3.2), bone - 250)
    canvas.paint(tube([(s, 0, a, 12.3, 10.3) for s, a in CANAL]), CSF + 12)


def _neck(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    vessel, gland = anatomy.hu["vessel"], anatomy.hu["thyroid"]
    for r, a in ((46, -8), (34, 8)):
        canvas.paint_pair(ellipsoid((r, a, -60), (9, 12, 46)), FAT)  # carotid and posterior spaces
    canvas.paint_pair(capsule((54, -22, 8), (44, -10, -50), 8), MUSCLE + 6)  # sternocleidomastoid
    canvas.paint_pair(capsule((44, -10, -50), (16, 22, -146), 8), MUSCLE + 6)
    canvas.paint_pair(tube(CAROTID), vessel)
    canvas.paint_pair(tube(JUGULAR), vessel)
    canvas.paint_pair(ellipsoid((26, 40, -40), (9, 14, 11)), MUSCLE - 18)  # submandibular glands
    canvas.paint_pair(ellipsoid((17, 4, -108), (8, 9, 20)), gland)
    canvas.paint(arch([(0, 32, -55), (10, 29, -55), (18, 14, -54)], thick=3, tall=4), MARROW)  # hyoid
    canvas.paint(tube(TRACHEA, grow=1.3), 75)
    if rng.random() < 0.35:  # a mass that no label names
        side, size = float(rng.choice([-1, 1])), rng.uniform(9, 19)
        centre = (side * rng.uniform(14, 40), rng.uniform(-2, 25), rng.uniform(-70, -5))
        wide, deep, tall = (size * rng.uniform(0.75, 1.25, 3)).tolist()
        canvas.paint(ellipsoid(centre, (wide, deep, tall)), rng.uniform(45, 85))
    canvas.paint(tube(PHARYNX, grow=float(rng.uniform(0.7, 1.05))), AIR)
    canvas.paint(tube(TRACHEA), AIR)
    canvas.paint(tube(GULLET, grow=1.15), FAT + 30)


def paint_teeth(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator, *, lower: bool) -> None:
    """Paint the teeth (the lower ones unless the jaw is gone) and, in some, fillings."""
    about, grow = JAW_JOINT, anatomy.grow["mandible"]
    upper_row = [(0, 83, 8), (11, 79, 8), (23, 64, 8), (30, 46, 8)]
    lower_row = [(0, 83, -7), (10, 80, -7), (22, 65, -7), (29, 48, -7)]
    for row, there in ((upper_row, True), (lower_row, lower)):
        toothless, crown = rng.random() < 0.15, rng.uniform(1400, 2100)
        teeth = arch(row, thick=4.0, tall=6.0).where(lambda r, a, s: np.asarray(np.mod(a + np.abs(r), 9.0) > 1.2))
        if there and not toothless:
            canvas.paint(teeth.scaled(grow, about), crown)
        for side in (-1, 1):
            if rng.random() < 0.3 and there and not toothless:
                canvas.paint(ellipsoid((side * 26.0, 54.0, row[0][2]), (4, 6, 4)).scaled(grow, about), 3000.0)
