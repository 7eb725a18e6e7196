"""TotalSegmentator as published, and its program's one-file output."""

import json
import pickle

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.totalsegmentator import TotalSegmentator
from data_prep.volume import BadScan

AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])
META = "image_id;age;gender;institute;study_type;split\n"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, AFFINE).to_filename(path)


def published(root, case, scan="ct.nii.gz", **masks):
    save(root / case / scan, np.arange(48, dtype=np.int16).reshape(4, 4, 3))
    for name, row in masks.items():
        mask = np.zeros((4, 4, 3), np.uint8)
        if row is not None:
            mask[row] = 1
        save(root / case / "segmentations" / f"{name}.nii.gz", mask)


def test_as_published(tmp_path):
    published(tmp_path, "s0011", lung_upper_lobe_left=0, vertebrae_L3=2, spleen=None)
    published(tmp_path, "s0002", scan="mri.nii.gz", liver=1)
    (tmp_path / "meta.csv").write_text(
        META + "s0002;66;m;A;ct thorax;val\ns0011;70;f;B;ct neck;train\ns0999;1;m;C;x;test\n"
    )
    first, second = TotalSegmentator(root=tmp_path).entries()
    assert [(one.image_id, one.patient_id, one.split) for one in (first, second)] == [
        ("s0002", "s0002", "validation"),
        ("s0011", "s0011", "train"),
    ]
    assert len(second.files) == 4 and second.license == "CC-BY-4.0"
    case = pickle.loads(pickle.dumps(second.read))()
    assert tuple(case.names.values()) == ("left lung upper lobe", "spleen", "vertebra L3")
    assert case.present == ("left lung upper lobe", "vertebra L3") and case.mask("vertebra L3")[2].all()
    assert (case.modality, case.unit, case.complete) == ("CT", "HU", False)
    assert (first.read().modality, first.read().unit) == ("MR", "arbitrary")
    (some,) = TotalSegmentator(root=tmp_path, cases="s0011", structures=("spleen", "vertebrae_L3")).entries()
    assert tuple(some.read().names.values()) == ("spleen", "vertebra L3")


def test_without_the_table_the_case_decides(tmp_path):
    published(tmp_path, "s1", liver=0)
    (entry,) = TotalSegmentator(root=tmp_path, split={"test": 1.0}).entries()
    assert entry.split == "test"


def test_one_file_a_case(tmp_path):
    labels = np.zeros((4, 4, 3), np.uint8)
    labels[0], labels[1] = 5, 117
    save(tmp_path / "x" / "image.nii.gz", np.arange(48, dtype=np.int16).reshape(4, 4, 3))
    save(tmp_path / "x" / "labels.nii.gz", labels)
    (tmp_path / "x" / "labels.json").write_text(json.dumps({"5": "liver", "117": "costal_cartilages"}))
    (entry,) = TotalSegmentator(root=tmp_path, modality="MR").entries()
    case = entry.read()
    assert case.names == {5: "liver", 117: "costal cartilages"} and case.unit == "arbitrary"
    (liver,) = TotalSegmentator(root=tmp_path, structures=("liver",)).entries()
    assert liver.read().present == ("liver",) and liver.read().labels.max() == 5
    (tmp_path / "x" / "labels.json").write_text('{"5": "liver"}')
    with pytest.raises(BadScan, match=r"labels\.nii\.gz: the value 117 has no name .*add it to .*labels\.json"):
        entry.read()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (META, r"meta\.csv: no row for s1"),
        (META + "s1;1;m;A;x;\n", r"meta\.csv, row 2: image_id or split is empty"),
        (META + "s1;1;m;A;x;fold3\n", r"meta\.csv, row 2: split 'fold3' is not known"),
        (META.replace(";", ",") + "s1,1,m,A,x,train\n", r"meta\.csv: no column 'image_id' between semicolons"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, table, said):
    published(tmp_path, "s1", liver=0)
    (tmp_path / "meta.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        list(TotalSegmentator(root=tmp_path).entries())


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder with ct\.nii\.gz or mri"):
        list(TotalSegmentator(root=tmp_path).entries())
    published(tmp_path, "s1", liver=0)
    with pytest.raises(FileNotFoundError, match=r"spleen\.nii\.gz: no such mask"):
        list(TotalSegmentator(root=tmp_path, structures=("spleen",)).entries())
    published(tmp_path, "s2")
    with pytest.raises(FileNotFoundError, match=r"s2: neither segmentations"):
        list(TotalSegmentator(root=tmp_path).entries())


def test_the_real_ct_and_mr(shared_data):
    root = shared_data / "data" / "totalsegmentator"
    (ct,) = TotalSegmentator(root=root, cases="*_ct", license="Apache-2.0").entries()
    (mr,) = TotalSegmentator(root=root, cases="*_mr_*", modality="MR").entries()
    case = ct.read()
    assert len(case.present) == 61 and {"left kidney", "vertebra L3", "left lung upper lobe"} <= set(case.present)
    left, right = (np.argwhere(case.mask(f"{side} kidney"))[:, 0].mean() for side in ("left", "right"))
    assert case.volume.orientation == "RAS" and left < right
    assert "left kidney" in mr.read().present
