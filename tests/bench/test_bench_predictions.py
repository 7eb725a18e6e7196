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
        ({"id": "a", "sight": "deaf"}, "sight 'deaf' is none of seeing, blind"),
        ({"id": "a", "boxes": [[0, 1]]}, "a box is six fractions"),
        ({"id": "a", "boxes": [["x"] * 6]}, "could not convert"),
        ({"id": "a", "masks": [{"name": "x", "soft": [1]}]}, "three sums"),
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


def test_parts_become_one_file_and_a_line_that_was_cut_off_is_dropped(tmp_path):
    for rank in (0, 1):
        part = Part(tmp_path, rank)
        part.add([Prediction(id=f"{rank}", text="first"), Prediction(id="both", text=f"of {rank}")])
        part.close()
    cut = tmp_path / "parts" / "0001.jsonl"
    cut.write_bytes(cut.read_bytes() + b'{"id": "cut", "te')
    assert sorted(gathered(tmp_path)) == [("0", "seeing"), ("1", "seeing"), ("both", "seeing")]
    part = Part(tmp_path, 1)  # another run goes on behind the last whole line
    part.add([Prediction(id="2")])
    part.close()
    found = gather(tmp_path)
    assert [json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == [
        "0", "1", "2", "both",
    ]  # fmt: skip
    assert found["both", "seeing"].text == "of 0" and not (tmp_path / "parts").exists()
    assert gathered(tmp_path) == found == gather(tmp_path)


def test_a_broken_line_of_a_whole_file_is_told_with_its_place(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"id": "a"}\n{"id": \n')
    with pytest.raises(ValueError, match=r"predictions.jsonl:2: not JSON"):
        gathered(tmp_path)
