"""Readers of NIfTI, NRRD, MetaImage and npy: the right numbers in the right places, whatever the file format."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.read import read_volume
from data_prep.volume import BadScan

LABEL_OF = {300.0: 1, 60.0: 2, -80.0: 3}


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def save_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """The array (i, j, k) with its RAS affine, through SimpleITK's own idea of space."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
def test_every_format_gives_the_same_patient(posed, phantom, tmp_path: Path, suffix: str):
    """Wherever a voxel is said to be, the phantom must have there what the voxel holds."""
    image, _, affine = posed
    save = save_nifti if suffix.startswith(".nii") else save_itk
    volume = read_volume(save(tmp_path / f"scan{suffix}", image.astype(np.int16), affine))
    if suffix.startswith(".nii"):
        assert np.array_equal(volume.array, image)
        assert np.allclose(volume.affine, affine, atol=1e-5)
    else:
        assert np.array_equal(volume.array, image.transpose(2, 1, 0))  # (slice, row, column)
        assert np.allclose(volume.affine[:, [2, 1, 0, 3]], affine, atol=1e-5)
    assert volume.array.dtype == np.float32
    assert np.mean(volume.array == phantom.image(volume.shape, volume.affine)) > 0.9999  # float32 affines: a rim voxel
    assert volume.orientation == "".join(nib.aff2axcodes(volume.affine))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_nifti_slope_and_intercept_are_applied_once(tmp_path: Path, dtype: type):
    stored = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    image = nib.Nifti1Image(stored, np.eye(4))
    path = tmp_path / "scan.nii"
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([2.5, -1024.0], np.float32).tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    assert np.array_equal(read_volume(path).array, stored * 2.5 - 1024)


def test_sform_comes_before_qform_and_qform_alone_is_enough(tmp_path: Path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(array, None)
    image.set_qform(np.diag([-2.0, 3.0, 4.0, 1.0]), 1)
    nib.save(image, tmp_path / "q.nii.gz")
    assert np.allclose(read_volume(tmp_path / "q.nii.gz").affine, np.diag([-2.0, 3.0, 4.0, 1.0]))
    image.set_sform(np.diag([5.0, -6.0, 7.0, 1.0]), 2)
    nib.save(image, tmp_path / "qs.nii.gz")
    assert read_volume(tmp_path / "qs.nii.gz").orientation == "RPS"
    assert read_volume(tmp_path / "qs.nii.gz").spacing == (5.0, 6.0, 7.0)


def test_nifti_without_any_orientation_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None)
    image.header.set_zooms((2.0, 3.0, 4.0))
    nib.save(image, tmp_path / "scan.nii")
    assert read_volume(tmp_path / "scan.nii").spacing == (2.0, 3.0, 4.0)
    assert "left and right are assumed" in caplog.text


def test_nifti2_and_a_single_time_point(tmp_path: Path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    nib.save(nib.Nifti2Image(array, np.diag([2.0, 3.0, 4.0, 1.0])), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert volume.shape == (2, 3, 4)
    assert volume.spacing == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_single_time_point(tmp_path: Path, suffix: str):
    image = sitk.JoinSeries([sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(4, 3, 2))])
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    assert read_volume(tmp_path / f"scan{suffix}").shape == (4, 3, 2)


def test_npy_needs_a_spacing_and_is_taken_as_spl(tmp_path: Path):
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    np.save(tmp_path / "scan.npy", array)
    volume = read_volume(tmp_path / "scan.npy", spacing=(5, 0.7, 0.8))
    assert np.array_equal(volume.array, array)
    assert volume.orientation == "SPL"
    assert volume.spacing == (5.0, 0.7, 0.8)
    np.save(tmp_path / "published.npy", array[None])
    assert np.array_equal(read_volume(tmp_path / "published.npy", spacing=(1, 1, 1)).array, array)
    with pytest.raises(BadScan, match=r"pass spacing="):
        read_volume(tmp_path / "scan.npy")


def test_options_of_another_format_are_refused(tmp_path: Path):
    path = save_nifti(tmp_path / "scan.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    with pytest.raises(BadScan, match="for a DICOM folder"):
        read_volume(path, series="1.2.3")
    with pytest.raises(BadScan, match=r"for \.npy only"):
        read_volume(path, spacing=(1, 1, 1))


def test_a_capital_suffix_is_no_obstacle(tmp_path: Path):
    save_nifti(tmp_path / "scan.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    path = (tmp_path / "scan.nii.gz").rename(tmp_path / "SCAN.NII.GZ")
    assert read_volume(str(path)).shape == (2, 3, 4)


# ---- real files, where they are


def test_openkbp_cases_read_as_their_list_says(shared_data: Path):
    scans = sorted((shared_data / "data/openkbp/validation").glob("*/ct.nii.gz"))[:3]
    assert scans
    for path in scans:
        volume = read_volume(path)
        assert volume.orientation == "PLI"
        assert volume.range[0] == -1000.0
        assert 3 < volume.spacing[0] < 6


def test_totalsegmentator_and_hippocampus_read(shared_data: Path):
    abdomen = read_volume(shared_data / "data/totalsegmentator/abdomen_pelvis_ct/image.nii.gz")
    assert (abdomen.shape, abdomen.spacing, abdomen.orientation) == ((122, 101, 112), (3.0, 3.0, 3.0), "RAS")
    for path in sorted((shared_data / "data/msd_hippocampus/images").glob("*.nii.gz"))[:5]:
        assert read_volume(path).spacing == (1.0, 1.0, 1.0)
