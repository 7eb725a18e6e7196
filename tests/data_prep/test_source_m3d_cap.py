"""M3D-Cap on a miniature of its published layout: one prepared case with two series, and raw slices."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.sources.m3d_cap import M3DCap, study_findings
from data_prep.sources.m3d_volumes import identify, read_norm01, read_slices, settle_splits
from data_prep.sources.tables import BadTable
from data_prep.volume import BadScan

SHAPE = (4, 6, 5)


def ramp(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def item(case: str, series: str, group: str = "ct_case") -> dict[str, str]:
    folder = f"M3D_Cap_npy/{group}/{case}"
    return {"image": f"{folder}/{series}.npy", "text": f"{folder}/text.txt"}


def save(root: Path, row: dict[str, str], report: str = "A cyst in the left kidney.") -> None:
    image, text = root / row["image"], root / row["text"]
    image.parent.mkdir(parents=True, exist_ok=True)
    np.save(image, ramp()[None])
    text.write_text(report, encoding="utf-8")


def write_lists(root: Path, lists: dict[str, object]) -> None:
    (root / "M3D_Cap_npy").mkdir(parents=True, exist_ok=True)
    (root / "M3D_Cap_npy" / "M3D_Cap.json").write_text(json.dumps(lists), encoding="utf-8")


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    found = {
        "train": [item("000006", "Axial_C__arterial_phase"), item("000006", "Coronal_bone_window")],
        "validation": [item("000007", "Axial_non_contrast")],
        "test": [item("000006", "Axial_lung_window", "ct_quizze"), item("000009", "Axial_C")],
        "test1k": [item("000009", "Axial_C")],
        "hard_test": [item("000009", "Axial_C")],
    }
    for rows in found.values():
        for row in rows:
            save(tmp_path, row, report=f"Report of case {row['image'].split('/')[2]}.")
    write_lists(tmp_path, found)
    return found


def test_every_list_becomes_images_of_its_split(tmp_path: Path, lists: dict) -> None:
    entries = {entry.image_id: entry for entry in M3DCap(root=tmp_path).entries()}
    assert {name: entry.split for name, entry in entries.items()} == {
        "ct_case-000006-Axial_C__arterial_phase": "train",
        "ct_case-000006-Coronal_bone_window": "train",
        "ct_case-000007-Axial_non_contrast": "validation",
        "ct_quizze-000006-Axial_lung_window": "test",
        "ct_case-000009-Axial_C": "test",
    }
    assert {entry.patient_id for entry in entries.values() if entry.split == "train"} == {"ct_case-000006"}
    assert entries["ct_quizze-000006-Axial_lung_window"].patient_id == "ct_quizze-000006"  # not the case of that number


def test_drafts_are_the_whole_report_twice_and_name_the_further_test_lists(tmp_path: Path, lists: dict) -> None:
    entries = {entry.image_id: entry for entry in M3DCap(root=tmp_path).entries()}
    report, retrieval = entries["ct_case-000009-Axial_C"].drafts
    assert (report.task, report.template, report.text) == ("report", "m3d.report", "Report of case 000009.")
    assert (retrieval.task, retrieval.template, retrieval.text) == ("retrieval", "m3d.retrieval", report.text)
    assert report.meta == retrieval.meta == {"subsets": ["hard_test", "test1k"]}
    assert entries["ct_case-000007-Axial_non_contrast"].drafts[0].meta == {}


def test_a_read_image_has_no_place_and_no_labels(tmp_path: Path, lists: dict) -> None:
    entry = next(M3DCap(root=tmp_path).entries())
    case = pickle.loads(pickle.dumps(entry.read))()
    assert (case.id, case.patient_id, case.unit, case.placed, case.names) == (
        entry.image_id, entry.patient_id, "norm01", False, {},
    )  # fmt: skip
    np.testing.assert_array_equal(case.volume.array, ramp())
    assert case.volume.orientation == "SPL"


def test_the_root_may_be_the_folder_of_the_lists(tmp_path: Path, lists: dict) -> None:
    above, inside = (list(M3DCap(root=root).entries()) for root in (tmp_path, tmp_path / "M3D_Cap_npy"))
    assert [entry.image_id for entry in above] == [entry.image_id for entry in inside]
    assert [entry.files for entry in above] == [entry.files for entry in inside]


def test_an_image_in_two_splits_is_an_error_that_names_it(tmp_path: Path, lists: dict) -> None:
    lists["train"].append(lists["test"][1])
    write_lists(tmp_path, lists)
    with pytest.raises(BadTable, match=r"1 images \(ct_case-000009-Axial_C\) and 1 patients \(ct_case-000009\)"):
        list(M3DCap(root=tmp_path).entries())
    kept = {entry.image_id: entry.split for entry in M3DCap(root=tmp_path, on_leak="drop").entries()}
    assert kept["ct_case-000009-Axial_C"] == "test"
    assert len(kept) == 5


def test_another_series_of_a_test_patient_is_a_leak_too(tmp_path: Path, lists: dict) -> None:
    row = item("000009", "Sagittal")
    save(tmp_path, row, report="Report of case 000009.")
    lists["train"].append(row)
    write_lists(tmp_path, lists)
    with pytest.raises(BadTable, match=r"no images and 1 patients \(ct_case-000009\) are in more than one split"):
        list(M3DCap(root=tmp_path).entries())
    assert "ct_case-000009-Sagittal" not in {one.image_id for one in M3DCap(root=tmp_path, on_leak="drop").entries()}


def test_splits_settle_for_the_one_examined_last(caplog: pytest.LogCaptureFixture) -> None:
    listed, patients = {"a": {"train"}, "b": {"validation"}, "c": {"train"}}, {"a": "p", "b": "p", "c": "q"}
    with caplog.at_level(logging.WARNING):
        assert settle_splits("x", listed, patients, on_leak="drop") == {"b": "validation", "c": "train"}
    assert "1 patients (p)" in caplog.text


def test_a_repeated_row_counts_once_and_a_contradiction_is_an_error(
    tmp_path: Path, lists: dict, caplog: pytest.LogCaptureFixture
) -> None:
    lists["train"].append(lists["train"][0])
    write_lists(tmp_path, lists)
    with caplog.at_level(logging.WARNING):
        assert len(list(M3DCap(root=tmp_path).entries())) == 5
    assert "1 rows of train repeat an image" in caplog.text
    lists["train"][-1] = {**lists["train"][0], "text": lists["test"][1]["text"]}
    write_lists(tmp_path, lists)
    with pytest.raises(BadTable, match=r"train\[2\].*was listed before with another file or report"):
        list(M3DCap(root=tmp_path).entries())


def test_a_report_that_is_not_there_is_an_error_or_left_out_and_said(
    tmp_path: Path, lists: dict, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / lists["validation"][0]["text"]).unlink()
    (tmp_path / lists["test"][0]["text"]).write_text("  \n")
    with pytest.raises(BadTable, match=r"2 rows cannot be used: .*validation\[0\]: the report .*text.txt is not there"):
        list(M3DCap(root=tmp_path).entries())
    source = M3DCap(root=tmp_path, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        assert len(list(source.entries())) == 3
    assert len(source.rejected) == 2 and "is empty" in source.rejected[1] and "left out" in caplog.text


def test_a_missing_image_is_listed_and_fails_when_it_is_read(
    tmp_path: Path, lists: dict, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / lists["train"][0]["image"]).unlink()
    with caplog.at_level(logging.WARNING):
        entries = list(M3DCap(root=tmp_path).entries())
    assert len(entries) == 5 and "1 of 5 listed files" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"Axial_C__arterial_phase.npy: no such file"):
        entries[0].read()


def test_a_wrong_root_is_said_at_once(tmp_path: Path, lists: dict) -> None:
    with pytest.raises(FileNotFoundError, match=r"no M3D_Cap.json in it nor in M3D_Cap_npy"):
        list(M3DCap(root=tmp_path / "elsewhere").entries())
    for rows in lists.values():
        for row in rows:
            (tmp_path / row["image"]).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"nor is any other file .* is the root right"):
        list(M3DCap(root=tmp_path).entries())


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({}, "no list train, validation, test"),
        ([], "lists by split are needed"),
        ({"train": []}, "no list train, validation, test"),
        ({"trian": [1]}, r"unknown list 'trian'; did you mean 'train'\?"),
        ({"train": [{"image": "a.npy"}]}, r'train\[0\]: an item \{"image": path'),
        ({"train": [{"image": "../a/b/c.npy", "text": "t.txt"}]}, "does not stay inside the data folder"),
        ({"train": [{"image": "a/b/c.npy", "text": "t"}]}, "neither a path to a .txt file nor a report"),
    ],
)
def test_broken_lists_are_errors_with_their_place(tmp_path: Path, lists: object, said: str) -> None:
    write_lists(tmp_path, lists)  # type: ignore[arg-type]
    with pytest.raises(BadTable, match=said):
        list(M3DCap(root=tmp_path).entries())


def test_a_list_file_that_was_cut_short(tmp_path: Path) -> None:
    write_lists(tmp_path, {})
    (tmp_path / "M3D_Cap_npy" / "M3D_Cap.json").write_text('{"train": [{"image":')
    with pytest.raises(BadTable, match=r"M3D_Cap.json, line 1: not JSON; was the download cut short"):
        list(M3DCap(root=tmp_path).entries())


def test_study_findings_are_taken_as_published() -> None:
    assert study_findings("title: x\nstudy_findings:\n Two\n cysts. \n") == "Two cysts."
    assert study_findings("study_findings: \n discussion: A stone.") == "discussion: A stone."
    assert study_findings("study_findings:") == "study_findings:"
    assert study_findings("discussion: A stone.\nstudy_findings: ok") == "A stone. study_findings: ok"
    assert study_findings("Plain report.\nSecond line.") == "Plain report. Second line."


def write_slice(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(path))


def test_raw_slices_are_read_by_number_in_grey_and_of_one_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = item("000012", "Axial_C")
    folder = tmp_path / "M3D_Cap" / "ct_case" / "000012" / "Axial_C"
    for number in (2, 10, 1):  # as names, 10 would come before 2
        write_slice(folder / f"{number}.png", np.full((6, 5), 20 * number, np.uint8))
    write_slice(folder / "11.png", np.full((7, 5), 9, np.uint8))
    coloured = np.zeros((6, 5, 3), np.uint8)
    coloured[..., 0] = 255  # red is 76 in grey
    write_slice(folder / "12.png", coloured)
    (folder / "notes.md").write_text("not a slice")
    (folder.parent / "text.txt").write_text("presentation: pain\nstudy_findings: A large mass.")
    write_lists(tmp_path, {"train": [row]})
    (entry,) = M3DCap(root=tmp_path).entries()
    assert entry.files == (folder,) and entry.image_id == "ct_case-000012-Axial_C"
    assert entry.drafts[0].text == "A large mass."
    with caplog.at_level(logging.WARNING):
        case = entry.read()
    assert "1 of 5 slices are not (6, 5)" in caplog.text
    assert (case.unit, case.placed, case.volume.shape) == ("arbitrary", False, (4, 6, 5))
    np.testing.assert_allclose(case.volume.array[:, 0, 0] * 255, [20, 40, 200, 76], rtol=1e-6)


def test_jpeg_slices_too(tmp_path: Path) -> None:
    for number in (0, 1):
        write_slice(tmp_path / f"{number}.jpeg", np.full((16, 16), 100 * number, np.uint8))
    np.testing.assert_allclose(read_slices(tmp_path).array[:, 8, 8], [0, 100 / 255], atol=0.01)


def test_broken_slices_are_errors_with_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_slices(tmp_path / "none")
    with pytest.raises(BadScan, match="no slices"):
        read_slices(tmp_path)
    write_slice(tmp_path / "1.png", np.eye(4, dtype=np.uint8))
    with pytest.raises(BadScan, match="only one slice"):
        read_slices(tmp_path)
    (tmp_path / "2.png").write_bytes(b"\x89PNG cut short")
    with pytest.raises(BadScan, match=r"2.png: not a picture, or a damaged one"):
        read_slices(tmp_path)
    write_slice(tmp_path / "2.png", np.eye(4, dtype=np.uint16))
    with pytest.raises(BadScan, match=r"2.png: uint16 pixels"):
        read_slices(tmp_path)
    (tmp_path / "2.png").rename(tmp_path / "first.png")
    with pytest.raises(BadScan, match=r"first.png: a slice is named by its number"):
        read_slices(tmp_path)
    (tmp_path / "first.png").rename(tmp_path / "01.png")
    with pytest.raises(BadScan, match=r"has the same number"):
        read_slices(tmp_path)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (ramp((2, 4, 6, 5)), "this array has shape"),
        (ramp((6, 5)), "this array has shape"),
        (np.arange(120, dtype=np.uint8).reshape(SHAPE), "uint8 voxels"),
        (ramp() * 255, "values from 0 to 255"),
        (np.full(SHAPE, np.nan, np.float32), "NaN"),
        (np.zeros(SHAPE, np.float32), "nothing to see"),
        (np.full(SHAPE, None), "not a plain .npy array"),
        (ramp().astype("U4"), "one array of numbers"),
    ],
)
def test_arrays_that_are_no_prepared_volume(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BadScan, match=rf"a\.npy: .*{said}"):
        read_norm01(tmp_path / "a.npy")


def test_a_truncated_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ramp())
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(BadScan, match=r"a\.npy: .*truncated"):
        read_norm01(tmp_path / "a.npy")


def test_ids_are_safe_and_stay_apart() -> None:
    assert identify("ct_case", "000006", "Axial_C__phase") == "ct_case-000006-Axial_C__phase"
    assert identify("Pöschl") == "Poschl"  # as the published preparation names it
    one, two = identify("a b"), identify("a/b")
    assert one != two and one.startswith("a_b-") and two.startswith("a_b-")
