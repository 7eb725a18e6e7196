"""Measures by hand, on blocks of known mm, and the evidence that derived questions bring along."""

import random

import pytest

from data_prep.derived import derived_drafts
from data_prep.derived.measures import MEASURES, evidence_of, measure
from data_prep.derived.scene import Scene
from data_prep.derived.wording import measured
from data_prep.draft import Measured
from tests.data_prep.test_derived_questions import BELLY, HEAD, world

LEFT, RIGHT = "left parotid", "right parotid"


@pytest.mark.parametrize(
    ("name", "structures", "value"),
    [
        ("scan length", (), 200),
        ("volume", ("brainstem",), 24),
        ("density", ("mandible",), 700),
        ("width", (RIGHT,), 30),
        ("depth", (RIGHT,), 40),
        ("height", (RIGHT,), 50),
        ("below the top", ("brainstem",), 22.5),  # the middle of 35 to 75 mm is 45 mm below the top, at 100 mm
        ("distance", ("brainstem", "spinal cord"), (20**2 + 67.5**2) ** 0.5),
        ("larger", (LEFT, RIGHT), -100 * (60 - 28) / 60),
        ("larger", (RIGHT, LEFT), 100 * (60 - 28) / 60),
        ("denser", ("mandible", "brainstem"), 700 - 30),
        ("higher", (LEFT, RIGHT), 10),
        ("further forward", (LEFT, RIGHT), 7.5),
        ("further right", (LEFT, RIGHT), -115),
        ("further left", (LEFT, RIGHT), 115),
        (
            "closer",
            ("brainstem", LEFT, "spinal cord"),
            (60**2 + 52.5**2 + 22.5**2) ** 0.5 - (20**2 + 67.5**2) ** 0.5,
        ),
    ],
)
@pytest.mark.parametrize("codes", ["RAS", "SPL"])
def test_measures_by_hand(name, structures, value, codes):
    assert measure(Scene.of(world(HEAD, orientation=codes)), name, structures) == pytest.approx(value)


def test_what_is_not_there_or_not_known_gives_nothing():
    scene = Scene.of(world(HEAD))
    assert measure(scene, "volume", ("liver",)) is None
    assert evidence_of(scene, [("volume", (LEFT,)), ("volume", ("liver",))]) is None
    assert evidence_of(scene, []) is None
    unplaced = Scene.of(world(HEAD, placed=False))
    assert measure(unplaced, "volume", (LEFT,)) is None and measure(unplaced, "scan length", ()) is None
    assert measure(Scene.of(world(HEAD, unit="norm01")), "density", (LEFT,)) is None


def test_wrong_numbers_and_names_are_refused():
    scene = Scene.of(world(HEAD))
    with pytest.raises(ValueError, match="distance is measured of 2 structures, not of brainstem"):
        measure(scene, "distance", ("brainstem",))
    with pytest.raises(KeyError):
        measure(scene, "weight", (LEFT,))


@pytest.mark.parametrize("blocks", [HEAD, BELLY], ids=["head", "belly"])
def test_the_answer_of_a_question_with_a_value_is_its_evidence(blocks):
    """Of one measure, the answer is its words; of several of one kind, it is at one end of their order."""
    seen = set()
    for seed in range(8):
        for one in derived_drafts(world(blocks), random.Random(seed), kinds=("vqa",)):
            if one.evidence is None:
                continue
            seen.add(one.subtask)
            assert all(MEASURES[each.measure].unit == each.unit for each in one.evidence)
            if one.value is not None:
                (only,) = one.evidence
                assert one.value == (abs(only.value) if one.subtask == "asymmetry" else only.value)
                if one.task == "vqa.open":
                    assert one.text == measured(one.value, only.unit)
            elif one.task == "vqa.closed":
                answer = one.options[one.choice]
                if len(one.evidence) == len(one.options):
                    values = [each.value for each in one.evidence]
                    end = min if one.subtask == "smallest" else max
                    chosen = one.evidence[values.index(end(values))]
                    extents = {"width": "left to right", "depth": "front to back", "height": "top to bottom"}
                    assert answer == extents.get(chosen.measure, chosen.names[0])
                else:
                    (compared,) = one.evidence
                    assert MEASURES[compared.measure].compares
                    said = MEASURES[compared.measure].said(compared.value, compared.names)
                    assert said.startswith(f"{answer} by ")  # it names the answer
                    if one.subtask == "sideways":
                        assert f"patient's {compared.measure.removeprefix('further ')}" in one.slots["question"]
    assert {"volume", "distance", "higher", "denser"} <= seen or {"denser", "height"} <= seen


def test_a_report_brings_all_that_its_sentences_rest_on():
    (report,) = derived_drafts(world(HEAD), random.Random(0), kinds=("report",))
    assert Measured("volume", ("mandible",), 144.0, "mL") in report.evidence
    assert Measured("higher", (LEFT, RIGHT), 10.0, "mm") in report.evidence
    assert "The left parotid lies 10 mm higher than the right parotid." in report.text
    offset = Measured("further right", ("brainstem", "mandible"), -5.0, "mm")
    assert offset in report.evidence and "lies 5 mm to the left of that of the mandible" in report.text
    small = Measured("further right", ("brainstem", "spinal cord"), 0.0, "mm")
    assert small in report.evidence  # measured, and too small for a sentence
