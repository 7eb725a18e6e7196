"""Answers on disk: whole lines, of ours and of others, and none lost or kept twice."""

import json

import pytest

from m3d.bench.predictions import DrawnMask, Part, Prediction, gather, gathered, match_names


def test_a_line_is_read_as_it_was_written():
    masks = (DrawnMask(name="liver", file="masks/1.nii.gz", soft=(1.5, 2.0, 3.0)), DrawnMask(name="spleen"))
    said = Prediction(
        id="a/1", sight="blind", task="seg.sem", text="Leber \N{LATIN SMALL LETTER U WITH DIAERESIS}", masks=masks,
        boxes=((0.0, 0.1, 0.2, 1.0, 0.5, 0.4),), likelihoods=(-1.0, -2.5), failure="NoMask: x", seconds=0.5,
    )  # fmt: skip
    assert Prediction.from_row(json.loads(said.to_line()), "here") == said
    assert "prompt" not in json.loads(said.to_line())


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([1], "has the id of its record"),
        ({"text": "x"}, "has the id of its record"),
        ({"id": "a", "txt": "x"}, "unknown key 'txt'"),
        ({"id": "a", "sight": "deaf"}, "sight='deaf'"),
        ({"id": "a", "boxes": [[0, 1]]}, r"boxes\.0\.2=\[0, 1\]: Field required"),
        ({"id": "a", "boxes": [["x"] * 6]}, r"boxes\.0\.0='x'"),
        ({"id": "a", "boxes": [[float("nan")] * 6]}, r"boxes\.0\.0=nan: Input should be a finite number"),
        ({"id": "a", "likelihoods": [float("-inf")]}, r"likelihoods\.0=-inf"),
        ({"id": "a", "masks": [{"name": "x", "soft": [1]}]}, r"masks\.0\.soft"),
        ({"id": "a", "masks": ["a.nii.gz"]}, r"masks\.0='a\.nii\.gz'"),
        ({"id": "a", "failure": True}, "failure=True"),
        ({"id": "a", "failure": ""}, "failure=''"),
    ],
)
def test_what_is_no_prediction_is_refused_with_its_place(row, fault):
    with pytest.raises(ValueError, match=f"^file:3: .*{fault}"):
        Prediction.from_row(row, "file:3")


def test_another_systems_line_needs_an_id_and_what_it_says():
    assert Prediction.from_row({"id": "a/1", "text": None}, "here") == Prediction(id="a/1")
    assert Prediction.from_row({"id": "a/1", "text": "yes"}, "here").text == "yes"


@pytest.mark.parametrize(
    ("asked", "said", "expected"),
    [
        (["liver"], ["Liver "], [0]),
        (["liver", "spleen"], ["spleen", "liver"], [1, 0]),
        (["liver"], [], [None]),
        (["liver"], ["kidney"], [0]),  # under another name it still answers
        (["liver", "spleen"], ["liver"], [0, None]),
        (["liver", "spleen"], ["liver", "liver"], [1, None]),  # the last of a name; a second liver is no spleen
        (["liver", "spleen"], ["liver", "milt"], [0, 1]),
        (["a", "b"], ["x", "y"], [0, 1]),
    ],
)
def test_masks_answer_by_name_then_in_order(asked, said, expected):
    assert match_names(asked, said) == expected


def test_parts_become_one_file_and_a_line_that_was_cut_off_is_passed_over(tmp_path):
    parts = [Part(tmp_path, rank) for rank in (0, 1, 1)]  # two processes of one rank have a file each
    parts[0].add([Prediction(id="0", text="first"), Prediction(id="both", text="of 0")])
    parts[1].add([Prediction(id="1", text="first"), Prediction(id="both", text="of 1")])
    cut = next(path for path in (tmp_path / "parts").glob("0001-*.jsonl") if path.stat().st_size)
    with cut.open("ab") as file:
        file.write(b'{"id": "cut", "te')
    assert sorted(gathered(tmp_path)) == [("0", "seeing"), ("1", "seeing"), ("both", "seeing")]
    found = gather(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "both"] and found["both", "seeing"].text == "of 0"
    parts[0].add([Prediction(id="2")])  # gathering takes nothing from those that still write
    for part in parts:
        part.close()
    assert sorted(gathered(tmp_path)) == [("0", "seeing"), ("1", "seeing"), ("2", "seeing"), ("both", "seeing")]
    assert gather(tmp_path) == gathered(tmp_path) and len(list((tmp_path / "parts").iterdir())) == 2


def test_two_answers_to_a_question_in_one_file_are_refused(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"id": "a", "text": "1"}\n{"id": "a", "text": "2"}\n')
    with pytest.raises(ValueError, match=r"predictions.jsonl:2: 'a' \(seeing\) is answered twice"):
        gathered(tmp_path)


def test_a_broken_line_of_a_whole_file_is_told_with_its_place(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"id": "a"}\n{"id": \n')
    with pytest.raises(ValueError, match=r"predictions.jsonl:2: not JSON"):
        gathered(tmp_path)
