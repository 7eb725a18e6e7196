"""The published preparations against arrays that the reference scripts made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep import published
from data_prep.preprocess import Foreground, MinMax, Preprocess
from data_prep.volume import BadScan, Volume

GRID = (8, 24, 20)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def given(fixtures: Path) -> Arrays:
    return load_file(fixtures / "preproc" / "inputs.safetensors")


@pytest.fixture
def wanted(fixtures: Path) -> Arrays:
    return load_file(fixtures / "preproc" / "outputs.safetensors")


def close(got: np.ndarray, want: np.ndarray) -> bool:
    assert got.shape == want.shape
    return float(np.abs(got - want).max()) <= 1e-5


def test_cap(given: Arrays, wanted: Arrays):
    assert close(published.prepare_cap(given["cap/slices_uint8"], grid=GRID), wanted["cap/npy"])


def test_refseg(given: Arrays, wanted: Arrays):
    ct, mask = published.prepare_refseg(given["refseg/ct"], given["refseg/mask"], grid=GRID)
    assert close(ct, wanted["refseg/ct_npy"])
    assert np.array_equal(mask, wanted["refseg/mask_npy"])


def test_seg(given: Arrays, wanted: Arrays):
    image, masks = published.prepare_seg(given["seg/image"], given["seg/label"], grid=GRID)
    assert close(image, wanted["seg/npy"])
    assert np.array_equal(masks, wanted["seg/masks"])


def test_segvol(given: Arrays, wanted: Arrays):
    image, label = published.prepare_segvol(given["segvol/image"], given["segvol/label"])
    assert close(image, wanted["segvol/image"])
    assert np.array_equal(label, wanted["segvol/label"])
    assert close(published.zoom_out(image, grid=GRID), wanted["segvol/zoom_out_image"])
    assert np.array_equal(published.zoom_out(label, grid=GRID), wanted["segvol/zoom_out_label"])


def test_preprocess_prepares_a_users_scan_as_the_published_weights_saw_theirs(given: Arrays, wanted: Arrays):
    """Min-max, crop to what is above the minimum, stretch: the default chain is M3D-Cap's, plus the way back."""
    chain = Preprocess(grid=GRID, orientation=None, intensity=MinMax(), crop=Foreground())
    prepared = chain.apply(Volume(given["cap/slices_uint8"], np.diag([5.0, 0.7, 0.7, 1.0])))
    assert close(prepared.array[None], wanted["cap/npy"])


def test_an_empty_scan_is_an_error():
    with pytest.raises(BadScan, match="coincide"):
        published.prepare_cap(np.zeros((4, 4, 4), np.uint8), grid=GRID)
