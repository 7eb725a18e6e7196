"""Answers that measure first: what they say, what is given to them, and how they are read back."""

import pytest

from data_prep.record import Evidence
from m3d.tasks.base import Rendered
from m3d.tasks.evidence import Asking, answer_of, asking, lettered, measure_first, value_words
from m3d.tasks.vqa import ClosedVQA, write_choices

LEFT = Evidence(measure="volume", names=("left parotid",), value=24.4, unit="mL")
RIGHT = Evidence(measure="volume", names=("right parotid",), value=22.0, unit="mL")
APART = Evidence(measure="distance", names=("left parotid", "right parotid"), value=117.6, unit="mm")
LENGTH = Evidence(measure="scan length", value=321.0, unit="mm")
SAID = Rendered("Which parotid is larger?", "A. left parotid")


def test_the_evidence_stands_before_the_answer_and_its_values_are_given():
    said = measure_first(SAID, [LEFT, RIGHT])
    assert said.answer == (
        "left parotid [SEG] volume: 24 mL; right parotid [SEG] volume: 22 mL. Answer: A. left parotid"
    )
    assert said.masks == ("left parotid", "right parotid")
    assert [said.answer[first:last] for first, last in said.given] == [" 24 mL", " 22 mL"]


def test_masks_of_the_answer_itself_come_after_those_of_the_evidence():
    said = measure_first(Rendered("Draw it.", "Here is the mandible [SEG].", ("mandible",)), [LENGTH, APART])
    assert said.answer == (
        "scan length: 321 mm; left parotid [SEG], right parotid [SEG] distance: 118 mm. "
        "Answer: Here is the mandible [SEG]."
    )
    assert said.masks == ("left parotid", "right parotid", "mandible")


@pytest.mark.parametrize(
    "wrong",
    [{"measure": "weight"}, {"names": ()}, {"names": ("left parotid", "liver")}, {"unit": "mm"}],
)
def test_what_nothing_could_measure_at_use_is_not_taught(wrong):
    with pytest.raises(ValueError, match=r"is no measure of ours; prepare its store again\? known: scan length"):
        measure_first(SAID, [RIGHT, LEFT.model_copy(update=wrong)])


def test_where_nothing_is_seen_the_values_say_so():
    said = measure_first(SAID, [LEFT], seen=False)
    assert said.answer == "left parotid [SEG] volume: not seen. Answer: A. left parotid"
    assert value_words(Asking("volume", ("liver",)), None) == "not seen"


@pytest.mark.parametrize(
    ("measure", "names", "value", "words"),
    [
        ("volume", ("a",), 24.4, "24 mL"),
        ("density", ("a",), -31.4, "-31 HU"),
        ("larger", ("a", "b"), 12.4, "a by 12 percent"),
        ("larger", ("a", "b"), -12.4, "b by 12 percent"),
        ("denser", ("a", "b"), -7.0, "b by 7 HU"),
        ("higher", ("a", "b"), 0.0, "a by 0 mm"),
        ("closer", ("a", "b", "c"), -3.6, "b by 4 mm"),
    ],
)
def test_a_comparison_names_its_answer(measure, names, value, words):
    assert value_words(Asking(measure, names), value) == words


@pytest.mark.parametrize("evidence", [[LEFT], [LEFT, RIGHT], [LENGTH], [APART, LEFT], [LENGTH, APART, RIGHT]])
def test_an_answer_asks_for_each_measure_at_its_place_and_nowhere_else(evidence):
    said = measure_first(SAID, evidence)
    places = [first for first, _ in said.given]
    assert [asking(said.answer[:place]) for place in places] == [Asking(one.measure, one.names) for one in evidence]
    others = set(range(len(said.answer) + 1)) - set(places)
    assert not any(asking(said.answer[:place]) for place in others)


@pytest.mark.parametrize(
    "text",
    [
        "left parotid volume:",  # without a mask
        "left parotid [SEG] distance:",  # of one structure
        "left parotid [SEG], right parotid [SEG] volume:",  # of two
        "[SEG] volume:",  # of no name
        "left parotid [SEG] weight:",
        "left parotid [SEG] volume",
        "left parotid [SEG] of the volume:",
        "The volume:",
        "",
        "left parotid [SEG] volume: 24 mL. Answer: The liver: a [SEG], b [SEG] distance:",  # the answer is given
    ],
)
def test_what_cannot_be_measured_is_not_asked_for(text):
    assert asking(text) is None


def test_evidence_and_answer_are_told_apart():
    said = measure_first(SAID, [LEFT, RIGHT])
    assert answer_of(said.answer) == (
        "left parotid [SEG] volume: 24 mL; right parotid [SEG] volume: 22 mL", "A. left parotid"
    )  # fmt: skip
    broken = said.answer[: said.answer.index(" Answer")]
    assert answer_of(broken)[0] == broken.removesuffix(".") and answer_of(broken)[1] == ""
    assert answer_of("left parotid [SEG] volume:") == ("left parotid [SEG] volume:", "")
    for text in ("A. left parotid", "The answer is A.", "Answer: A.", "It is so. Answer: A."):
        assert answer_of(text) == ("", text)


def test_a_closed_question_is_read_with_and_without_its_evidence():
    said = measure_first(SAID, [LEFT, RIGHT])
    options = ("left parotid", "right parotid")
    assert ClosedVQA().parse(said.answer, None, options=options) == 0
    assert ClosedVQA().parse(answer_of(said.answer)[1], None, options=options) == 0


def test_a_choice_is_said_in_words_before_its_letter():
    said = measure_first(Rendered("Which?", "B. right parotid", chosen="right parotid"), [LEFT, RIGHT])
    assert said.answer.endswith(", so right parotid. Answer: B. right parotid")
    assert answer_of(said.answer)[1] == "B. right parotid"
    assert said.answer[said.given[-1][1] :].startswith(", so ")  # it is the model's to say
    assert asking(said.answer[: said.answer.index(", so")]) is None


def test_what_is_no_measure_is_neither_asked_nor_taught():
    before = Evidence(measure="higher by", names=("left parotid", "right parotid"), value=-8.0, unit="mm")
    assert asking("left parotid [SEG], right parotid [SEG] higher by:") is None
    with pytest.raises(ValueError, match="prepare its store again"):
        measure_first(SAID, [before])


def test_the_letter_of_a_choice_is_that_of_the_words_said_before():
    prompt = write_choices("Which is larger, A. or B.?", ["larynx", "left parotid", "left parotid gland"])
    before = "larynx [SEG], left parotid [SEG] larger: left parotid by 3 percent"
    assert lettered("A. left parotid", f"{before}, so left parotid", prompt) == "B. left parotid"
    assert lettered("B. left parotid", f"{before}, so left parotid", prompt) == "B. left parotid"
    assert lettered("A. larynx", f"{before}, so left parotid gland", prompt) == "C. left parotid gland"
    for answer, evidence, asked in (
        ("A. larynx", before, prompt),  # nothing was said before
        ("A. larynx", f"{before}, so parotid", prompt),  # no option
        ("A. larynx", f"{before}, so larynx", write_choices("Which?", ["larynx", "larynx"])),  # two
        ("left parotid", f"{before}, so larynx", prompt),  # no letter was chosen
        ("about 3 mL", f"{before}, so 3 mL", "How large?"),
    ):
        assert lettered(answer, evidence, asked) == answer
