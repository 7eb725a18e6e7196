"""Volume: what the affine says, and what is refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.volume import BadScan, Volume, closest_axes, spl_affine


def ramp(shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def test_properties_of_a_known_affine():
    affine = np.array([[0, 0, -0.5, 10], [0, -2, 0, 20], [3, 0, 0, -30], [0, 0, 0, 1.0]])
    volume = Volume(ramp(), affine)
    assert volume.array.dtype == np.float32
    assert volume.affine.dtype == np.float64
    assert volume.shape == (2, 3, 4)
    assert volume.spacing == (3.0, 2.0, 0.5)
    assert volume.orientation == "SPL"
    assert volume.voxel_ml == pytest.approx(0.003)
    assert volume.range == (0.0, 23.0)
    assert volume.to_mm([[1, 2, 3]]).tolist() == [[8.5, 16.0, -27.0]]
    assert volume.to_voxel([[8.5, 16.0, -27.0]]).tolist() == [[1.0, 2.0, 3.0]]


def test_a_sheared_affine_keeps_its_true_voxel_volume():
    affine = np.array([[1, 0, 0, 0], [0, 1, 2, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    assert Volume(ramp(), affine).voxel_ml == pytest.approx(0.003)  # base 1x1, height 3


def test_spl_affine_is_spl():
    volume = Volume(ramp(), spl_affine((5.0, 0.7, 0.8)))
    assert volume.orientation == "SPL"
    assert volume.spacing == (5.0, 0.7, 0.8)


@given(st.integers(0, 10**6))
def test_orientation_agrees_with_nibabel(seed: int):
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * random.uniform(0.3, 6.0, 3)
    affine[:3, 3] = random.uniform(-200, 200, 3)
    assert Volume(ramp(), affine).orientation == "".join(nib.aff2axcodes(affine))
    assert sorted(axis for axis, _ in closest_axes(affine)) == [0, 1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_must_be_finite(value: float):
    array = ramp().astype(np.float32)
    array[1, 1, 1] = array[0, 0, 0] = value
    with pytest.raises(BadScan, match="2 voxels are NaN or infinite"):
        Volume(array, np.eye(4))


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 3, 4), (0, 3, 3)])
def test_only_three_dimensions(shape: tuple[int, ...]):
    with pytest.raises(BadScan, match="3D volume is needed"):
        Volume(np.zeros(shape), np.eye(4))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1.0, 0.0, 1.0, 1.0]), "spacing is zero"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        (np.diag([1.0, np.nan, 1.0, 1.0]), "finite 4x4"),
        (np.eye(3), "finite 4x4"),
        (np.full((4, 4), 1.0), "last row"),
    ],
)
def test_affines_that_say_no_place_are_refused(affine: np.ndarray, message: str):
    with pytest.raises(BadScan, match=message):
        Volume(ramp(), affine)


def test_very_anisotropic_voxels_are_not_called_singular():
    assert Volume(ramp(), np.diag([0.01, 50.0, 0.02, 1.0])).spacing == (0.01, 50.0, 0.02)
