"""One's own scans: patterns, masks on the scan's grid, names, reports, patients and splits, on miniatures made here."""

import json
import logging
import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.sources.folder import Folder
from data_prep.sources.names import natural_name
from data_prep.sources.splits import split_by_hash
from data_prep.volume import BadScan

AFFINE = np.array([[-2.0, 0, 0, 10], [0, -2.0, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])  # LPS
SHAPE = (6, 5, 4)


def scan(path, *, affine=AFFINE, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine).to_filename(path)


def labels(path, *boxes, affine=AFFINE, shape=SHAPE, turn=None):
    """A label map with one voxel range along the first axis a value: ``(value, from, to)``."""
    array = np.zeros(shape, np.uint8)
    for value, first, stop in boxes:
        array[first:stop] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array if turn is None else turn(array), affine).to_filename(path)


def only(source):
    (entry,) = source.entries()
    return entry


def test_a_label_map_beside_each_scan(tmp_path):
    for name in ("p10", "p2"):
        scan(tmp_path / f"{name}.nii.gz")
        labels(tmp_path / f"{name}_seg.nii.gz", (1, 0, 2), (7, 4, 5))
    source = Folder(
        root=tmp_path, dataset="Mine", masks="{id}_seg.nii.gz", labels={1: "kidney_left", 7: "vertebrae_L3"}
    )
    entries = list(source.entries())
    assert [entry.image_id for entry in entries] == ["p2", "p10"]  # masks are no scans, and 2 comes before 10
    assert [path.name for path in entries[0].files] == ["p2.nii.gz", "p2_seg.nii.gz"]
    case = pickle.loads(pickle.dumps(entries[0].read))()
    assert case.names == {1: "left kidney", 7: "vertebra L3"}
    assert case.mask("left kidney").sum() == 2 * 5 * 4 and case.mask("vertebra L3").sum() == 5 * 4
    assert (case.id, case.patient_id, case.unit, case.modality, case.complete) == ("p2", "p2", "HU", "CT", False)
    assert case.volume.array[1, 2, 3] == 1 * 20 + 2 * 4 + 3
    assert [(entry.image_id, entry.split) for entry in source.entries()] == [
        ("p2", entries[0].split),
        ("p10", entries[1].split),
    ]


def test_one_file_a_structure_overlapping_and_an_empty_one(tmp_path):
    scan(tmp_path / "scans" / "a.nii.gz")
    labels(tmp_path / "masks" / "a" / "lung_upper_lobe_left.nii.gz", (1, 0, 4))
    labels(tmp_path / "masks" / "a" / "nodule.nii.gz", (255, 3, 5))
    labels(tmp_path / "masks" / "a" / "cyst.nii.gz")
    for masks in ("masks/{id}/{name}.nii.gz", "masks/{id}"):
        case = only(Folder(root=tmp_path, scans="scans/*.nii.gz", masks=masks, complete=True, modality="MR")).read()
        assert case.labels.shape == (2, *SHAPE)
        sizes = {name: int(case.mask(name).sum()) // 20 for name in case.names.values()}
        assert sizes == {"cyst": 0, "left lung upper lobe": 4, "nodule": 2}
        assert case.complete and case.unit == "arbitrary" and case.present == ("left lung upper lobe", "nodule")


def test_a_mask_with_turned_axes_is_the_same_mask(tmp_path):
    scan(tmp_path / "a.nii.gz")
    turned = AFFINE[:, [2, 0, 1, 3]].copy()  # axes (k, i, j), the i axis from its far end
    turned[:3, 3] += turned[:3, 1] * (SHAPE[0] - 1)
    turned[:3, 1] *= -1
    labels(tmp_path / "m.nii.gz", (1, 0, 1), (2, 5, 6), affine=turned, turn=lambda a: a.transpose(2, 0, 1)[:, ::-1])
    case = only(Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", labels={1: "first", 2: "last"})).read()
    assert case.mask("first")[0].all() and case.mask("last")[5].all() and (case.labels > 0).sum() == 2 * 20


@pytest.mark.parametrize("what", ["shifted", "shape"])
def test_a_mask_on_another_grid_is_refused_with_both_names(tmp_path, what):
    scan(tmp_path / "a.nii.gz")
    moved = AFFINE.copy()
    moved[0, 3] += 1.0 if what == "shifted" else 0.0  # half a voxel
    labels(tmp_path / "m.nii.gz", (1, 0, 1), affine=moved, shape=SHAPE if what == "shifted" else (6, 5, 3))
    entry = only(Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", labels={1: "liver"}))
    with pytest.raises(BadScan, match=r"m\.nii\.gz: its grid .* not that of .*a\.nii\.gz .*resample the mask"):
        entry.read()


def test_header_rounding_is_no_other_grid(tmp_path):
    scan(tmp_path / "a.nii.gz")
    labels(tmp_path / "m.nii.gz", (1, 0, 1), affine=AFFINE + 1e-3 * (np.arange(16).reshape(4, 4) < 12))
    assert only(Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", labels={1: "liver"})).read().present == (
        "liver",
    )


def test_a_value_without_a_name_and_values_that_are_no_labels(tmp_path):
    scan(tmp_path / "a.nii.gz")
    labels(tmp_path / "m.nii.gz", (1, 0, 1), (9, 2, 3))
    source = Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", labels={1: "liver"})
    with pytest.raises(BadScan, match=r"m\.nii\.gz: the value 9 has no name \(known: 1: liver\); add it to `labels`"):
        only(source).read()
    nib.Nifti1Image(np.full(SHAPE, 0.5, np.float32), AFFINE).to_filename(tmp_path / "m.nii.gz")
    with pytest.raises(BadScan, match=r"m\.nii\.gz: the value 0\.5 is no label"):
        only(source).read()
    nib.Nifti1Image(np.full(SHAPE, -1, np.int16), AFFINE).to_filename(tmp_path / "m.nii.gz")
    with pytest.raises(BadScan, match=r"m\.nii\.gz: the value -1 is no label"):
        only(source).read()


def test_a_map_where_one_structure_is_expected(tmp_path):
    scan(tmp_path / "a.nii.gz")
    labels(tmp_path / "masks" / "liver.nii.gz", (1, 0, 1), (2, 2, 3))
    with pytest.raises(BadScan, match=r"liver\.nii\.gz: one structure is expected"):
        only(Folder(root=tmp_path, scans="a.nii.gz", masks="masks/{name}.nii.gz")).read()


@pytest.mark.parametrize("text", ['{"1": "Kidney_Right"}', '{"Kidney_Right": 1}', "1: Kidney_Right\n"])
def test_names_from_a_file(tmp_path, text):
    scan(tmp_path / "a.nii.gz")
    labels(tmp_path / "m.nii.gz", (1, 0, 1))
    name = "names.json" if text.startswith("{") else "names.yaml"
    (tmp_path / name).write_text(text)
    assert only(Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", labels=name)).read().names == {
        1: "right kidney"
    }


def test_names_from_the_header_and_names_that_are_wanted_otherwise(tmp_path):
    scan(tmp_path / "a.nii.gz")
    labels(tmp_path / "m.nii.gz", (1, 0, 1), (2, 1, 2))
    image = nib.load(tmp_path / "m.nii.gz")
    table = '<LabelTable><Label Key="1" Red="0"><![CDATA[kidney_left]]></Label><Label Key="2">GTV</Label></LabelTable>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, table.encode()))
    nib.Nifti1Image(np.asarray(image.dataobj), AFFINE, image.header).to_filename(tmp_path / "m.nii.gz")
    source = Folder(root=tmp_path, scans="a.nii.gz", masks="m.nii.gz", rename={"GTV": "gross tumor volume"})
    assert only(source).read().names == {1: "left kidney", 2: "gross tumor volume"}


def test_other_formats_and_ids_from_wildcards(tmp_path):
    (tmp_path / "x 1").mkdir()
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    sitk.WriteImage(image, str(tmp_path / "x 1" / "ct.nrrd"))
    mask = sitk.GetImageFromArray((np.arange(60).reshape(3, 4, 5) == 7).astype(np.uint8))
    sitk.WriteImage(mask, str(tmp_path / "x 1" / "seg.mha"))
    entry = only(Folder(root=tmp_path, scans="*/ct.nrrd", masks="{id}/seg.mha", labels={1: "dot"}))
    assert entry.image_id == "x_1"  # an id has no blanks
    assert entry.read().mask("dot")[0, 1, 2]
    np.save(tmp_path / "a.npy", np.arange(24.0).reshape(2, 3, 4))
    np.save(tmp_path / "a_m.npy", np.arange(24).reshape(2, 3, 4) // 23)
    npy = Folder(root=tmp_path, scans="?.npy", masks="{1}_m.npy", labels={1: "dot"}, spacing=(3.0, 1.0, 1.0))
    assert only(npy).read().mask("dot").sum() == 1


def test_reports_questions_patients_and_splits_from_a_table(tmp_path):
    for name in ("a", "b", "c"):
        scan(tmp_path / "ct" / f"{name}.nii.gz")
    (tmp_path / "reports.csv").write_text(
        "image,text,patient,split,question,answer,options\n"
        "ct/a.nii.gz,Normal liver.,p1,val,,,\n"
        "a.nii.gz,,,,Which plane?,axial,Sagittal | Axial|coronal\n"
        'b,"Cyst, 3 cm.",p1,val,What is it?,a cyst,\n'
        "c,,p3,test,Side?,B.,left|right\n"
    )
    source = Folder(root=tmp_path, scans="ct/*.nii.gz", reports="reports.csv")
    a, b, c = source.entries()
    assert [(one.patient_id, one.split) for one in (a, b, c)] == [("p1", "validation")] * 2 + [("p3", "test")]
    assert [draft.task for draft in a.drafts] == ["report", "retrieval", "vqa.closed"]
    assert a.drafts[0].text == "Normal liver." and a.drafts[2].slots == {"question": "Which plane?"}
    assert (a.drafts[2].options, a.drafts[2].choice) == (("Sagittal", "Axial", "coronal"), 1)
    assert [(draft.task, draft.text) for draft in b.drafts][2] == ("vqa.open", "a cyst")
    assert c.drafts[0].choice == 1
    assert a.read().names == {}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("aa.nii.gz,text,,,,,", r"row 2: no scan 'aa.nii.gz'; did you mean 'a.nii.gz'"),
        ("a,,,,,,", r"row 2: neither text nor question"),
        ("a,,,,Why?,,", r"row 2: a question and its answer go together"),
        ("a,,,,Why?,E,x|y", r"row 2: the answer 'E' is none of the options"),
        ("a,,,,Why?,x,x|X", r"row 2: options"),
        ("a,text,,maybe,,,", r"row 2: split 'maybe' is not known; write train"),
        (",text,,,,,", r"row 2: no scan is named"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    scan(tmp_path / "a.nii.gz")
    (tmp_path / "r.csv").write_text(f"id,text,patient,split,question,answer,options\n{row}\n")
    with pytest.raises(ValueError, match=rf"r\.csv, {said}"):
        list(Folder(root=tmp_path, reports="r.csv").entries())


def test_patients_and_splits_by_expression_and_by_table(tmp_path):
    for path in ("train/p1_a", "train/p1_b", "val/p2_a"):
        scan(tmp_path / f"{path}.nii.gz")
    by_path = Folder(root=tmp_path, scans="*/*.nii.gz", patients=r"(p\d+)_", splits=r"^(\w+)/")
    found = [(entry.image_id, entry.patient_id, entry.split) for entry in by_path.entries()]
    assert found == [("train_p1_a", "p1", "train"), ("train_p1_b", "p1", "train"), ("val_p2_a", "p2", "validation")]
    (tmp_path / "s.csv").write_text("image,split\np1_a.nii.gz,train\np1_b.nii.gz,test\n")
    by_table = Folder(root=tmp_path, scans="train/*.nii.gz", patients=r"(p\d+)_", splits="s.csv")
    with pytest.raises(ValueError, match=r"patient p1 is in train \(p1_a\) and in test \(p1_b\); put all scans"):
        list(by_table.entries())
    with pytest.raises(ValueError, match=r"p1_a\.nii\.gz: patients='\(q\)' finds no patient in it"):
        list(Folder(root=tmp_path, scans="train/*.nii.gz", patients="(q)").entries())


def test_the_hash_decides_by_patient_and_in_the_shares_asked_for():
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    drawn = [split_by_hash(f"patient {number}", shares) for number in range(2000)]
    assert abs(drawn.count("train") - 1600) < 80 and abs(drawn.count("test") - 200) < 60
    assert split_by_hash("abc", {"test": 1.0}) == "test"
    # sha256("abc") begins ba7816bf = 0.7284 of 2**32: fixed by the standard, so the same everywhere
    assert split_by_hash("abc", {"train": 0.72, "validation": 0.28}) == "validation"
    assert split_by_hash("abc", {"train": 0.73, "validation": 0.27}) == "train"


def test_what_is_wrong_with_the_folder_is_said(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no scan; correct root or the pattern"):
        list(Folder(root=tmp_path).entries())
    scan(tmp_path / "a.nii.gz")
    scan(tmp_path / "b.nii.gz")
    with pytest.raises(FileNotFoundError, match="no mask for any of 2 scans"):
        list(Folder(root=tmp_path, masks="{id}_seg.nii.gz").entries())
    labels(tmp_path / "m" / "a.nii.gz", (1, 0, 1))
    with pytest.raises(ValueError, match=r"has no \{id\}, but there are 2 scans"):
        list(Folder(root=tmp_path, masks="m/a.nii.gz").entries())
    with caplog.at_level(logging.WARNING):
        assert len(list(Folder(root=tmp_path, masks="m/{id}.nii.gz", labels={1: "x"}).entries())) == 2
    assert "1 of 2 scans have no mask, such as b" in caplog.text
    with pytest.raises(ValueError, match="shares of split must add up to 1"):
        Folder(root=tmp_path, split={"train": 0.5})
    with pytest.raises(ValueError, match="no regular expression"):
        Folder(root=tmp_path, patients="(")
    with pytest.raises(ValueError, match="must stay below root"):
        list(Folder(root=tmp_path, scans="../*.nii.gz").entries())
    scan(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"its id 'a' is also that of"):
        list(Folder(root=tmp_path, scans="[ab].nii*").entries())


@pytest.mark.parametrize(
    ("raw", "natural"),
    [
        ("kidney_left", "left kidney"),
        ("vertebrae_L3", "vertebra L3"),
        ("lung_upper_lobe_left", "left lung upper lobe"),
        ("rib_left_7", "left rib 7"),
        ("iliac_vena_right", "right iliac vein"),
        ("inferior_vena_cava", "inferior vena cava"),
        ("hip_left", "left hip bone"),
        ("SpinalCord", "spinal cord"),
        ("Parotid_L", "left parotid"),
        ("non-enhancing_tumor", "non-enhancing tumor"),
        ("LIVER", "liver"),
        ("PTV56", "PTV56"),
        ("GTVp", "GTVp"),
        ("left kidney", "left kidney"),
        ("left_right_shunt", "left right shunt"),
    ],
)
def test_natural_names(raw, natural):
    assert natural_name(raw) == natural
    assert natural_name(natural) == natural


def test_a_name_without_letters_is_refused():
    with pytest.raises(ValueError, match="no name of a structure"):
        natural_name("_-_")


def test_the_hippocampi_of_the_decathlon(shared_data):
    source = Folder(
        root=shared_data / "data" / "msd_hippocampus",
        dataset="MSD hippocampus",
        license="CC-BY-SA-4.0",
        scans="images/*.nii.gz",
        masks="labels/{id}.nii.gz",
        labels={1: "anterior hippocampus", 2: "posterior hippocampus"},
        modality="MR",
        complete=True,
    )
    entries = list(source.entries())
    assert len(entries) == 100 and {entry.split for entry in entries} == {"train", "validation", "test"}
    case = entries[0].read()
    assert case.present == ("anterior hippocampus", "posterior hippocampus") and case.unit == "arbitrary"
    posterior, anterior = (
        np.argwhere(case.mask(f"{word} hippocampus"))[:, 1].mean() for word in ("posterior", "anterior")
    )
    assert posterior < anterior  # the file's second axis grows to the front


def test_a_dicom_series_and_its_structures(shared_data):
    source = Folder(root=shared_data / "data", scans="dicom_ct", masks="dicom_ct_structures.nii.gz", dataset="CT")
    entry = only(source)
    assert entry.image_id == "dicom_ct" and "1.3.12" not in str((entry.files, entry.patient_id))
    case = entry.read()  # slices first in the series, last in the mask: turned exactly
    assert case.labels.shape[-3:] == case.volume.shape == (20, 512, 512)
    assert len(case.present) == 31 and "left lung upper lobe" not in case.present
    assert case.volume.array[case.mask("left rib 9")].mean() > 200  # bone lies on bone
    assert 0 < case.volume.array[case.mask("liver")].mean() < 200


def test_labels_json_beside_each_case(shared_data):
    source = Folder(
        root=shared_data / "data" / "totalsegmentator",
        scans="*_ct/image.nii.gz",
        masks="{id}_ct/labels.nii.gz",
        labels="{id}_ct/labels.json",
    )
    case = only(source).read()
    names = json.loads((shared_data / "data/totalsegmentator/abdomen_pelvis_ct/labels.json").read_text())
    assert len(case.present) == len(names) == 61
