"""How derived truth is worded: directions, plurals, names of several words, and the value where it is asked openly."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from data_prep.case import Case, layered
from data_prep.derived import derived_drafts
from data_prep.derived.scene import Scene
from data_prep.derived.wording import (
    about,
    among,
    choice_of,
    form,
    is_plural,
    listed,
    measured,
    millilitres,
    plural,
    ranges,
)
from data_prep.phantoms import NAMES, head_neck
from data_prep.volume import Volume

VOXEL, SIDE = 5.0, 40  # a world of 200 mm, its middle at the origin


def world(blocks, *, absent=(), **more):
    """A case of blocks given by name: (R from, to), (A from, to), (S from, to) in mm, HU."""
    at = (np.arange(SIDE) + 0.5) * VOXEL - VOXEL * SIDE / 2
    array = np.where(np.abs(at) < 90, 0.0, -1000.0)[:, None, None] * np.ones((SIDE,) * 3)
    masks = {}
    for name, (*spans, hu) in blocks.items():
        r, a, s = ((at > low) & (at < high) for low, high in spans)
        masks[name] = r[:, None, None] & a[None, :, None] & s[None, None, :]
        array[masks[name]] = hu
    labels, names = layered(masks | {name: np.zeros((SIDE,) * 3, bool) for name in absent})
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = at[0]
    return Case(id="w", patient_id="w", volume=Volume(array, affine), labels=labels, names=names, **more)


def text_of(case, kind):
    return derived_drafts(case, random.Random(0), kinds=[kind])[0].text


def glands(*, forward=0, up=0, noun="gland"):
    """Two glands of one size, the left one so many mm further forward and up."""
    return {
        f"right {noun}": ((40, 60), (0, 20), (0, 20), 10),
        f"left {noun}": ((-60, -40), (forward, forward + 20), (up, up + 20), 10),
    }


@pytest.mark.parametrize(
    ("forward", "up", "said"),
    [
        (0, 10, ["The left gland lies 10 mm higher than the right gland."]),
        (0, -15, ["The right gland lies 15 mm higher than the left gland."]),
        (20, 0, ["The left gland lies 20 mm further forward than the right gland."]),
        (-25, 0, ["The right gland lies 25 mm further forward than the left gland."]),
        (10, -30, ["The right gland lies 30 mm higher than the left gland.",
                   "The left gland lies 10 mm further forward than the right gland."]),
        (-10, 30, ["The left gland lies 30 mm higher than the right gland.",
                   "The right gland lies 10 mm further forward than the left gland."]),
        (0, 0, []),
    ],
)  # fmt: skip
def test_the_report_says_which_one_lies_higher_and_further_forward(forward, up, said):
    text = text_of(world(glands(forward=forward, up=up)), "report")
    assert [f"{one}." for one in text.removesuffix(".").split(". ") if " lies " in one] == said


@pytest.mark.parametrize(
    ("up", "said"),
    [
        (10, "The left gland lies 10 mm higher than the right gland."),
        (-15, "The right gland lies 15 mm higher than the left gland."),
        (5, None),  # not notable in a caption
    ],
)
def test_the_caption_says_which_one_lies_higher(up, said):
    text = text_of(world(glands(up=up)), "retrieval")
    assert (" higher " in text) == (said is not None)
    assert (said or "") in text


# a world of names that speak of several
MANY = {
    "lungs": ((-80, 80), (-20, 40), (20, 100), -700),  # run out at the top
    "kidneys": ((-60, 60), (-60, -40), (-20, 0), 30),  # 48 mL around (0, -50, -10)
    "costal cartilages": ((-60, 60), (70, 90), (-25, -5), 35),  # 48 mL
    "portal vein and splenic vein": ((-20, 20), (0, 20), (-15, -5), 45),  # 8 mL
    "left deep back muscles": ((-45, -15), (-95, -70), (-60, 0), 55),  # 45 mL around (-30, -82.5, -30)
    "right deep back muscles": ((15, 35), (-90, -70), (-80, -20), 50),  # 24 mL around (25, -80, -50)
    "vertebrae": ((-10, 10), (-60, -45), (-80, -40), 200),
    "tumor and edema": ((30, 45), (30, 45), (-50, -40), 50),
    "left rib 12": ((-70, -60), (-80, -70), (-60, -40), 300),
    "right rib 12": ((60, 80), (-80, -60), (-60, -40), 300),
}
GONE = ("ribs", "adrenal glands", "larynx")
OF_ONE = ("larynx", "left rib 12", "right rib 12")
VERBS = {"does": "do", "is": "are", "has": "have", "runs": "run", "lies": "lie", "measures": "measure"}


def mistakes(name):
    """Verbs of the wrong number before and after a name."""
    for one, many in VERBS.items():
        wrong = many if name in OF_ONE else one
        yield f"The {name} {wrong} "
        yield f"{wrong} the {name} "
        yield f"{wrong.title()} the {name} "
        yield f"here {wrong} no {name} "


def words_of(case, seeds=range(24)):
    """All that is said of a case, over some seeds."""
    for seed in seeds:
        for one in derived_drafts(case, random.Random(seed)):
            said = (one.text, *one.slots.values(), *(one.options or ()))
            yield from (word for word in said if isinstance(word, str))


def test_names_of_several_have_verbs_of_several():
    said = set(words_of(world(MANY, absent=GONE, complete=True)))
    everything = " | ".join(sorted(said))
    assert not [wrong for name in (*MANY, *GONE) for wrong in mistakes(name) if wrong in everything]
    for right in (
        "Do the lungs run out of the scan?",
        "Are the kidneys in this scan?",
        "Is the larynx in this scan?",
        "At which end do the lungs run out of the scan?",
        "On which side of the patient's midline do the tumor and edema lie?",
        "Which deep back muscles are larger?",
        "Which deep back muscles lie higher?",
        "Which deep back muscles lie closer to the vertebrae?",
        "The lungs run out of the scan",
        "There are no ribs in this scan.",
        "There is no larynx in this scan.",
        "The left deep back muscles are the larger ones.",
        "The right deep back muscles have 47 percent less volume than the left deep back muscles.",
        "The left deep back muscles lie 20 mm higher than the right deep back muscles.",
        "The left deep back muscles are 1.88 times as large as the right deep back muscles.",
        "The larger of the two groups of deep back muscles.",
        "The deep back muscles that lie higher.",
        "The kidneys measure 48 mL.",
    ):
        assert right in everything, right


def test_pairs_that_are_numbered_are_not_spoken_of_together():
    scene = Scene.of(world(MANY))
    assert set(scene.pairs) == {"deep back muscles"}
    assert set(scene.twins) == {"deep back muscles", "rib 12"}
    for words in words_of(scene.case):
        assert "ribs 12" not in words
        assert "rib 12 is the larger" not in words
        assert not ("left rib 12" in words and "right of the right rib 12" in words)


def test_touching_and_lasting_have_verbs_too():
    blocks = {
        "stones": ((0, 20), (0, 20), (0, 20), 50),
        "veins": ((20, 40), (0, 20), (0, 25), 50),  # touch the stones; 25 mm high, 20 wide
        "cyst": ((45, 60), (0, 20), (0, 20), 50),  # 5 mm beside the veins
    }
    said = set(words_of(world(blocks)))
    touch = {one for one in said if " touch " in one}
    assert "Do the stones touch the veins?" in touch
    assert {one.split()[0] for one in touch if " the cyst touch" in one} <= {"Does"}
    assert {one.split()[0] for one in touch if " touch the cyst" in one} == {"Do"}
    assert "In which direction do the veins extend furthest?" in said


def test_a_report_of_much_that_is_cut_says_it_together():
    many = {f"part {n}": ((r, r + 10), (-20, 20), (-100, -60), 50) for n, r in enumerate(range(-80, 80, 20))}
    many["hips"] = ((-80, 80), (-10, 10), (90, 100), 50)
    text = derived_drafts(world(many), random.Random(0), kinds=["report"])[0].text
    assert "The hips run out of the scan at the top." in text
    assert "The part 0, the part 1, the part 2, the part 3, the part 4, the part 5 and 2 more run out" in text


def test_a_place_that_two_structures_share_describes_neither():
    twins = {
        "aorta": ((-5, 5), (-90, -80), (-40, 40), 40),
        "one": ((-5, 5), (20, 40), (-10, 10), 40),  # 4 mL, 115 mm in front
        "two": ((-5, 5), (60, 80), (-10, 10), 40),  # the same, further on
    }
    texts = [str(one.slots.get("description")) for one in derived_drafts(world(twins), random.Random(0))]
    assert "in front of the aorta" not in " ".join(texts)
    alone = {name: block for name, block in twins.items() if name != "two"}
    texts = [str(one.slots.get("description")) for one in derived_drafts(world(alone), random.Random(0))]
    assert "The structure of about 4.0 mL in front of the aorta." in texts


def test_words():
    assert [plural(noun) for noun in ("parotid", "artery", "lens", "kidney", "upper lobe of lung", "rib 12")] == [
        "parotids", "arteries", "lenses", "kidneys", "upper lobes of lung", "ribs 12",
    ]  # fmt: skip
    assert plural("deep back muscles") == "deep back muscles"
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [about(value) for value in (0.434, 4.34, 25.3, 434.0, 1523.0)] == ["0.43", "4.3", "25", "430", "1500"]
    assert [millilitres(value) for value in (0.44, 4.96, 24.5, 25.5)] == ["0.4 mL", "5.0 mL", "24 mL", "26 mL"]
    assert ranges((10, 20), "mL") == ("less than 10 mL", "10 to 20 mL", "more than 20 mL")
    assert [choice_of(value, (10, 20)) for value in (9.99, 10, 19.9, 20)] == [0, 1, 1, 2]


def test_a_description_does_not_say_its_own_name():
    alone = [name for name in NAMES.values() if "parotid" not in name]
    for seed in (1, 2, 3):
        case = head_neck(seed, without=alone)
        for draft in derived_drafts(case, random.Random(seed), kinds=("rec", "seg")):
            if draft.subtask == "description" and (draft.boxes or draft.masks):
                (name,) = draft.boxes or draft.masks
                words = set(str(draft.slots["description"]).lower().replace(".", " ").replace(",", " ").split())
                assert not set(name.split()) <= words, draft


def test_a_scan_of_many_structures_asks_for_some_groups():
    cells = itertools.product(range(-80, 80, 40), range(-80, 80, 40), (0, 40))
    many = {
        f"part {n}": ((r, r + 10), (a, a + 10), (s, s + 10 + 5 * (n % 3)), 50.0) for n, (r, a, s) in enumerate(cells)
    }
    drafts = derived_drafts(world(many), random.Random(0))
    several = [one for one in drafts if one.subtask == "several"]
    assert len(several) == 4
    assert all(2 <= len(one.masks) <= 8 and list(one.masks) == one.slots["objects"] for one in several)
    assert max(Counter(one.subtask for one in drafts if one.task == "vqa.closed").values()) <= 4


def test_every_value_is_said_openly_and_in_ranges_when_closed():
    drafts = [one for one in derived_drafts(head_neck(4), random.Random(0), kinds=["vqa"]) if one.task == "vqa.open"]
    valued = [one for one in drafts if one.value is not None]
    assert {one.unit for one in valued} == {"mL", "mm", "HU", "%"}
    for one in valued:
        number, unit = one.text.split(" ")
        assert unit == one.unit.replace("%", "percent")
        assert abs(float(number) - one.value) <= 0.505
    assert not any(words in one.text for one in drafts for words in (" to 2", "less than", "more than"))


def test_which_names_are_of_several():
    several = ["lungs", "vertebrae", "vertebrae C1 to C7", "lobes of lung", "portal vein and splenic vein", "teeth",
               "lung tumours", "hematomas", "Hips"]  # fmt: skip
    one = ["pancreas", "uterus", "prostate or uterus", "left lens", "vertebra C1", "upper lobe of lung", "iliopsoas",
           "left biceps", "pelvis", "head of muscles", "rib 12", ""]  # fmt: skip
    assert [name for name in [*several, *one] if is_plural(name)] == several
    assert [form(name, "is", "are") for name in ("lungs", "lung")] == ["are", "is"]


def test_a_list_keeps_names_of_two_together():
    veins = "portal vein and splenic vein"
    assert listed(["liver", veins, "colon"]) == "liver, portal vein and splenic vein, and colon"
    assert among([veins, "liver"]) == "the portal vein and splenic vein, or the liver"
    assert among(["liver", "prostate or uterus"]) == "the liver, or the prostate or uterus"
    assert among(["liver", "left adrenal"]) == "the liver or the left adrenal"
    assert listed([]) == ""


def test_values_are_said_with_their_unit():
    said = [measured(*one) for one in ((66.6, "mL"), (4.26, "mL"), (-31.4, "HU"), (120.2, "mm"), (11.9, "%"))]
    assert said == ["67 mL", "4.3 mL", "-31 HU", "120 mm", "12 percent"]
    assert measured(-0.3, "HU") == "0 HU"
