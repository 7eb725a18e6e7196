"""What a text binds, and what is true of the mirrored picture."""

import pytest

from data_prep.laterality import (
    axis_of,
    bound_axes,
    mirrorable,
    mirrored,
    speaks_of_density,
    speaks_of_sides,
    strings_in,
    swap_sides,
)

PAIRS = [  # text and its mirror image, true both ways
    ("The left kidney is small.", "The right kidney is small."),
    ("Left parotid", "Right parotid"),
    ("LEFT LUNG NODULE", "RIGHT LUNG NODULE"),
    ("kidney_left", "kidney_right"),
    ("lung_upper_lobe_left", "lung_upper_lobe_right"),
    ("LeftParotid", "RightParotid"),
    ("ParotidLeft", "ParotidRight"),
    ("a left-sided effusion", "a right-sided effusion"),
    ("leftmost, shifted leftwards", "rightmost, shifted rightwards"),
    ("Is the lesion in the left or right?", "Is the lesion in the right or left?"),
    ("It lies left of the aorta.", "It lies right of the aorta."),
    ("nodule in the LLL", "nodule in the RLL"),
    ("RUL and RLL consolidation", "LUL and LLL consolidation"),
    ("pain in the RUQ", "pain in the LUQ"),
    ("lt. kidney, Rt lung", "rt. kidney, Lt lung"),
    ("LT KIDNEY", "RT KIDNEY"),
    ("Parotid_L", "Parotid_R"),
    ("femur_l", "femur_r"),
    ("L_kidney", "R_kidney"),
    ("L kidney larger than R kidney", "R kidney larger than L kidney"),
    ("Kidney L", "Kidney R"),
    ("Kidney (L)", "Kidney (R)"),
    ("Kidney-L", "Kidney-R"),
    ("kidney-l", "kidney-r"),
    ("lung-lower-lobe-L, cut", "lung-lower-lobe-R, cut"),
    ("kidney-l_cyst", "kidney-r_cyst"),
    ("L-kidney and R-Lung", "R-kidney and L-Lung"),
    ("effusion, L>R", "effusion, R>L"),
    ("mild dextroscoliosis", "mild levoscoliosis"),
    ("左肾较小、右肾正常", "右肾较小、左肾正常"),
    ("双肺、左侧为著", "双肺、右侧为著"),
    ("left kidney, left untreated", "right kidney, left untreated"),
]
UNSIDED = [
    "The spleen is large, right?",
    "Is it right that the spleen is enlarged?",
    "Is that right?",
    "right-angled reformats",
    "Look right here, right now.",
    "Is this the right answer, right or wrong?",
    "contrast is left over in the bowel, leftover barium",
    "What is left?",
    "How much of the liver is left after resection?",
    "The fracture was left untreated.",
    "The drain was left in place.",
    "a bright lesion in an upright patient",
    "a cleft palate",
    "BRIGHT SIGNAL",
    "bilateral effusions",
    "5 L of fluid, 20 mL, 3 mg/L",
    "L-spine, an L-shaped drain, R-CHOP, an R-wave, L-carnitine",
    "5-L of fluid, T12-L, right-angled",
    "disc L5-S1, post-RT, non-linear, half-life",
    "L4 and L5, disc L4/L5, T12-L1, L spine",
    "after RT the mass shrank; RT dose 50 Gy",
    "BMI &lt; 30, dextrose and levothyroxine",
    "约5mm左右",
    "The liver is normal.",
]


@pytest.mark.parametrize(("text", "other"), PAIRS)
def test_sides_are_heard_and_swapped_both_ways(text, other):
    assert speaks_of_sides(text)
    assert speaks_of_sides(other)
    assert mirrored(text) == other
    assert mirrored(other) == text


@pytest.mark.parametrize("text", UNSIDED)
def test_what_only_sounds_like_a_side_is_left_alone(text):
    assert not speaks_of_sides(text)
    assert mirrored(text) == text
    assert "R" not in bound_axes([text])


@pytest.mark.parametrize("text", ["collapse of the RML", "stenosis of the LAD", "situs inversus", "at 2 o'clock"])
def test_what_has_no_mirror_image_is_sided_and_refused(text):
    assert speaks_of_sides(text)
    assert not mirrorable(text)
    assert mirrorable("left lung")
    with pytest.raises(ValueError, match="no mirror image"):
        mirrored(text)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("The liver is normal.", ""),
        ("Follow-up of a nodule of 5 mm, bilateral.", ""),
        ("left kidney", "R"),
        ("on the lateral wall", "R"),
        ("a sagittal slice", "R"),
        ("anterior to the aorta", "A"),
        ("behind the trachea", "A"),
        ("at the front, not at the back", "A"),
        ("coronal plane", "A"),
        ("superior vena cava", "S"),
        ("lung_upper_lobe_right", "RS"),
        ("LungLowerLobe", "S"),
        ("an axial slice", "S"),
        ("Does the cord run down below the scan?", "S"),
        ("inferior and posterior", "AS"),
        ("RUQ", "RS"),
        ("at 2 o'clock", "RA"),
        ("位于胸主动脉前方", "A"),
        ("肝脏上方", "S"),
        ("冠状位", "A"),
        ("前列腺术后、目前以上情况", ""),
        ("左肺下叶", "RS"),
    ],
)
def test_bound_axes(text, axes):
    assert bound_axes([text]) == set(axes)


def test_bound_axes_of_many_texts_are_those_of_any():
    assert bound_axes(["left kidney", "anterior wall", "liver"]) == {"R", "A"}
    assert bound_axes([]) == frozenset()


def test_density():
    assert speaks_of_density("The mean is 45 HU.")
    assert speaks_of_density("-20 Hounsfield units")
    assert not speaks_of_density("a huge thumb")


def test_swap_sides_pairs_labels():
    names = {1: "brainstem", 3: "right parotid", 4: "left parotid", 9: "Left eye", 12: "Right Eye"}
    assert swap_sides(names) == {1: 1, 3: 4, 4: 3, 9: 12, 12: 9}


def test_sides_after_a_hyphen_pair_labels():
    assert swap_sides({1: "Kidney-L", 2: "Kidney-R", 3: "liver"}) == {1: 2, 2: 1, 3: 3}
    assert bound_axes(["Kidney-L"]) == {"R"}


def test_a_side_without_counterpart_cannot_be_swapped():
    with pytest.raises(ValueError, match="'left kidney' has no counterpart 'right kidney'"):
        swap_sides({1: "left kidney", 2: "liver"})


def test_axis_of():
    assert axis_of("SPL") == ("S", "A", "R")
    assert axis_of("RAI") == ("R", "A", "S")
    for nonsense in ("SPP", "SP", "XYZ", "SPLL"):
        with pytest.raises(ValueError, match="one each"):
            axis_of(nonsense)


def test_strings_in_nested_values():
    value = {"slots": {"objects": ["left eye", "lens"]}, "target": ({"name": "a"}, None, 3)}
    assert list(strings_in(value)) == ["left eye", "lens", "a"]
