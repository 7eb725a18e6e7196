"""Measurements of masks whose size, place and values are known by hand, by brute force, or from the facts of data."""

import itertools
import time

import numpy as np
import pytest

from data_prep.case import Case
from data_prep.derived.facts import facts
from data_prep.volume import Volume
from m3d.inference.measurements import measure_mask, unit_of

# voxels of 3 x 2 x 1.5 mm: the first axis grows to superior, the second to posterior, the third to left
AFFINE = np.array([[0, 0, -1.5, 30], [0, -2.0, 0, 20], [3.0, 0, 0, -10], [0, 0, 0, 1]])
SHAPE = (10, 12, 14)


def scan(affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).normal(-200, 300, shape).astype(np.float32), affine)


def block(lo: tuple[int, int, int], hi: tuple[int, int, int], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high) for low, high in zip(lo, hi, strict=True))] = True
    return mask


def oblique() -> np.ndarray:
    """Turned by angles of no beauty, with voxels that are no cubes and a shear."""
    x, y = np.radians(20), np.radians(35)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_y @ np.array([[0.8, 0.1, 0], [0, 1.3, 0], [0, 0, 2.5]])
    affine[:3, 3] = (-40, 12, 7)
    return affine


def corners_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """All eight corners of every voxel, one by one."""
    half = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    corners = (np.argwhere(mask)[:, None] + half[None]).reshape(-1, 3)
    return corners @ affine[:3, :3].T + affine[:3, 3]


def test_a_box_has_the_measures_that_one_computes_by_hand():
    volume = scan()
    found = measure_mask(block((2, 3, 4), (5, 7, 12)), volume)
    assert found.voxels == 3 * 4 * 8
    assert found.volume_ml == pytest.approx(96 * 0.009)
    assert found.extent_mm == pytest.approx((12.0, 8.0, 9.0))  # R: 8 x 1.5, A: 4 x 2, S: 3 x 3
    assert found.centroid_mm == pytest.approx((30 - 1.5 * 7.5, 20 - 2 * 4.5, -10 + 3 * 3))
    assert found.longest_diameter_mm == pytest.approx(17.0)  # 8, 9 and 12 squared are 289
    inside = volume.array[2:5, 3:7, 4:12].astype(np.float64)
    assert found.mean == pytest.approx(inside.mean())
    assert found.sd == pytest.approx(np.sqrt(((inside - inside.mean()) ** 2).mean()))
    assert not found.touches_edge and found.unit == "HU"


@pytest.mark.parametrize(
    ("hi", "diameter"),
    [
        ((3, 4, 5), np.sqrt(9 + 4 + 2.25)),  # one voxel: its diagonal
        ((3, 4, 13), np.sqrt(9 + 4 + (9 * 1.5) ** 2)),  # one row
        ((3, 11, 5), np.sqrt(9 + (8 * 2) ** 2 + 2.25)),  # one row along another axis
        ((3, 7, 8), np.sqrt(9 + (4 * 2) ** 2 + (4 * 1.5) ** 2)),  # one slice
        ((7, 7, 5), np.sqrt((5 * 3) ** 2 + (4 * 2) ** 2 + 2.25)),  # one plane across
    ],
)
def test_voxels_rows_and_slices_have_a_diameter(hi, diameter):
    assert measure_mask(block((2, 3, 4), hi), scan()).longest_diameter_mm == pytest.approx(diameter)


@pytest.mark.parametrize("radius", [6.0, 11.5, 20.0])
def test_a_ball_measures_its_diameter_to_within_a_voxels_diagonal(radius):
    middle = (24.2, 23.9, 24.5)
    grid = np.ogrid[:49, :49, :49]
    mask = sum((axis - at) ** 2 for axis, at in zip(grid, middle, strict=True)) <= radius**2
    affine = np.diag([1.0, -1.0, 1.0, 1.0])
    found = measure_mask(mask, scan(affine, mask.shape))
    assert 2 * radius - 0.5 <= found.longest_diameter_mm <= 2 * radius + np.sqrt(3)
    assert found.centroid_mm == pytest.approx((24.2, -23.9, 24.5), abs=0.1)
    assert found.volume_ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.03)
    assert found.extent_mm == pytest.approx((2 * radius,) * 3, abs=1)


@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["upright", "oblique"])
@pytest.mark.parametrize("density", [0.004, 0.03, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_brute_force_on_random_masks(affine, density, seed):
    mask = np.random.default_rng(seed).random((7, 6, 8)) < density
    mask[3, 2, seed] = True
    found = measure_mask(mask, scan(affine, mask.shape))
    corners = corners_mm(mask, affine)
    far = max(float(np.linalg.norm(corners - corner, axis=1).max()) for corner in corners)
    assert found.longest_diameter_mm == pytest.approx(far, rel=1e-12)
    assert found.extent_mm == pytest.approx(np.ptp(corners, axis=0))
    assert found.centroid_mm == pytest.approx(corners.mean(axis=0))


def test_extents_are_the_patients_on_an_oblique_grid_too():
    turned = np.eye(4)
    turned[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2)  # 45 degrees about S
    found = measure_mask(block((2, 2, 2), (6, 6, 5)), scan(turned))
    assert found.extent_mm == pytest.approx((4 * np.sqrt(2), 4 * np.sqrt(2), 3.0))
    assert found.longest_diameter_mm == pytest.approx(np.sqrt(16 + 16 + 9)), "turning changes no distance"


@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["upright", "oblique"])
def test_agrees_with_the_facts_of_prepared_data(affine):
    volume = scan(affine, SHAPE)
    mask = np.random.default_rng(3).random(SHAPE) < 0.2
    mask[0] = False
    case = Case(id="a", patient_id="a", volume=volume, labels=mask.astype(np.uint8), names={1: "liver"})
    known = facts(case)["liver"]
    found = measure_mask(mask, volume)
    assert (found.voxels, found.touches_edge) == (known.voxels, known.touches_edge)
    assert found.volume_ml == pytest.approx(known.volume_ml)
    assert found.extent_mm == pytest.approx(known.extent_mm)
    assert found.centroid_mm == pytest.approx(known.centroid_mm)
    assert found.mean == pytest.approx(known.mean_hu)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_every_face_of_the_scan_is_an_edge(axis, end):
    lo, hi = [3, 3, 3], [5, 5, 5]
    if end:
        hi[axis] = SHAPE[axis]
    else:
        lo[axis] = 0
    assert measure_mask(block(tuple(lo), tuple(hi)), scan()).touches_edge


def test_an_empty_mask_has_no_place_and_no_values():
    found = measure_mask(np.zeros(SHAPE, bool), scan())
    assert found.to_dict() == {
        "voxels": 0,
        "volume_ml": 0.0,
        "extent_mm": None,
        "centroid_mm": None,
        "longest_diameter_mm": None,
        "mean": None,
        "sd": None,
        "unit": "HU",
        "touches_edge": False,
    }


def test_only_what_must_be_ct_is_in_hu():
    assert unit_of(scan()) == "HU"
    assert unit_of(Volume(np.linspace(0, 900, 24, dtype=np.float32).reshape(2, 3, 4), AFFINE)) == "arbitrary"
    assert unit_of(Volume(np.full((2, 3, 4), 7.0, np.float32), AFFINE)) == "arbitrary"
    assert measure_mask(block((2, 3, 4), (5, 7, 12)), scan(), unit="arbitrary").unit == "arbitrary"


def test_mean_and_sd_are_exact_where_float32_would_not_be():
    shape = (40, 200, 200)
    array = np.full(shape, 1000.1, np.float32)
    array[:, ::2] = 1000.3
    found = measure_mask(np.ones(shape, bool), Volume(array, AFFINE))
    assert found.mean == pytest.approx(1000.2, abs=1e-4)
    assert found.sd == pytest.approx(0.1, abs=1e-4)


def test_half_a_million_voxels_take_no_time():
    grid = np.ogrid[:110, :110, :110]
    mask = sum((axis - 54.5) ** 2 for axis in grid) <= 49.3**2
    assert mask.sum() > 500_000
    volume = scan(np.eye(4), mask.shape)
    began = time.process_time()
    found = measure_mask(mask, volume)
    assert time.process_time() - began < 3  # 0.07 s measured
    assert 98.6 <= found.longest_diameter_mm <= 98.6 + np.sqrt(3)
