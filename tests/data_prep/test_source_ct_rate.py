"""CT-RATE: tables beside volumes, and its two releases, on miniatures of a chest."""

import logging
import pickle

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.ct_rate import CTRate
from data_prep.volume import BadScan

PLACE = '1.0,-1024.0,"[0.75, 0.75]",1.5,"[-100.5, -90.0, -300.0]","[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]"'
PLACE_COLUMNS = "RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing,ImagePositionPatient,ImageOrientationPatient"


def chest():
    """HU, axes column, row, slice: half of it lung, a quarter soft tissue, some bone."""
    hu = np.full((8, 6, 4), -850, np.int16)
    hu[4:] = 700
    hu[4:6] = 40
    hu[0, 0, 0] = -1024
    return hu


def volume(base, name, array, *, split="train", affine=None):
    patient, scan = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
    path = base / split / patient / scan / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_filename(path)


def tables(base, *names, table="train", labels="train", place=PLACE, findings="Clear lungs.", impression="Normal."):
    for folder in ("radiology_text_reports", "metadata", "multi_abnormality_labels"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    reports = "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN\n"
    reports += "".join(f"{name}.nii.gz,Cough.,Not given.,{findings},{impression}\n" for name in names)
    (base / "radiology_text_reports" / f"{table}_reports.csv").write_text(reports)
    rows = "".join(f"{name}.nii.gz,SIEMENS,{place}\n" for name in names)
    (base / "metadata" / f"{table}_metadata.csv").write_text(f"VolumeName,Manufacturer,{PLACE_COLUMNS}\n{rows}")
    found = "".join(f"{name}.nii.gz,0,1\n" for name in names)
    (base / "multi_abnormality_labels" / f"{labels}_predicted_labels.csv").write_text(
        f"VolumeName,Medical material,Lung nodule\n{found}"
    )


def test_the_first_release_has_stored_values_placed_by_the_table(tmp_path):
    base = tmp_path / "dataset"
    stored = chest() + 1024
    for name in ("train_10_a_1", "train_2_a_1", "train_2_a_2"):
        volume(base, name, stored)
    tables(base, "train_2_a_1", "train_2_a_2", "train_10_a_1", "train_77_a_1")  # one volume was not downloaded
    entries = list(CTRate(root=tmp_path).entries())
    assert [(one.image_id, one.patient_id, one.split) for one in entries] == [
        ("train_2_a_1", "train_2", "train"),
        ("train_2_a_2", "train_2", "train"),
        ("train_10_a_1", "train_10", "train"),
    ]
    assert entries[0].license == "CC-BY-NC-SA-4.0"
    report, retrieval = entries[0].drafts
    assert (report.task, report.text) == ("report", "Findings: Clear lungs.\nImpression: Normal.")
    assert (retrieval.task, retrieval.text) == ("retrieval", report.text)
    assert report.meta == {"clinical_information": "Cough.", "abnormalities": {"Medical material": 0, "Lung nodule": 1}}
    case = pickle.loads(pickle.dumps(entries[0].read))()
    assert np.array_equal(case.volume.array, chest()) and case.unit == "HU" and case.names == {}
    assert case.volume.spacing == (0.75, 0.75, 1.5) and case.volume.orientation == "LPS"
    assert case.volume.affine[:3, 3].tolist() == [100.5, 90.0, -300.0]  # LPS in DICOM, RAS here
    assert len(list(CTRate(root=base, reconstructions=(1,)).entries())) == 2


def test_the_second_release_is_read_as_it_is(tmp_path):
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    volume(tmp_path, "train_1_a_1", chest(), split="train_fixed", affine=affine)
    volume(tmp_path, "valid_5_b_2", chest(), split="valid_fixed", affine=affine)
    tables(tmp_path, "train_1_a_1")
    tables(tmp_path, "valid_5_b_2", table="validation", labels="valid", findings="", impression="Normal.")
    train, valid = CTRate(root=tmp_path, valid_as="test").entries()
    assert (valid.image_id, valid.patient_id, valid.split) == ("valid_5_b_2", "valid_5", "test")
    assert valid.drafts[0].text == "Impression: Normal."
    case = train.read()
    assert np.array_equal(case.volume.array, chest()) and np.allclose(case.volume.affine, affine)


def test_the_wrong_release_is_noticed(tmp_path):
    volume(tmp_path, "train_1_a_1", chest())  # HU already
    tables(tmp_path, "train_1_a_1")
    (stored,) = CTRate(root=tmp_path).entries()
    with pytest.raises(BadScan, match=r"train_1_a_1\.nii\.gz: .* soft tissue.*set values: HU"):
        stored.read()
    (right,) = CTRate(root=tmp_path, values="HU").entries()
    assert right.read().volume.array.min() == -1024
    volume(tmp_path, "train_1_a_1", chest() + 1024)
    with pytest.raises(BadScan, match=r"0\.0% of it is air.*set values: stored"):
        right.read()


def test_a_prone_patient_lies_the_other_way(tmp_path):
    volume(tmp_path, "train_1_a_1", chest() + 1024)
    tables(tmp_path, "train_1_a_1", place=PLACE.replace("[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]", "[-1, 0, 0, 0, -1, 0]"))
    (entry,) = CTRate(root=tmp_path).entries()
    assert entry.read().volume.orientation == "RAS"


def test_a_row_that_cannot_place_a_volume_is_named_when_it_is_read(tmp_path):
    volume(tmp_path, "train_1_a_1", chest() + 1024)
    tables(tmp_path, "train_1_a_1", place=PLACE.replace("-1024.0", ""))
    (entry,) = CTRate(root=tmp_path).entries()
    with pytest.raises(ValueError, match=r"train_metadata\.csv, row 2: RescaleIntercept is ''; 1 numbers are needed"):
        entry.read()
    tables(tmp_path, "train_3_a_1")
    (entry,) = CTRate(root=tmp_path).entries()
    with pytest.raises(ValueError, match=r"train_1_a_1\.nii\.gz: no row in the metadata table"):
        entry.read()


def test_a_volume_without_report_has_no_drafts(tmp_path, caplog):
    volume(tmp_path, "train_1_a_1", chest())
    tables(tmp_path, "train_3_a_1")
    with caplog.at_level(logging.WARNING):
        (entry,) = CTRate(root=tmp_path, values="HU").entries()
    assert entry.drafts == () and "1 volumes have no report, such as train_1_a_1" in caplog.text


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no volume such as"):
        list(CTRate(root=tmp_path).entries())
    volume(tmp_path, "train_1_a_1", chest())
    with pytest.raises(FileNotFoundError, match=r"train_reports\.csv: no such table; download it"):
        list(CTRate(root=tmp_path).entries())
    tables(tmp_path, "train_1_a_1")
    table = tmp_path / "multi_abnormality_labels" / "train_predicted_labels.csv"
    table.write_text("VolumeName,Lung nodule\ntrain_1_a_1.nii.gz,2\n")
    with pytest.raises(ValueError, match=r"train_predicted_labels\.csv, row 2: Lung nodule is '2'"):
        list(CTRate(root=tmp_path).entries())
    (tmp_path / "train" / "notes.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"notes\.nii\.gz: its name is not split_patient"):
        list(CTRate(root=tmp_path).entries())
