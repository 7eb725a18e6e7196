"""M3D-VQA on a miniature of its tables, and the reader of tables itself."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.m3d_cap import M3DCap
from data_prep.sources.m3d_vqa import M3DVQA
from data_prep.sources.tables import BadTable, read_csv, read_json

COLUMNS = (
    "Image Path,Text,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice".split(",")
)  # fmt: skip
IMAGE = "M3D_Cap_npy/ct_case/{}/Axial_C.npy"
ORGAN = ["report", "3", "Which organ has a cyst?", "Liver", "Kidney", "Spleen", "Lung", "Kidney", "B"]
PHASE = ["report", "2", "Is it enhanced, or\nplain?", "Plain", "Enhanced", "NA", "", "Plain", "A"]
YES_NO = ("Image Path", "Question Type", "Question", "Answer", "Answer Choice")


def write(path: Path, rows: list[list[str]], columns: tuple[str, ...] | list[str] = COLUMNS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def table(root: Path, name: str, *rows: tuple[str, list[str]], columns: object = COLUMNS) -> Path:
    for case, _ in rows:
        image = root / IMAGE.format(case)
        image.parent.mkdir(parents=True, exist_ok=True)
        np.save(image, np.linspace(0, 1, 120, dtype=np.float32).reshape(1, 4, 6, 5))
    return write(root / "M3D-VQA" / name, [[IMAGE.format(case), *row] for case, row in rows], columns)  # type: ignore[arg-type]


def test_rows_of_an_image_make_one_entry_with_closed_and_open_questions(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN), ("000007", ORGAN), ("000006", PHASE))
    first, second = M3DVQA(root=tmp_path).entries()
    assert (first.image_id, second.image_id) == ("ct_case-000006-Axial_C", "ct_case-000007-Axial_C")
    assert [draft.task for draft in first.drafts] == ["vqa.closed", "vqa.open"] * 2
    closed, open_, two, _ = first.drafts
    assert (closed.subtask, closed.options, closed.choice) == ("organ", ("Liver", "Kidney", "Spleen", "Lung"), 1)
    assert closed.slots == open_.slots == {"question": "Which organ has a cyst?"}
    assert (open_.text, open_.options, open_.subtask) == ("Kidney", None, "organ")
    assert (two.options, two.choice, two.subtask) == (("Plain", "Enhanced"), 0, "phase")  # no "C. NA D. NA"
    assert two.slots == {"question": "Is it enhanced, or\nplain?"}
    assert first.dataset == "M3D-Cap" and {draft.dataset for draft in first.drafts} == {"M3D-VQA"}
    assert closed.meta == open_.meta == {}
    assert first.read().volume.shape == (4, 6, 5)


def test_tables_map_to_splits_and_test5k_is_a_mark(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN))
    table(tmp_path, "M3D_VQA_val.csv", ("000007", ORGAN))
    table(tmp_path, "M3D_VQA_test.csv", ("000008", ORGAN), ("000008", PHASE))
    table(tmp_path, "M3D_VQA_test5k.csv", ("000008", PHASE))
    entries = list(M3DVQA(root=tmp_path).entries())
    assert [entry.split for entry in entries] == ["train", "validation", "test"]
    assert [draft.meta.get("subsets") for draft in entries[2].drafts] == [None, None, ["test5k"], ["test5k"]]


def test_images_are_those_of_m3d_cap(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN))
    (tmp_path / "M3D_Cap_npy/ct_case/000006/text.txt").write_text("A renal cyst.")
    (tmp_path / "M3D_Cap_npy/M3D_Cap.json").write_text(
        '{"train": [{"image": "M3D_Cap_npy/ct_case/000006/Axial_C.npy", '
        '"text": "M3D_Cap_npy/ct_case/000006/text.txt"}]}'
    )
    (asked,), (told,) = M3DVQA(root=tmp_path).entries(), M3DCap(root=tmp_path).entries()
    for name in ("dataset", "image_id", "patient_id", "split", "files"):
        assert getattr(asked, name) == getattr(told, name)


def test_folders_named_as_on_the_hub(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN))
    (tmp_path / "M3D-Cap").mkdir()
    (tmp_path / "M3D_Cap_npy").rename(tmp_path / "M3D-Cap" / "M3D_Cap_npy")
    (entry,) = M3DVQA(root=tmp_path).entries()
    assert entry.files == (tmp_path / "M3D-Cap" / IMAGE.format("000006"),)
    assert entry.read().volume.shape == (4, 6, 5)


def test_yes_and_no(tmp_path: Path) -> None:
    rows = [("000006", ["4", "Is there a cyst?", "Yes", "A"]), ("000006", ["", "Is it large?", "no.", "NA"])]
    table(tmp_path, "M3D_VQA_yn_train.csv", *rows, columns=YES_NO)
    (entry,) = M3DVQA(root=tmp_path).entries()
    yes, said, no, _ = entry.drafts
    assert (yes.task, yes.subtask, yes.options, yes.choice) == ("vqa.closed", "yes/no", ("yes", "no"), 0)
    assert (said.task, said.subtask, said.text) == ("vqa.open", "yes/no", "yes")
    assert (no.choice, no.meta) == (1, {})
    assert yes.meta == {"topic": "abnormality"}


def test_a_letter_in_front_of_the_answer_is_no_disagreement(tmp_path: Path) -> None:
    row = [*ORGAN[:-2], "B. kidney.", "b."]
    table(tmp_path, "M3D_VQA_train.csv", ("000006", row))
    (entry,) = M3DVQA(root=tmp_path).entries()
    assert (entry.drafts[0].choice, entry.drafts[1].text) == (1, "Kidney")


BAD = {
    r"row 2: Answer Choice A is 'Liver', but the Answer is 'Kidney'": [*ORGAN[:-1], "A"],
    r"row 2: Answer Choice 'E' is none of A, B, C, D": [*ORGAN[:-1], "E"],
    r"row 2: Answer Choice 'C' is none of A, B": [*PHASE[:-1], "C"],
    r"row 2: Question Type '6' is none of 1 to 5": ["report", "6", *ORGAN[2:]],
    r"row 2: two choices are the same": [*ORGAN[:3], "kidney", *ORGAN[4:]],
    r"row 2: 1 choices": [*PHASE[:4], "nan", *PHASE[5:]],
    r"row 2: there is no Question": [*ORGAN[:2], " ", *ORGAN[3:]],
}


@pytest.mark.parametrize("said", BAD)
def test_a_row_that_cannot_be_used_is_an_error_with_its_number(tmp_path: Path, said: str) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", BAD[said]), ("000007", ORGAN))
    with pytest.raises(BadTable, match=rf"1 rows cannot be used: .*M3D_VQA_train.csv, {said}"):
        list(M3DVQA(root=tmp_path).entries())


def test_bad_rows_may_be_left_out_but_never_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = ("000006", [*ORGAN[:-1], "A"])
    table(tmp_path, "M3D_VQA_train.csv", bad, ("000007", ORGAN), bad, bad, bad)
    source = M3DVQA(root=tmp_path, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        assert [entry.image_id for entry in source.entries()] == ["ct_case-000007-Axial_C"]
    assert "4 rows cannot be used" in caplog.text and "(and 1 more)" in caplog.text
    assert [reason.split(": ")[0].split(", ")[1] for reason in source.rejected] == ["row 2", "row 4", "row 5", "row 6"]
    assert len(list(source.entries())) == 1 and len(source.rejected) == 4  # listing again does not add up


def test_bad_yes_no_rows(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_yn_train.csv", ("000006", ["4", "Is it?", "Perhaps", ""]), columns=YES_NO)
    with pytest.raises(BadTable, match="'Perhaps' is neither yes nor no"):
        list(M3DVQA(root=tmp_path).entries())
    columns = (*YES_NO, "Choice A", "Choice B")
    table(tmp_path, "M3D_VQA_yn_train.csv", ("000006", ["4", "Is it?", "Yes", "A", "No", "Yes"]), columns=columns)
    with pytest.raises(BadTable, match="Answer Choice A is 'No', but the Answer is 'Yes'"):
        list(M3DVQA(root=tmp_path).entries())


def test_an_image_asked_about_in_two_splits(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN), ("000007", ORGAN))
    table(tmp_path, "M3D_VQA_test.csv", ("000006", PHASE))
    with pytest.raises(BadTable, match=r"1 images \(ct_case-000006-Axial_C\)"):
        list(M3DVQA(root=tmp_path).entries())
    kept = {entry.image_id: entry.split for entry in M3DVQA(root=tmp_path, on_leak="drop").entries()}
    assert kept == {"ct_case-000006-Axial_C": "test", "ct_case-000007-Axial_C": "train"}


def test_dropping_a_leak_leaves_no_training_question_in_the_test(tmp_path: Path) -> None:
    table(tmp_path, "M3D_VQA_train.csv", ("000006", ORGAN))
    table(tmp_path, "M3D_VQA_test.csv", ("000006", PHASE))
    (entry,) = M3DVQA(root=tmp_path, on_leak="drop").entries()
    assert [draft.subtask for draft in entry.drafts] == ["phase", "phase"]


def test_no_tables(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no M3D_VQA_train.csv, _val, _test or _yn_train in it nor in M3D-VQA"):
        list(M3DVQA(root=tmp_path).entries())


# the reader of tables


def test_rows_are_numbered_as_a_spreadsheet_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfname , text\r\n a,"one\r\ntwo, ""three"""\r\n\r\nb,\xc3\xa9\xe2\x80\xa8x\r\n')
    assert list(read_csv(path, ("name", "text"))) == [
        (2, {"name": "a", "text": 'one\r\ntwo, "three"'}),
        (4, {"name": "b", "text": "é\u2028x"}),
    ]
    path.write_bytes("name\nö\n".encode("utf-16"))
    assert list(read_csv(path, ("name",))) == [(2, {"name": "ö"})]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"Image,Answer\n", "a header and no rows"),
        (b"Imgae,Answer\n1,2\n", r"no column 'Image'; did you mean 'Imgae'\? rename it"),
        (b"image,Answer\n1,2\n", r"no column 'Image'; did you mean 'image'\?"),
        (b"x,y\n1,2\n", "no column 'Image'; there are: x, y"),
        (b"Image,Answer,Image\n1,2,3\n", "the column 'Image' is there twice"),
        (b"Image,Answer\n1,2\n1,2,3\n", r"row 3: 3 cells under 2 columns"),
        (b'Image,Answer\n1,"2\n3\n', r"near line 3: .*is a double quote left open"),
        (b"Image,Answer\n1,\xff\xfe\n", r"a byte that is not UTF-8 text"),
        (b"PK\x03\x04abc", "a compressed file or a spreadsheet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    ],
)
def test_broken_tables_say_what_and_where(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "M3D.csv"
    path.write_bytes(content)
    with pytest.raises(BadTable, match=rf"M3D\.csv.*{said}"):
        list(read_csv(path, ("Image", "Answer")))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a\n" + "x" * 200_000 + "\n")
    assert len(next(read_csv(path, ("a",)))[1]["a"]) == 200_000


def test_a_missing_table_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "M3D_VQA_train.csv").write_text("a\n1\n")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'M3D_VQA_train.csv'\?"):
        read_json(tmp_path / "M3D_VQA_trian.csv")
    with pytest.raises(FileNotFoundError, match=r"nor its folder 'nowhere'"):
        list(read_csv(tmp_path / "nowhere" / "a.csv", ()))
