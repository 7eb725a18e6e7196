"""DICOM series, written here with pydicom and read through another library (GDCM)."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SegmentationStorage,
)

from data_prep.read import read_volume
from data_prep.volume import BadScan

ONE, TWO = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
AXIAL = (1, 0, 0, 0, 1, 0)
PATIENT = "Doe^Jane"


def slice_of(plane: np.ndarray, position: Any, **tags: Any) -> Dataset:
    """One CT slice as scanners write them; ``tags`` replace or add."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID = PATIENT, "12345"
    data.Modality, data.SeriesInstanceUID, data.SeriesNumber = "CT", ONE, 3
    data.Rows, data.Columns = plane.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(plane.dtype.kind == "i")
    data.PixelSpacing, data.SliceThickness = [0.7, 0.9], 2.0
    data.ImagePositionPatient = [float(f"{value:.6f}") for value in position]
    data.ImageOrientationPatient = list(AXIAL)
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = plane.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def planes(num: int = 6, shape: tuple[int, int] = (5, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, (num, *shape), dtype=np.uint16)


def save(folder: Path, slices: list[Dataset], *, shuffle: bool = True, first: int = 0) -> Path:
    """Without extension and in no order, as the real series have it."""
    folder.mkdir(exist_ok=True)
    numbers = np.random.default_rng(1).permutation(len(slices)) if shuffle else range(len(slices))
    for number, data in zip(numbers, slices, strict=True):
        data.save_as(folder / f"IM{first + number:04d}", enforce_file_format=True)
    return folder


def stack(array: np.ndarray, step: float = 2.0, **tags: Any) -> list[Dataset]:
    return [slice_of(plane, (-100, -50, -800 + step * number), **tags) for number, plane in enumerate(array)]


def test_unsorted_files_without_extension(tmp_path: Path):
    array = planes()
    volume = read_volume(save(tmp_path / "ct", stack(array)))
    assert np.array_equal(volume.array, array.astype(np.float32) - 1024)
    assert volume.orientation == "SPL"
    assert volume.spacing == pytest.approx((2.0, 0.7, 0.9))  # PixelSpacing is row distance first
    assert volume.affine[:3, 3].tolist() == [100.0, 50.0, -800.0]  # LPS to RAS


def test_slices_stored_from_the_head_down_end_up_ascending(tmp_path: Path):
    array = planes()
    volume = read_volume(save(tmp_path / "ct", stack(array)[::-1], shuffle=False))
    assert np.array_equal(volume.array, array.astype(np.float32) - 1024)


def test_each_slice_has_its_own_slope(tmp_path: Path):
    """As in PET; a reader that takes the first slice's integers for all would round these away."""
    array = planes(4)
    slices = stack(array)
    slopes = [1, 0.25, 1.5, 0.001]
    for data, slope in zip(slices, slopes, strict=True):
        data.RescaleSlope, data.RescaleIntercept = slope, 10
    volume = read_volume(save(tmp_path / "pet", slices))
    expected = array * np.array(slopes)[:, None, None] + 10
    assert np.allclose(volume.array, expected, rtol=1e-6)


@pytest.mark.parametrize("storage", [MRImageStorage, PositronEmissionTomographyImageStorage], ids=["mr", "pet"])
def test_other_modalities_are_rescaled_too(tmp_path: Path, storage: Any):
    array = planes(4)
    slices = stack(array, SOPClassUID=storage, RescaleSlope=2.5, RescaleIntercept=-7)
    for data in slices:
        data.file_meta.MediaStorageSOPClassUID = storage
    assert np.array_equal(read_volume(save(tmp_path / "scan", slices)).array, array * 2.5 - 7)


def test_signed_pixels(tmp_path: Path):
    array = planes().astype(np.int16) - 1000
    volume = read_volume(save(tmp_path / "ct", stack(array, RescaleIntercept=0)))
    assert np.array_equal(volume.array, array)


def test_sagittal_and_oblique_series_lie_where_their_tags_say(tmp_path: Path, tilted: Callable[..., np.ndarray]):
    for name, turn in (("sagittal", np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0.0]])), ("oblique", tilted((12, -20, 33)))):
        row, column, normal = turn.T
        slices = [
            slice_of(
                plane, 10 * row + 3.5 * number * normal, ImageOrientationPatient=[f"{v:.9f}" for v in (*row, *column)]
            )
            for number, plane in enumerate(planes())
        ]
        volume = read_volume(save(tmp_path / name, slices))
        # DICOM PS3.3 C.7.6.2.1.1: voxel (column 4, row 3) of slice 2, in LPS
        place = 10 * row + 3.5 * 2 * normal + 4 * 0.9 * row + 3 * 0.7 * column
        assert np.allclose(volume.to_mm([[2, 3, 4]])[0], place * [-1, -1, 1], atol=1e-5)
        assert volume.array[2, 3, 4] == planes()[2, 3, 4] - 1024.0
        assert volume.spacing == pytest.approx((3.5, 0.7, 0.9), abs=1e-5)


def test_a_tilted_gantry_gives_a_sheared_but_exact_affine(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    slices = [slice_of(plane, (0, number * 0.5, number * 2.0)) for number, plane in enumerate(planes())]
    with caplog.at_level(logging.WARNING):
        volume = read_volume(save(tmp_path / "tilt", slices))
    assert np.allclose(volume.to_mm([[5, 0, 0]]), [[0, -2.5, 10]])
    assert volume.voxel_ml == pytest.approx(2.0 * 0.7 * 0.9 / 1000)
    assert "tilted by 14.0 degrees" in caplog.text


def test_a_missing_slice_is_refused_naming_the_gap(tmp_path: Path):
    slices = stack(planes())
    del slices[3]
    folder = save(tmp_path / "ct", slices, shuffle=False)
    with pytest.raises(BadScan) as caught:
        read_volume(folder)
    message = str(caught.value)
    assert "1 missing slice between -796 mm (IM0002) and -792 mm (IM0003)" in message
    assert "4 mm apart where the others are 2 mm" in message
    assert str(folder) in message
    assert "\n" not in message


def test_uneven_slices_are_refused_and_rounded_positions_are_not(tmp_path: Path):
    slices = stack(planes())
    slices[2].ImagePositionPatient[2] += 0.5
    with pytest.raises(BadScan, match=r"uneven slices between -798 mm .* and -795.5 mm"):
        read_volume(save(tmp_path / "uneven", slices))
    slices = stack(planes(), step=1.0 / 3)
    for data in slices:
        data.ImagePositionPatient[2] = round(data.ImagePositionPatient[2], 2)
    assert read_volume(save(tmp_path / "rounded", slices)).spacing[0] == pytest.approx(1 / 3, abs=3e-3)


def test_two_series_are_listed_and_one_can_be_chosen(tmp_path: Path):
    first, second = planes(4), planes(3, seed=9)
    folder = save(tmp_path / "both", stack(first))
    save(folder, stack(second, SeriesInstanceUID=TWO, SeriesNumber=7, Modality="MR"), first=50)
    with pytest.raises(BadScan) as caught:
        read_volume(folder)
    message = str(caught.value)
    assert f"{ONE} (number 3, CT, 4 slices)" in message
    assert f"{TWO} (number 7, MR, 3 slices)" in message
    assert "series=UID" in message
    assert "--series UID" in message
    assert "Doe" not in message
    assert "12345" not in message
    assert read_volume(folder, series=TWO).shape == (3, 5, 7)
    assert np.array_equal(read_volume(folder, series=ONE).array, first - 1024.0)
    with pytest.raises(BadScan, match=r"no series '1\.2\.3'; there is: "):
        read_volume(folder, series="1.2.3")


def test_other_files_and_other_objects_do_no_harm(tmp_path: Path):
    folder = save(tmp_path / "ct", stack(planes()))
    (folder / "readme.txt").write_text("from the archive")
    (folder / ".DS_Store").write_bytes(b"\0" * 200)
    segmentation = slice_of(
        planes(1)[0], (0, 0, 0), Modality="SEG", SeriesInstanceUID=TWO, SOPClassUID=SegmentationStorage
    )
    save(folder, [segmentation], first=90)
    (folder / "more").mkdir()
    (folder / "IM0000").rename(folder / "more" / "IM0000")
    assert read_volume(folder).shape == (6, 5, 7)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["rle", "jpeg-ls"])
def test_compressed_pixels(tmp_path: Path, syntax: Any):
    array = planes(4, (32, 24))
    slices = stack(array)
    for data in slices:
        data.compress(syntax, generate_instance_uid=False)
    assert np.array_equal(read_volume(save(tmp_path / "ct", slices)).array, array - 1024.0)


def test_zip(tmp_path: Path):
    array = planes()
    folder = save(tmp_path / "ct", stack(array))
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"study/series one/{file.name}")
    volume = read_volume(tmp_path / "ct.zip")
    assert np.array_equal(volume.array, array - 1024.0)
    assert np.array_equal(volume.affine, read_volume(folder).affine)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "..\\escaped"])
def test_a_zip_cannot_write_outside_its_folder(tmp_path: Path, name: str):
    path = tmp_path / "inner" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(BadScan, match="points outside"):
        read_volume(path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["evil.zip"]


def test_temporary_files_of_a_zip_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    folder = save(tmp_path / "ct", stack(planes())[:1])
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        archive.write(folder / "IM0000", "IM0000")
    with pytest.raises(BadScan, match="single slice"):
        read_volume(tmp_path / "ct.zip")
    assert not list((tmp_path / "scratch").iterdir())


def without(tag: str) -> Callable[[list[Dataset]], None]:
    return lambda slices: delattr(slices[2], tag)


def with_tag(tag: str, value: Any) -> Callable[[list[Dataset]], None]:
    return lambda slices: setattr(slices[2], tag, value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("ImagePositionPatient"), "says not where it lies"),
        (without("PixelSpacing"), "says not where it lies"),
        (with_tag("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), "differ in size, pixel spacing or orientation"),
        (with_tag("PixelSpacing", [0.7, 0.8]), "differ in size, pixel spacing or orientation"),
        (with_tag("PixelSpacing", [0, 0.9]), "zero or negative pixel spacing"),
        (with_tag("ImagePositionPatient", [-100, -50, -800]), "two slices at the same place"),
        (with_tag("ImagePositionPatient", [-90, -50, -796]), "uneven slices"),
        (with_tag("NumberOfFrames", 2), "multi-frame|cannot be read"),
    ],
)
def test_series_that_make_no_volume(tmp_path: Path, spoil: Callable[[list[Dataset]], None], message: str):
    slices = stack(planes())
    spoil(slices)
    with pytest.raises(BadScan, match=message) as caught:
        read_volume(save(tmp_path / "ct", slices))
    assert PATIENT not in str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_truncated_slice_is_named(tmp_path: Path, keep: float):
    folder = save(tmp_path / "ct", stack(planes(4, (32, 32))), shuffle=False)
    file = folder / "IM0003"  # the last: leaving it out would leave no gap
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(BadScan, match="IM0003"):
        read_volume(folder)


def test_a_single_file_is_told_to_bring_its_folder(tmp_path: Path):
    folder = save(tmp_path / "ct", stack(planes()))
    with pytest.raises(BadScan, match="pass the folder"):
        read_volume(folder / "IM0001")


# ---- the real series


def test_the_real_series_equals_pydicoms_decoding(shared_data: Path):
    folder = shared_data / "data/dicom_ct"
    volume = read_volume(folder)
    assert volume.shape == (20, 512, 512)
    assert volume.spacing == pytest.approx((2.0, 0.9765625, 0.9765625))
    files = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    for number in (0, 7, 19):
        expected = files[number].pixel_array * float(files[number].RescaleSlope) + float(files[number].RescaleIntercept)
        assert np.array_equal(volume.array[number], expected)


def test_the_real_series_lies_under_its_structures(shared_data: Path):
    """The label map was made by other software: every one of its voxels must fall on one of ours, and on fitting HU."""
    volume = read_volume(shared_data / "data/dicom_ct")
    labels = nib.load(shared_data / "data/dicom_ct_structures.nii.gz")
    found = np.asarray(labels.dataobj)
    for number in np.unique(found)[1:]:
        index = np.argwhere(found == number)
        here = volume.to_voxel(nib.affines.apply_affine(labels.affine, index))
        assert np.abs(here - np.rint(here)).max() < 1e-3
    body = np.argwhere(found > 0)
    here = np.rint(volume.to_voxel(nib.affines.apply_affine(labels.affine, body))).astype(int)
    assert (volume.array[tuple(here.T)] > -300).mean() > 0.97  # organs, muscles and bones, not air
