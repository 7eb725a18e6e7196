"""Masks and boxes are bound to the name said before them, in our words and in others."""

import pytest

from m3d.tasks.segmentation import join, named_masks, names_before


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "Here is the mandible [SEG], spinal cord [SEG] and left parotid [SEG].",
            ["mandible", "spinal cord", "left parotid"],
        ),
        ("Sure, it is [SEG].", [""]),
        ("It is liver, [SEG].", ["liver"]),
        ("There is no mandible in this scan.", []),
        ("I see no spleen. I have drawn the left lung [SEG] instead.", ["left lung"]),
        ("I have drawn the head and neck [SEG] and the aorta [SEG].", ["head and neck", "aorta"]),
        ("Look: the tumour, in the liver [SEG]", ["liver"]),
        ("[SEG][SEG]", ["", ""]),
        ("已勾画肝脏 [SEG]、左肾 [SEG]和右肾 [SEG]。", ["肝脏", "左肾", "右肾"]),
        ("", []),
    ],
)
def test_masks_are_bound_to_the_name_said_before_them(text, names):
    assert named_masks(text) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The liver is at <bx_start>[1]<bx_end>.", ["liver"]),
        (
            "The liver is at <bx_start>[1]<bx_end> and the left kidney at <bx_start>[2]<bx_end>.",
            ["liver", "left kidney"],
        ),
        ("You can find the large cyst at <bx_start>[1]<bx_end>.", ["large cyst"]),
        ("The coordinates of the kidneys are <bx_start>[1]<bx_end>.", ["kidneys"]),
        ("In this scan, <bx_start>[1]<bx_end> covers the liver.", [""]),
        ("<bx_start>[1]<bx_end> holds the liver.", [""]),
    ],
)
def test_boxes_are_bound_to_the_name_said_before_them(text, names):
    assert names_before(text, "<bx_start>") == names


def test_several_parts_are_one_phrase():
    assert [join(list("abc")[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert join(["甲", "乙", "丙"], comma="、", last="和") == "甲、乙和丙"
