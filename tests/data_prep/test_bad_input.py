"""Bad input gets one clear line that names the file, never a traceback of a library, never a result."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.read import read_volume
from data_prep.volume import BadScan


def voxels(shape: tuple[int, ...] = (12, 13, 14)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def patched(path: Path, at: int, values: np.ndarray) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(raw)
    return path


def text(folder: Path) -> Path:
    (folder / "notes.nii.gz").write_text("the scan is on the other server\n")
    return folder / "notes.nii.gz"


def zipped_text(folder: Path) -> Path:
    (folder / "notes.nii.gz").write_bytes(gzip.compress(b"the scan is on the other server\n" * 50))
    return folder / "notes.nii.gz"


def cut(keep: float, name: str = "cut.nii.gz") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = nifti(folder / name, voxels())
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        return path

    return make


def flipped_bits(folder: Path) -> Path:
    path = nifti(folder / "damaged.nii.gz", voxels())
    return patched(path, path.stat().st_size // 2, np.full(64, 0xA5, np.uint8))


def of_shape(*shape: int) -> Callable[[Path], Path]:
    return lambda folder: nifti(folder / "scan.nii.gz", voxels(shape))


def with_value(value: float, everywhere: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        array = voxels()
        array[... if everywhere else (3, 4, 5)] = value
        return nifti(folder / "scan.nii.gz", array)

    return make


def with_spacing(*spacing: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = nifti(folder / "scan.nii", voxels())
        return patched(path, 80, np.array(spacing, np.float32))  # pixdim[1:4]

    return make


def with_sform(*rows: tuple[float, ...]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = nifti(folder / "scan.nii", voxels())
        return patched(path, 280, np.array(rows, np.float32))  # srow_x, srow_y, srow_z

    return make


def colour(folder: Path) -> Path:
    array = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "rgb.nii.gz")
    return folder / "rgb.nii.gz"


def empty_folder(folder: Path) -> Path:
    (folder / "series").mkdir()
    return folder / "series"


def folder_of_text(folder: Path) -> Path:
    (folder / "series").mkdir()
    (folder / "series" / "readme").write_text("nothing here")
    return folder / "series"


def empty_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"")
        return folder / name

    return make


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "text named nii.gz": (text, "not a NIfTI image"),
    "zipped text named nii.gz": (zipped_text, "not a NIfTI image"),
    "empty file": (empty_file("scan.nii.gz"), "not a NIfTI image"),
    "truncated in the header": (cut(0.005), "not a NIfTI image"),
    "truncated in the voxels": (cut(0.5), "truncated or damaged"),
    "truncated at the very end": (cut(0.9), "truncated or damaged"),
    "truncated plain nii": (cut(0.5, "cut.nii"), "truncated or damaged"),
    "damaged inside": (flipped_bits, "truncated or damaged|not a NIfTI"),
    "2D": (of_shape(12, 13), r"3D scan is needed, this one has 2 axes \(12, 13\)"),
    "2D as one slice": (of_shape(12, 13, 1), "single slice"),
    "4D": (of_shape(6, 6, 6, 3), "3D scan is needed, this one has 4 axes"),
    "NaN": (with_value(np.nan), "1 voxels are NaN or infinite"),
    "infinite": (with_value(np.inf), "NaN or infinite"),
    "constant": (with_value(-1000.0, everywhere=True), "every voxel has the value -1000"),
    "zero spacing": (with_spacing(1, 0, 1), "zero, negative or NaN voxel spacing"),
    "negative spacing": (with_spacing(1, 1, -2), "zero, negative or NaN voxel spacing"),
    "NaN spacing": (with_spacing(1, 1, np.nan), "zero, negative or NaN voxel spacing"),
    "singular affine": (with_sform((1, 0, 1, 0), (0, 1, 0, 0), (1, 0, 1, 0)), "affine is singular"),
    "zero column": (with_sform((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0)), "spacing is zero"),
    "NaN affine": (with_sform((1, 0, 0, np.nan), (0, 1, 0, 0), (0, 0, 1, 0)), "NaN or infinite"),
    "colour": (colour, "colours or complex"),
    "empty folder": (empty_folder, "the folder is empty"),
    "folder of other files": (folder_of_text, "no DICOM image"),
    "unknown suffix": (empty_file("scan.jpeg"), r"unknown format '\.jpeg'; known: \.nii, \.nii\.gz"),
    "no suffix": (empty_file("scan"), "unknown format ''"),
    "not a zip": (empty_file("scan.zip"), "zip is damaged"),
    "not an nrrd": (empty_file("scan.nrrd"), "cannot be read"),
    "not an mha": (empty_file("scan.mha"), "cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(tmp_path: Path, case: str):
    make, message = CASES[case]
    path = make(tmp_path)
    with pytest.raises(BadScan, match=message) as caught:
        read_volume(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.count(str(path)) == 1
    assert "\n" not in line
    assert len(line) - len(str(path)) < 250


def test_a_missing_file_is_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nii\.gz: no such file or folder"):
        read_volume(tmp_path / "nowhere.nii.gz")


HEADERS = {
    (".mha", "zero"): (b"ElementSpacing = 1 1 2", b"ElementSpacing = 1 0 2"),
    (".mha", "negative"): (b"ElementSpacing = 1 1 2", b"ElementSpacing = 1 -1 2"),
    (".mha", "singular"): (b"TransformMatrix = 1 0 0 0 1 0", b"TransformMatrix = 1 0 0 1 0 0"),
    (".nrrd", "zero"): (b"(1,0,0) (0,1,0)", b"(1,0,0) (0,0,0)"),
    (".nrrd", "singular"): (b"(1,0,0) (0,1,0)", b"(1,0,0) (1,0,0)"),
}


def itk_file(path: Path, image: sitk.Image) -> Path:
    image.SetSpacing((1.0, 1.0, 2.0, 1.0)[: image.GetDimension()])
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize(("suffix", "spoil"), HEADERS)
def test_nrrd_and_metaimage_headers(tmp_path: Path, suffix: str, spoil: str):
    path = itk_file(tmp_path / f"scan{suffix}", sitk.GetImageFromArray(voxels()))
    old, new = HEADERS[suffix, spoil]
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(BadScan, match="spacing" if spoil != "singular" else "spacing|singular") as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_nrrd_and_metaimage_contents(tmp_path: Path, suffix: str):
    image = sitk.GetImageFromArray(voxels())
    path = itk_file(tmp_path / f"scan{suffix}", image)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadScan, match="truncated"):
        read_volume(path)
    for spoiled, message in (
        (sitk.JoinSeries([image, image]), "this one has 4 axes"),
        (image[:, :, 0], "this one has 2 axes"),
        (sitk.Compose([image, image, image]), "one channel"),
        (image * 0 + 2, "every voxel has the value 2"),
        (image / 0, "NaN or infinite"),
    ):
        with pytest.raises(BadScan, match=message):
            read_volume(itk_file(path, spoiled))


def test_npy(tmp_path: Path):
    path = tmp_path / "scan.npy"
    for array, message in (
        (np.zeros((3, 4)), "3D array"),
        (np.zeros((2, 3, 4, 5)), "3D array"),
        (np.array(["a", "b"]), "array of numbers"),
        (np.ones((3, 4, 5)), "every voxel has the value 1"),
    ):
        np.save(path, array)
        with pytest.raises(BadScan, match=message):
            read_volume(path, spacing=(1, 1, 1))
    np.save(path, voxels())
    for spacing in [(1, 1), (1, 0, 1), (1, -2, 1), (1, 1, float("nan"))]:
        with pytest.raises(BadScan, match="three positive numbers"):
            read_volume(path, spacing=spacing)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadScan, match=r"not a plain \.npy array, or a truncated one"):
        read_volume(path, spacing=(1, 1, 1))


def test_a_pickle_is_never_opened(tmp_path: Path):
    path = tmp_path / "scan.npy"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadScan, match=r"not a plain \.npy array"):
        read_volume(path, spacing=(1, 1, 1))
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadScan, match=r"not a plain \.npy array"):
        read_volume(path, spacing=(1, 1, 1))


def test_an_encrypted_or_damaged_zip(tmp_path: Path):
    path = tmp_path / "scan.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", voxels().tobytes())
    patched(path, 1000, np.full(64, 0xA5, np.uint8))
    with pytest.raises(BadScan, match="zip is damaged or encrypted"):
        read_volume(path)


def test_one_wrong_byte_of_a_compressed_scan_is_found(tmp_path):
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(-1000, 1000, (12, 12, 12)).astype(np.int16), np.eye(4))
    image.to_filename(tmp_path / "whole.nii.gz")
    whole = (tmp_path / "whole.nii.gz").read_bytes()
    for place in range(40, len(whole) - 8, 97):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        (tmp_path / "spoilt.nii.gz").write_bytes(spoilt)
        with pytest.raises(BadScan, match=r"spoilt\.nii\.gz: "):
            read_volume(tmp_path / "spoilt.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "whole.nii.gz").array, np.asarray(image.dataobj))
