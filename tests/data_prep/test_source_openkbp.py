"""OpenKBP as a source: a list of cases, in the layout of the converted data."""

import json
import pickle

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.openkbp import OpenKBP


def case(folder, label):
    folder.mkdir(parents=True)
    affine = np.array([[0, -4.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
    hu = np.full((4, 4, 4), -1000, np.int16)
    hu[1:3] = 37
    structures = np.zeros((4, 4, 4), np.uint8)
    structures[1, 1] = label
    nib.Nifti1Image(hu, affine).to_filename(folder / "ct.nii.gz")
    nib.Nifti1Image(structures, affine).to_filename(folder / "structures.nii.gz")


def test_the_cases_of_both_splits_by_number(tmp_path):
    case(tmp_path / "train" / "pt_10", 2)
    case(tmp_path / "train" / "pt_9", 7)
    case(tmp_path / "validation" / "pt_3", 1)
    (tmp_path / "cases.json").write_text(json.dumps([{"patient": "pt_10", "cut_by_crop": ["spinal cord"]}]))
    entries = list(OpenKBP(root=tmp_path).entries())
    assert [(one.image_id, one.patient_id, one.split) for one in entries] == [
        ("pt_9", "pt_9", "train"),
        ("pt_10", "pt_10", "train"),
        ("pt_3", "pt_3", "validation"),
    ]
    assert entries[1].license == "MIT" and [path.name for path in entries[1].files] == [
        "ct.nii.gz",
        "structures.nii.gz",
    ]
    read = pickle.loads(pickle.dumps(entries[1].read))()
    assert read.present == ("spinal cord",) and read.cut_by_crop == ("spinal cord",)
    assert not read.complete and read.unit == "HU"  # not contoured is not absent


def test_one_split_alone_and_a_split_that_is_not_there(tmp_path):
    case(tmp_path / "validation" / "pt_3", 1)
    assert len(list(OpenKBP(root=tmp_path, splits=("validation",)).entries())) == 1
    with pytest.raises(FileNotFoundError, match=r"train: no OpenKBP case"):
        list(OpenKBP(root=tmp_path).entries())


def test_the_real_patients(shared_data):
    entries = list(OpenKBP(root=shared_data / "data" / "openkbp").entries())
    splits = [entry.split for entry in entries]
    assert (splits.count("train"), splits.count("validation")) == (128, 21)
