"""dataset.json in its two forms, on miniatures written here."""

import json
import pickle

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.nnunet import NNUNet
from data_prep.volume import BadScan

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
ALL_TRAIN = {"train": 1.0}


def image(path, *, channels=0):
    shape = (4, 4, 3, channels) if channels else (4, 4, 3)
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), AFFINE).to_filename(path)


def label(path, *values):
    """A label map whose rows 0, 1, 2... have these values."""
    array = np.zeros((4, 4, 3), np.uint8)
    for row, value in enumerate(values):
        array[row] = value
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(array, AFFINE).to_filename(path)


def describe(root, **content):
    (root / "dataset.json").write_text(json.dumps(content))


def decathlon(root, **changes):
    for case in ("liver_2", "liver_10"):
        image(root / "imagesTr" / f"{case}.nii.gz")
        label(root / "labelsTr" / f"{case}.nii.gz", 1, 2)
    image(root / "imagesTs" / "liver_3.nii.gz")
    files = [
        {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("liver_2", "liver_10")
    ]
    content = {
        "name": "Liver",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "liver_tumour"},
        "training": files,
        "test": ["./imagesTs/liver_3.nii.gz"],
    }
    describe(root, **content | changes)


def test_the_decathlon(tmp_path):
    decathlon(tmp_path)
    entries = list(NNUNet(root=tmp_path, split=ALL_TRAIN).entries())
    assert [(one.dataset, one.license, one.image_id, one.split) for one in entries] == [
        ("Liver", "CC-BY-SA 4.0", "liver_2", "train"),
        ("Liver", "CC-BY-SA 4.0", "liver_10", "train"),
    ]
    case = pickle.loads(pickle.dumps(entries[0].read))()
    assert case.names == {1: "liver", 2: "liver tumour"} and case.labels.ndim == 3
    assert case.mask("liver")[0].all() and case.mask("liver tumour").sum() == 12
    assert (case.modality, case.unit, case.complete) == ("CT", "HU", False)
    with_test = list(NNUNet(root=tmp_path, unlabelled=True, complete=True).entries())
    assert [one.image_id for one in with_test][2:] == ["liver_3"] and with_test[2].split == "test"
    assert with_test[2].read().names == {} and with_test[0].read().complete


def test_mr_is_not_in_hounsfield_units(tmp_path):
    decathlon(tmp_path, modality={"0": "MRI"})
    case = next(NNUNet(root=tmp_path, rename={"liver": "hepar"}).entries()).read()
    assert (case.modality, case.unit) == ("MR", "arbitrary") and case.names[1] == "hepar"


def test_one_channel_of_a_4d_scan(tmp_path):
    image(tmp_path / "imagesTr" / "b.nii.gz", channels=2)
    label(tmp_path / "labelsTr" / "b.nii.gz", 1)
    training = [{"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"}]
    describe(
        tmp_path, name="B", modality={"0": "T2", "1": "ADC"}, labels={"0": "background", "1": "PZ"}, training=training
    )
    (entry,) = NNUNet(root=tmp_path, channel=1).entries()
    case = entry.read()
    assert case.volume.array[0, 0].tolist() == [1, 3, 5] and case.modality == "MR"
    with pytest.raises(ValueError, match=r"dataset\.json: channel 2 is not in channel_names or modality"):
        list(NNUNet(root=tmp_path, channel=2).entries())


def test_nnunet_with_regions_channels_and_ignored_voxels(tmp_path):
    for case in ("c_2", "c_1"):
        for channel in range(2):
            image(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        label(tmp_path / "labelsTr" / f"{case}.nii.gz", 1, 2, 3, 4)
    image(tmp_path / "imagesTs" / "c_9_0000.nii.gz")
    image(tmp_path / "imagesTs" / "c_9_0001.nii.gz")
    label(tmp_path / "labelsTs" / "c_9.nii.gz", 1)
    labels = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3, "ignore": 4}
    describe(tmp_path, channel_names={"0": "FLAIR", "1": "T1"}, labels=labels, numTraining=2, file_ending=".nii.gz")
    first, second, test = NNUNet(root=tmp_path, dataset="Tumors", channel=1, split=ALL_TRAIN).entries()
    assert [first.image_id, second.image_id, test.image_id] == ["c_1", "c_2", "c_9"]
    assert (first.split, test.split, first.files[0].name) == ("train", "test", "c_1_0001.nii.gz")
    case = first.read()
    sizes = {name: int(case.mask(name).sum()) // 12 for name in case.names.values()}
    assert sizes == {"whole tumor": 3, "tumor core": 2, "enhancing tumor": 1}
    assert case.labels.shape == (3, 4, 4, 3) and not case.labels[:, 3].any()


def test_files_named_in_dataset_json(tmp_path):
    image(tmp_path / "mine" / "x.nii.gz")
    label(tmp_path / "mine" / "y.nii.gz", 1)
    files = {"x": {"images": ["mine/x.nii.gz"], "label": "mine/y.nii.gz"}}
    describe(
        tmp_path, channel_names={"0": "CT"}, labels={"background": 0, "liver": 1}, file_ending=".nii.gz", dataset=files
    )
    (entry,) = NNUNet(root=tmp_path).entries()
    assert entry.read().present == ("liver",)
    files["x"]["label"] = "../y.nii.gz"
    describe(tmp_path, channel_names={"0": "CT"}, labels={"liver": 1}, dataset=files)
    with pytest.raises(ValueError, match=r"'\.\./y\.nii\.gz' leaves the folder"):
        list(NNUNet(root=tmp_path).entries())


def test_patients_share_a_split(tmp_path):
    for case in ("p1_a", "p1_b", "p2_a"):
        image(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
        label(tmp_path / "labelsTr" / f"{case}.nii.gz", 1)
    describe(tmp_path, channel_names={"0": "CT"}, labels={"background": 0, "liver": 1}, file_ending=".nii.gz")
    entries = list(NNUNet(root=tmp_path, patients=r"^(p\d+)_").entries())
    assert [one.patient_id for one in entries] == ["p1", "p1", "p2"] and entries[0].split == entries[1].split
    with pytest.raises(ValueError, match="finds no patient in 'p1_a'"):
        list(NNUNet(root=tmp_path, patients="(q)").entries())


def test_what_is_wrong_is_said_with_the_file(tmp_path):
    decathlon(tmp_path, labels={"0": "background", "1": "liver"})
    with pytest.raises(
        BadScan, match=r"liver_2\.nii\.gz: the value 2 has no name .*add it to `labels` in .*dataset\.json"
    ):
        next(NNUNet(root=tmp_path).entries()).read()
    decathlon(tmp_path, labels={"liver": "one"})
    with pytest.raises(ValueError, match=r"dataset\.json: labels: 'liver': 'one' is no name with its value"):
        list(NNUNet(root=tmp_path).entries())
    decathlon(tmp_path, labels={"1": "liver", "2": "Liver"})
    with pytest.raises(ValueError, match=r"two are called 'liver'"):
        list(NNUNet(root=tmp_path).entries())
    decathlon(tmp_path, labels=None)
    with pytest.raises(ValueError, match=r"this is no dataset\.json"):
        list(NNUNet(root=tmp_path).entries())
    decathlon(tmp_path, training=[])
    with pytest.raises(FileNotFoundError, match="lists no case"):
        list(NNUNet(root=tmp_path).entries())
    with pytest.raises(FileNotFoundError, match=r"dataset\.json: no such file"):
        list(NNUNet(root=tmp_path / "imagesTr").entries())
    decathlon(tmp_path)
    (tmp_path / "imagesTr" / "liver_2.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"liver_2"):
        next(NNUNet(root=tmp_path).entries()).read()
