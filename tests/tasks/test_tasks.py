"""What every task asks, answers and reads back."""

import random

import pytest

from data_prep.boxes import Box
from data_prep.record import Record
from m3d.tasks import TASKS, render
from m3d.tasks.base import templates
from m3d.tasks.codecs import Frac3
from m3d.tasks.segmentation import named_masks, names_before


def record(task: str, **fields: object) -> Record:
    return Record(id="r", image_id="i", patient_id="p", task=task, **fields)


BOX = Box(lo=(0.0, 0.25, 0.5), hi=(0.5, 0.75, 1.0), frame="norm", name="liver")
TEXT = "<bx_start>[0.000, 0.250, 0.500, 0.500, 0.750, 1.000]<bx_end>"
CASES = {
    "report": (record("report", target={"text": "Normal."}), "Write a report of this scan.", "Normal."),
    "vqa.open": (record("vqa.open", slots={"question": "Which?"}, target={"text": "Left."}), "Which?", "Left."),
    "vqa.closed": (
        record("vqa.closed", slots={"question": "Which?"}, target={"options": ["left", "right"], "choice": 1}),
        "Which? Choices: A. left B. right",
        "B. right",
    ),
    "rec.box3d": (
        record("rec.box3d", slots={"object": "liver"}, target={"boxes": [BOX]}),
        "Where is the liver?",
        f"The liver is at {TEXT}.",
    ),
    "absent box": (
        record("rec.box3d", slots={"object": "liver"}, target={"boxes": []}),
        "Where is the liver?",
        "There is no liver in this scan.",
    ),
    "reg": (record("reg", target={"boxes": [BOX]}), f"What is at {TEXT}?", "It is the liver."),
    "seg.sem": (
        record(
            "seg.sem", slots={"objects": ["liver", "spleen"]}, target={"masks": [{"name": "liver"}, {"name": "spleen"}]}
        ),
        "Segment the liver and the spleen.",
        "Here is the liver [SEG] and spleen [SEG].",
    ),
    "absent mask": (
        record("seg.sem", slots={"objects": ["liver", "spleen"]}, target={"masks": [{"name": "spleen"}]}),
        "Segment the liver and the spleen.",
        "Here is the spleen [SEG]. There is no liver in this scan.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_evaluation_wording_is_fixed(name):
    given, prompt, answer = CASES[name]
    said = render(TASKS, given, codec=Frac3())
    assert (said.prompt, said.answer) == (prompt, answer)
    assert said.answer.count("[SEG]") == len(said.masks)


def test_training_wording_varies_and_repeats_by_seed():
    given = CASES["rec.box3d"][0]
    prompts = [render(TASKS, given, codec=Frac3(), rng=random.Random(seed)).prompt for seed in range(40)]
    assert len(set(prompts)) == len(templates("en")["rec.box3d"]["prompt"])
    again = [render(TASKS, given, codec=Frac3(), rng=random.Random(seed)).prompt for seed in range(40)]
    assert prompts == again


def test_masks_are_bound_to_the_name_said_before_them():
    assert named_masks("Here is the mandible [SEG], spinal cord [SEG] and left parotid [SEG].") == [
        "mandible",
        "spinal cord",
        "left parotid",
    ]
    assert named_masks("Sure, it is [SEG].") == [""]
    assert named_masks("There is no mandible in this scan.") == []
    assert names_before(f"The liver is at {TEXT}.", "<bx_start>") == ["liver"]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B. right", 1),
        ("(C) three", 2),
        ("A", 0),
        ("All of it", None),
        ("b. right", None),
        ("", None),
        ("MRA. x", None),
    ],
)
def test_choice_is_the_letter_that_the_answer_begins_with(text, choice):
    assert TASKS["vqa.closed"].parse(text, Frac3()) == choice


def test_unknown_task_and_language_are_named():
    with pytest.raises(KeyError, match=r"unknown name 'seg\.magic'"):
        render(TASKS, record("seg.magic"), codec=Frac3())
    with pytest.raises(FileNotFoundError, match="no templates for lang='xx'"):
        render(TASKS, CASES["report"][0], codec=Frac3(), lang="xx")
