"""Writing: the same grid comes back, and nothing is ever left half-written."""

from __future__ import annotations

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.atomic import atomic_path, refuse_overwrite
from data_prep.read import read_volume
from data_prep.volume import Volume
from data_prep.write import write_mask, write_volume


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.nii", "pt_1.2.left lung.nii.gz"])
def test_a_mask_lies_on_the_scans_grid(posed, tmp_path: Path, name: str):
    image, labels, affine = posed
    write_mask(tmp_path / name, labels, like=Volume(image, affine))
    back = nib.load(tmp_path / name)
    assert back.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(back.dataobj), labels)
    assert np.allclose(back.affine, affine, atol=1e-5)  # float32 in the file
    assert np.allclose(back.get_qform(), affine, atol=1e-3)
    assert int(back.header["qform_code"]) == int(back.header["sform_code"]) == 1
    assert names(tmp_path) == [name]


def test_a_mask_for_a_nifti_has_bit_for_bit_its_affine(posed, tmp_path: Path):
    image, labels, affine = posed
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    write_mask(tmp_path / "mask.nii.gz", labels, like=read_volume(tmp_path / "scan.nii.gz"))
    scan, mask = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)


def test_a_sheared_affine_is_written_as_sform_only(tmp_path: Path):
    affine = np.array([[1, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_volume(tmp_path / "tilt.nii.gz", Volume(array, affine))
    back = nib.load(tmp_path / "tilt.nii.gz")
    assert np.array_equal(back.affine, affine)
    assert int(back.header["qform_code"]) == 0


def test_write_volume_round_trip(posed, tmp_path: Path):
    image, _, affine = posed
    volume = Volume(image + 0.25, affine)
    write_volume(tmp_path / "new" / "folder" / "scan.nii.gz", volume)
    back = read_volume(tmp_path / "new" / "folder" / "scan.nii.gz")
    assert np.array_equal(back.array, volume.array)
    assert np.allclose(back.affine, affine, atol=1e-5)


def test_the_same_mask_gives_the_same_bytes(tmp_path: Path):
    volume = Volume(np.arange(24).reshape(2, 3, 4), np.eye(4))
    write_mask(tmp_path / "a.nii.gz", volume.array > 3, like=volume)
    write_mask(tmp_path / "b.nii.gz", volume.array > 3, like=volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("m.nii.gz", np.zeros((2, 3, 5), np.uint8), r"shape \(2, 3, 5\), the scan \(2, 3, 4\)"),
        ("m.nii.gz", np.full((2, 3, 4), 0.5), "whole numbers"),
        ("m.nii.gz", np.full((2, 3, 4), 300), "0 to 255"),
        ("m.nii.gz", np.full((2, 3, 4), -1), "0 to 255"),
        ("m.png", np.zeros((2, 3, 4), np.uint8), r"ends in \.nii\.gz"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, name: str, mask: np.ndarray, message: str):
    volume = Volume(np.arange(24).reshape(2, 3, 4), np.eye(4))
    with pytest.raises(ValueError, match=message):
        write_mask(tmp_path / name, mask, like=volume)
    assert names(tmp_path) == []


def test_atomic_path_keeps_the_suffix_and_replaces_at_the_end(tmp_path: Path):
    target = tmp_path / "mask.nii.gz"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["mask.nii.gz"]


def test_atomic_path_takes_folders_too(tmp_path: Path):
    with atomic_path(tmp_path / "checkpoint") as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "checkpoint" / "config.json").read_text() == "{}"
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "other") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_new_one(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_a_full_disk_is_one_line_that_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    volume = Volume(np.arange(24).reshape(2, 3, 4), np.eye(4))
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    with pytest.raises(OSError, match=r"No space left on device.*mask\.nii\.gz") as caught:
        write_mask(tmp_path / "mask.nii.gz", volume.array > 3, like=volume)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "mask.nii.gz")
    assert names(tmp_path) == []


def test_a_really_full_device(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        atomic_path(tmp_path / "a.txt") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert names(tmp_path) == []


def test_an_error_about_another_file_is_not_renamed(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"weights\.bin"), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "weights.bin").read_bytes()


def test_refuse_overwrite(tmp_path: Path):
    refuse_overwrite(tmp_path / "new", force=False)
    with pytest.raises(FileExistsError, match="exists; use --force to replace it"):
        refuse_overwrite(tmp_path, force=False)
    refuse_overwrite(tmp_path, force=True)
