"""M3D-RefSeg on miniatures of its prepared and its raw layout."""

from __future__ import annotations

import csv
import json
import logging
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.m3d_refseg import M3DRefSeg
from data_prep.sources.tables import BadTable
from data_prep.volume import BadScan

SHAPE = (4, 6, 5)
COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
AFFINE = np.diag([-1.5, -1.5, 3.0, 1.0])


def lesions(values: tuple[int, ...] = (1, 2), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Lesion n fills plane n along the first axis."""
    mask = np.zeros(shape)
    for number, value in enumerate(values):
        mask[number] = value
    return mask


def prepared(root: Path, case: str, mask: np.ndarray | None = None) -> None:
    folder = root / "M3D_RefSeg_npy" / case
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ct.npy", np.linspace(0, 1, 120, dtype=np.float32).reshape(1, *SHAPE))
    np.save(folder / "mask.npy", (lesions() if mask is None else mask)[None])


def row(case: str, number: object = 1, kind: object = 0, answer: str = "Sure, it is [SEG].") -> list[object]:
    folder = f"M3D_RefSeg_npy/{case}"
    return [f"{folder}/ct.npy", f"{folder}/mask.npy", number, kind, "Where is the cyst?", answer]


def write(root: Path, name: str, *rows: list[object], folder: str = "M3D_RefSeg_npy") -> None:
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def test_questions_of_an_image_are_drafts_of_one_entry(tmp_path: Path) -> None:
    prepared(tmp_path, "s0001")
    prepared(tmp_path, "s0002")
    write(tmp_path, "M3D_RefSeg.csv", row("s0001"), row("s0001", 2, 1, "The liver, where it is <SEG>."))
    write(tmp_path, "M3D_RefSeg_test.csv", row("s0002", "1.0", "0.0"))
    first, second = M3DRefSeg(root=tmp_path).entries()
    assert (first.dataset, first.image_id, first.patient_id, first.split) == ("M3D-RefSeg", "s0001", "s0001", "train")
    assert second.split == "test" and second.drafts[0].masks == ("lesion 1",)
    asked, reasoned = first.drafts
    assert (asked.task, asked.template, asked.subtask) == ("seg.ref", "m3d.seg.ref", "description")
    assert (asked.slots, asked.masks) == ({"question": "Where is the cyst?"}, ("lesion 1",))
    assert asked.text == "Sure, it is [SEG]."
    assert (reasoned.subtask, reasoned.masks) == ("reasoning", ("lesion 2",))
    assert reasoned.text == "The liver, where it is [SEG]."


@pytest.mark.parametrize("mark", ["[SEG]", "<SEG>", "<seg>", "[Seg]", "< SEG >"])
def test_every_spelling_of_the_mark(tmp_path: Path, mark: str) -> None:
    prepared(tmp_path, "s0001")
    write(tmp_path, "M3D_RefSeg_train.csv", row("s0001", answer=f"It is {mark} here."))
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    assert entry.drafts[0].text == "It is [SEG] here."


def test_a_prepared_case(tmp_path: Path) -> None:
    prepared(tmp_path, "s0001")
    write(tmp_path, "M3D_RefSeg.csv", row("s0001"))
    (entry,) = M3DRefSeg(root=tmp_path / "M3D_RefSeg_npy").entries()
    case = pickle.loads(pickle.dumps(entry.read))()
    assert case.names == {1: "lesion 1", 2: "lesion 2"} and case.labels.dtype == np.uint8
    assert (case.unit, case.placed, case.complete) == ("norm01", False, False)
    np.testing.assert_array_equal(case.mask("lesion 2"), lesions() == 2)


def test_folders_named_as_on_the_hub(tmp_path: Path) -> None:
    prepared(tmp_path, "s0001")
    (tmp_path / "M3D-RefSeg").mkdir()
    (tmp_path / "M3D_RefSeg_npy").rename(tmp_path / "M3D-RefSeg" / "M3D_RefSeg_npy")
    write(tmp_path, "M3D_RefSeg_train.csv", row("s0001"), folder="M3D-RefSeg")
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    assert entry.read().names == {1: "lesion 1", 2: "lesion 2"}


def test_a_lesion_without_voxels_is_said_and_keeps_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(tmp_path, "s0001")
    write(tmp_path, "M3D_RefSeg.csv", row("s0001", 1), row("s0001", 7))
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    with caplog.at_level(logging.WARNING):
        case = entry.read()
    assert "mask.npy: no voxel of Mask_ID 7" in caplog.text
    assert case.names[7] == "lesion 7" and "lesion 7" not in case.present
    assert case.source["empty_masks"] == ("lesion 7",)
    write(tmp_path, "M3D_RefSeg.csv", row("s0001", 7))
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    with pytest.raises(
        BadScan, match=r"mask.npy: none of the lesions \[7\] that are asked about is in it; it has \[1, 2\]"
    ):
        entry.read()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("s0001", answer="Nothing is marked."), r"the Answer has 0 \[SEG\], one is needed: 'Nothing"),
        (row("s0001", answer="[SEG] and <SEG>"), r"the Answer has 2 \[SEG\]"),
        (row("s0001", number="x"), "Mask_ID 'x' is no whole number from 1 on"),
        (row("s0001", number=0), "Mask_ID '0' is no"),
        (row("s0001", number=-1), "Mask_ID '-1' is no"),
        (row("s0001", kind=2), "Question_Type '2' is neither 0"),
        ([*row("s0001")[:4], "", "[SEG]"], "there is no Question"),
        ([*row("s0001")[:1], "M3D_RefSeg_npy/s0009/mask.npy", *row("s0001")[2:]], "s0001 was listed before with"),
        (["../../etc/x", *row("s0001")[1:]], "does not stay inside the data folder"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, bad: list[object], said: str) -> None:
    prepared(tmp_path, "s0001")
    write(tmp_path, "M3D_RefSeg.csv", row("s0001"), bad)
    with pytest.raises(BadTable, match=rf"M3D_RefSeg.csv, row 3: .*{said}"):
        list(M3DRefSeg(root=tmp_path).entries())
    source = M3DRefSeg(root=tmp_path, on_bad_row="skip")
    (entry,) = source.entries()
    assert len(entry.drafts) == 1 and len(source.rejected) == 1


def test_a_table_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "M3D_RefSeg.csv").write_text("Image,Mask,MaskID,Question_Type,Question,Answer\n1,2,3,4,5,6\n")
    with pytest.raises(BadTable, match=r"no column 'Mask_ID'; did you mean 'MaskID'\?"):
        list(M3DRefSeg(root=tmp_path).entries())


def test_an_image_in_both_tables_stays_in_the_test_with_its_questions_there(tmp_path: Path) -> None:
    prepared(tmp_path, "s0001")
    write(tmp_path, "M3D_RefSeg.csv", row("s0001", 1))
    write(tmp_path, "M3D_RefSeg_test.csv", row("s0001", 2))
    with pytest.raises(BadTable, match=r"1 images \(s0001\)"):
        list(M3DRefSeg(root=tmp_path).entries())
    (entry,) = M3DRefSeg(root=tmp_path, on_leak="drop").entries()
    assert entry.split == "test" and [draft.masks for draft in entry.drafts] == [("lesion 2",)]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (lesions((1, 2), (4, 6, 4)), r"the mask has shape \(4, 6, 4\), the image \(4, 6, 5\)"),
        (lesions((1, 1.5)), "whole numbers from 0 on are needed"),
        (lesions((1, -1)), "whole numbers from 0 on"),
        (lesions((1, np.nan)), "whole numbers from 0 on"),
        (np.full(SHAPE, None), "not a plain .npy array"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, mask: np.ndarray, said: str) -> None:
    prepared(tmp_path, "s0001", mask)
    write(tmp_path, "M3D_RefSeg.csv", row("s0001"))
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    with pytest.raises(BadScan, match=rf"mask\.npy: .*{said}"):
        entry.read()


# raw


def raw(root: Path, case: str, texts: object, affine: np.ndarray = AFFINE) -> Path:
    folder = root / "M3D_RefSeg" / case
    folder.mkdir(parents=True, exist_ok=True)
    ct = np.linspace(-1000, 400, 120, dtype=np.float32).reshape(SHAPE)
    nib.save(nib.Nifti1Image(ct, AFFINE), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(lesions().astype(np.uint8), affine), folder / "mask.nii.gz")
    (folder / "text.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "text_zh.txt").write_text("1. ...", encoding="utf-8")
    return folder


def test_raw_folders_keep_place_and_hu(tmp_path: Path) -> None:
    raw(tmp_path, "s0001", {"1": "Cyst of the liver.", "2": " Stone. "})
    (entry,) = M3DRefSeg(root=tmp_path, split="test").entries()
    assert entry.split == "test"
    first, second = entry.drafts
    assert (first.slots, first.masks, first.text) == ({"description": "Cyst of the liver."}, ("lesion 1",), None)
    assert (second.subtask, second.slots) == ("description", {"description": "Stone."})
    case = entry.read()
    assert (case.unit, case.placed, case.volume.spacing) == ("HU", True, (1.5, 1.5, 3.0))
    np.testing.assert_array_equal(case.mask("lesion 1"), lesions() == 1)


def test_a_table_finds_raw_files_where_nothing_was_prepared(tmp_path: Path) -> None:
    folder = raw(tmp_path, "s0001", {"1": "Cyst."})
    write(tmp_path, "M3D_RefSeg_train.csv", row("s0001"), folder="M3D_RefSeg")
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    assert entry.files == (folder / "ct.nii.gz", folder / "mask.nii.gz")
    assert entry.drafts[0].slots == {"question": "Where is the cyst?"} and entry.read().placed


def test_only_text_json_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published generator looks for text.txt and opens text.json: neither alone is enough there."""
    raw(tmp_path, "s0001", {"1": "Cyst."})
    folder = raw(tmp_path, "s0002", {"1": "Cyst."})
    (folder / "text.json").rename(folder / "text.txt")
    with pytest.raises(BadTable, match=r"s0002.*text.json: no such file \(text.txt, text_zh.txt is there\)"):
        list(M3DRefSeg(root=tmp_path).entries())
    with caplog.at_level(logging.WARNING):
        assert [entry.image_id for entry in M3DRefSeg(root=tmp_path, on_bad_row="skip").entries()] == ["s0001"]
    assert "s0002" in caplog.text


@pytest.mark.parametrize("texts", [{}, [], {"1": ""}, {"1": 3}, {"a": "Cyst."}, {"0": "Cyst."}])
def test_texts_that_cannot_be_used(tmp_path: Path, texts: object) -> None:
    raw(tmp_path, "s0001", texts)
    with pytest.raises(BadTable, match=r"text\.json: "):
        list(M3DRefSeg(root=tmp_path).entries())


def test_a_mask_that_lies_elsewhere(tmp_path: Path) -> None:
    raw(tmp_path, "s0001", {"1": "Cyst."}, affine=np.diag([1.5, -1.5, 3.0, 1.0]))
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    with pytest.raises(BadScan, match=r"mask.nii.gz: lies elsewhere"):
        entry.read()


def test_a_missing_mask_fails_when_it_is_read(tmp_path: Path) -> None:
    folder = raw(tmp_path, "s0001", {"1": "Cyst."})
    (folder / "mask.nii.gz").unlink()
    (entry,) = M3DRefSeg(root=tmp_path).entries()
    with pytest.raises(FileNotFoundError, match=r"mask.nii.gz"):
        entry.read()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no M3D_RefSeg_train.csv, no M3D_RefSeg.csv and no <case>/ct.nii.gz"):
        list(M3DRefSeg(root=tmp_path).entries())
