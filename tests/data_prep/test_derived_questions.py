"""Derived truth whose answers are worked out by hand: blocks of known mm in a body of known width."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data_prep.case import Case, layered
from data_prep.derived import KINDS, derived_drafts, facts
from data_prep.derived import quarters as quarters_of
from data_prep.derived.places import counterparts, direction, distance_mm, touching
from data_prep.derived.questions import FAMILIES, questions
from data_prep.derived.scene import Scene
from data_prep.derived.wording import about
from data_prep.laterality import mirrored
from data_prep.phantoms import NAMES
from data_prep.volume import Volume

VOXEL = 5.0  # mm; the world is 200 mm wide, deep and high, its middle at the origin
# name: (R from, to), (A from, to), (S from, to) in mm, HU


HEAD = {
    "brainstem": ((-10, 10), (-40, -10), (35, 75), 30),  # 24 mL around (0, -25, 55)
    "spinal cord": ((-5, 5), (-50, -40), (-60, 35), 40),  # 9.5 mL around (0, -45, -12.5)
    "right parotid": ((40, 70), (-20, 20), (-25, 25), 0),  # 60 mL around (55, 0, 0)
    "left parotid": ((-70, -50), (-10, 25), (-10, 30), 10),  # 28 mL around (-60, 7.5, 10)
    "esophagus": ((-10, 10), (-20, 0), (-90, -60), 20),  # 12 mL around (0, -10, -75)
    "larynx": ((-10, 20), (10, 45), (-60, -30), -200),  # 31.5 mL around (5, 27.5, -45)
    "mandible": ((-55, 65), (50, 80), (-30, 10), 700),  # 144 mL around (5, 65, -10)
}
# overlapping (the tumor lies in the liver), touching, and out of the scan at its lower end


BELLY = {
    "liver": ((20, 70), (-20, 30), (0, 60), 60),  # 150 mL around (45, 5, 30)
    "tumor": ((40, 50), (0, 10), (20, 40), 40),  # 2 mL around (45, 5, 30)
    "stomach": ((-50, 20), (-10, 30), (10, 50), 45),  # 112 mL around (-15, 10, 30), beside the liver
    "pancreas": ((-30, 10), (-60, -25), (0, 30), 35),  # 42 mL around (-10, -42.5, 15), 15 mm behind the stomach
    "left ovary": ((-60, -30), (-60, -30), (-60, 0), 30),  # 54 mL around (-45, -45, -30)
    "right ovary": ((30, 55), (-80, -40), (-70, -20), 30),  # 50 mL around (42.5, -60, -45)
    "colon": ((-20, 25), (0, 30), (-100, -80), 5),  # 27 mL, cut
}


def world(blocks, *, orientation="RAS", absent=(), wide=90, **more):
    """A case of blocks: painted on a RAS grid, then turned to ``orientation``."""
    side = round(200 / VOXEL)
    at = (np.arange(side) + 0.5) * VOXEL - 100
    array = np.where(np.abs(at) < wide, 0.0, -1000.0)[:, None, None] * np.ones((side,) * 3)
    masks = {}
    for name, (*spans, hu) in blocks.items():
        inside = [(at > low) & (at < high) for low, high in spans]
        masks[name] = inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]
        array[masks[name]] = hu
    labels, names = layered(masks | {name: np.zeros((side,) * 3, bool) for name in absent})
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = at[0]
    array, labels, affine = turned(array, labels, affine, orientation)
    labels = labels[0] if len(labels) == 1 else labels
    return Case(id="w", patient_id="w", volume=Volume(array, affine), labels=labels, names=names, **more)


def turned(array, labels, affine, codes):
    """The same patient with the array axes running to ``codes``."""
    along = ["RL", "AP", "SI"]
    order = [next(axis for axis, pair in enumerate(along) if code in pair) for code in codes]
    array, labels = array.transpose(order), labels.transpose(0, *(axis + 1 for axis in order))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = affine[:3, order], affine[:3, 3]
    for axis, code in enumerate(codes):
        if code in "LPI":
            array, labels = np.flip(array, axis), np.flip(labels, axis + 1)
            matrix[:3, 3] += matrix[:3, axis] * (array.shape[axis] - 1)
            matrix[:3, axis] *= -1
    return array, labels, matrix


def asked(case, family, seeds=range(12)):
    """What a family asks and answers, over some seeds, so that draws do not hide a question."""
    found, scene = {}, Scene.of(case)
    for seed in seeds:
        for one in questions(scene, random.Random(seed)):
            if one.subtask == family:
                assert found.setdefault(one.text, one.options[one.choice]) == one.options[one.choice]
    return found


HAND = {
    "larger": {"Which parotid is larger?": "right parotid"},
    "volume": {
        "How large is the mandible?": "more than 75 mL",
        "How large is the brainstem?": "20 to 25 mL",
        "How large is the right parotid?": "more than 30 mL",
        "How large is the left parotid?": "22 to 30 mL",
        "How large is the larynx?": "24 to 33 mL",
    },
    "length": {"How long is the scan from top to bottom?": "180 to 240 mm"},
    "asymmetry": {  # (60 - 28) / 60
        "By how many percent of the larger one do the parotids differ in volume?": "more than 17 %"
    },
    "longest": {"In which direction does the larynx extend furthest?": "front to back"},
    "higher": {"Which parotid lies higher?": "left parotid"},
    "forward": {"Which parotid lies further forward?": "left parotid"},
    # from (0, -45, -12.5): 72.2 mm to (55, 0, 0), 82.8 mm to (-60, 7.5, 10)
    "closer": {"Which parotid lies closer to the spinal cord?": "right parotid"},
    "density": {
        "How dense is the mandible on average, in HU?": "640 to 710 HU",
        "How dense is the right parotid on average, in HU?": "-18 to 5 HU",
        "How dense is the left parotid on average, in HU?": "0 to 23 HU",
        "How dense is the larynx on average, in HU?": "-230 to -180 HU",
    },
}


@pytest.mark.parametrize("family", HAND)
def test_answers_by_hand(family):
    assert asked(world(HEAD), family) == HAND[family]


EXTENTS = {
    ("wide", "right parotid"): "less than 31 mm",  # 30
    ("deep", "right parotid"): "37 to 42 mm",  # 40
    ("tall", "right parotid"): "47 to 52 mm",  # 50
    ("wide", "mandible"): "113 to 121 mm",  # 120
    ("tall", "larynx"): "27 to 35 mm",  # 30
    ("deep", "brainstem"): "28 to 31 mm",  # 30
    ("tall", "left parotid"): "less than 46 mm",  # 40
}


DISTANCES = {
    ("left parotid", "right parotid"): "111 to 118 mm",  # (115, 7.5, 10): 115.7
    ("brainstem", "larynx"): "less than 116 mm",  # (5, 52.5, 100): 113.1
    ("larynx", "mandible"): "less than 67 mm",  # (0, 37.5, 35): 51.3
    ("left parotid", "larynx"): "less than 91 mm",  # (65, 20, 55): 87.5
    ("brainstem", "mandible"): "more than 93 mm",  # (5, 90, 65): 111.1
}


HEIGHTS = {  # (100 - S) / 200
    "brainstem": "20 to 25 %",  # 22.5
    "right parotid": "more than 39 %",  # 50
    "mandible": "more than 42 %",  # 55
    "larynx": "more than 62 %",  # 72.5
}


def test_extents_distances_and_heights_by_hand():
    case = world(HEAD)
    extents, distances, heights = (asked(case, one, range(40)) for one in ("extent", "distance", "height"))
    for (how, name), answer in EXTENTS.items():
        assert [given for text, given in extents.items() if f"How {how} is the {name} " in text] == [answer]
    for pair, answer in DISTANCES.items():
        assert [given for text, given in distances.items() if all(name in text for name in pair)] == [answer]
    for name, answer in HEIGHTS.items():
        assert [given for text, given in heights.items() if f"the {name}," in text] == [answer]


def answers_by_names(case, family, *names):
    """The answers to a family's questions that name all of these."""
    return {given for text, given in asked(case, family, range(40)).items() if all(name in text for name in names)}


def test_comparisons_by_hand():
    case = world(HEAD)
    assert answers_by_names(case, "comparison", "brainstem", "right parotid") == {"right parotid"}
    assert answers_by_names(case, "comparison", "left parotid", "larynx") == {"larynx"}  # 28 and 31.5 mL
    assert not answers_by_names(case, "comparison", "mandible")  # the largest in everybody
    four = ("brainstem", "right parotid", "left parotid", "larynx")
    assert answers_by_names(case, "largest", *four) == {"right parotid"}
    assert answers_by_names(case, "smallest", *four) == {"brainstem"}
    assert answers_by_names(case, "denser", "esophagus", "right parotid") == {"esophagus"}
    assert answers_by_names(case, "denser", "spinal cord", "brainstem") == {"spinal cord"}


def test_sideways_by_hand():
    case = world(HEAD)
    everything = asked(case, "sideways", range(60))
    for one, other in (("larynx", "brainstem"), ("mandible", "brainstem"), ("larynx", "spinal cord")):
        found = {text: given for text, given in everything.items() if one in text and other in text}
        assert {given for text, given in found.items() if "patient's right" in text} == {one}  # at R 5, the other at 0
        assert {given for text, given in found.items() if "patient's left" in text} == {other}
    assert not answers_by_names(case, "sideways", "larynx", "mandible")  # both at R 5


def test_other_regions_are_compared_where_nothing_was_measured():
    case = world(BELLY)
    assert asked(case, "larger") == {}  # the ovaries differ by 7 %
    assert asked(case, "higher") == {"Which ovary lies higher?": "left ovary"}
    assert asked(case, "forward") == {"Which ovary lies further forward?": "left ovary"}
    assert asked(case, "volume") == asked(case, "extent") == asked(case, "density") == asked(case, "distance") == {}
    assert answers_by_names(case, "comparison", "liver", "stomach") == {"liver"}  # 150 and 112 mL
    assert answers_by_names(case, "comparison", "tumor") == set()  # told by anatomy
    assert answers_by_names(case, "denser", "stomach", "pancreas") == {"stomach"}
    assert answers_by_names(case, "height", "liver") == {"33 to 67 %"}  # 35
    assert asked(case, "side") == {"On which side of the patient's midline does the tumor lie?": "right"}
    assert asked(case, "edge") == {"At which end does the colon run out of the scan?": "bottom"}


def test_what_textbooks_answer_is_not_asked():
    renamed = {
        "left ovary": "left kidney", "right ovary": "right kidney", "liver": "vertebra L1", "stomach": "vertebra L2",
        "colon": "left femur",
    }  # fmt: skip
    case = world({renamed.get(name, name): block for name, block in BELLY.items()})
    assert asked(case, "higher") == asked(case, "forward") == asked(case, "edge") == {}
    assert answers_by_names(case, "comparison", "vertebra L1", "vertebra L2") == set()
    lungs = world({"left lung": ((-60, -20), (0, 40), (0, 40), -800), "right lung": ((20, 80), (0, 40), (0, 50), -800)})
    assert asked(lungs, "larger") == {}
    assert answers_by_names(world(BELLY), "sideways", "pancreas") == set()


def test_vertebrae_of_a_bent_spine_are_compared():
    spine = {
        "vertebra L1": ((-20, 20), (-60, -30), (30, 60), 200),
        "vertebra L2": ((-10, 30), (-60, -30), (-5, 25), 200),
    }
    assert set(asked(world(spine), "sideways", range(40)).items()) == {
        (f"Which has its centre further to the patient's {side}, the vertebra {one} or the vertebra {other}?", given)
        for side, given in (("right", "vertebra L2"), ("left", "vertebra L1"))
        for one, other in (("L1", "L2"), ("L2", "L1"))
    }
    kidneys = {
        "left kidney": ((-70, -40), (-60, -30), (0, 60), 30),
        "right kidney": ((30, 60), (-60, -30), (0, 60), 30),
    }
    case = world(spine | kidneys)  # around R -55, 45 and, of the spine, 0 and 10
    assert asked(case, "closer", range(40))["Which kidney lies closer to the vertebra L2?"] == "right kidney"


def test_touching_is_asked_as_often_as_not_touching():
    case = world(BELLY)
    assert touching(case) == {frozenset(pair) for pair in (("liver", "tumor"), ("liver", "stomach"))}
    stacked = BELLY | {"spleen": ((-90, -65), (-60, -30), (-60, 0), 50)}  # 5 mm from the left ovary: no contact
    for seed in range(5):
        given = [one for one in questions(Scene.of(world(stacked)), random.Random(seed)) if one.subtask == "touch"]
        assert Counter(one.options[one.choice] for one in given) in ({"yes": 1, "no": 1}, {"yes": 2, "no": 2})
        for one in given:
            yes = "liver" in one.text and ("stomach" in one.text or "tumor" in one.text)
            assert one.options[one.choice] == ("yes" if yes else "no")


def test_what_is_missing_is_asked_only_where_labels_are_complete():
    case = world(HEAD, absent=("thyroid", "trachea"), complete=True)
    assert set(asked(case, "missing").values()) == {"thyroid", "trachea"}
    for text, given in asked(case, "present").items():
        assert given == ("no" if "thyroid" in text or "trachea" in text else "yes")
    for text, given in asked(case, "count").items():
        assert int(given) == 4 - ("thyroid" in text) - ("trachea" in text)
    assert asked(case, "cut") == {"Does the spinal cord run out of the scan?": "no"}
    longer = HEAD | {"spinal cord": ((-5, 5), (-50, -40), (-100, 35), 40)}
    assert asked(world(longer, complete=True), "cut") == {"Does the spinal cord run out of the scan?": "yes"}


def test_an_incomplete_case_denies_nothing():
    case = world(HEAD, absent=("thyroid",))
    for draft in derived_drafts(case, random.Random(0)):
        assert draft.subtask not in ("cut", "missing", "present", "count")
        assert draft.boxes != () and draft.masks != ()
        assert "thyroid" not in str(draft)
        assert "no " not in (draft.text or "")


def test_a_complete_case_says_what_is_not_there():
    drafts = derived_drafts(world(HEAD, absent=("trachea",), complete=True), random.Random(0))
    assert "There is no trachea in this scan." in next(one.text for one in drafts if one.task == "report")
    empty = [one for one in drafts if () in (one.boxes, one.masks)]
    assert {one.task for one in empty} == {"rec.box3d", "seg.sem", "seg.ref"}
    assert {str(one.slots["object"]) for one in empty if "object" in one.slots} == {"trachea"}
    assert "It shows no trachea." in next(one.text for one in drafts if one.task == "retrieval")


NEEDS_PLACE = {"volume", "length", "extent", "longest", "higher", "forward", "sideways", "closer", "distance", "height",
               "side", "edge"}  # fmt: skip


@pytest.mark.parametrize("blocks", [HEAD, BELLY])
def test_an_unplaced_case_gives_nothing_in_mm_and_an_uncalibrated_one_nothing_in_hu(blocks):
    case = world(blocks, absent=("trachea",), complete=True, source={"region": "abdomen"})
    lost = derived_drafts(replace(case, placed=False), random.Random(0))
    assert {one.task for one in lost} == {one.task for one in derived_drafts(case, random.Random(0))}
    for one in lost:
        words = f"{one.text} {one.options} {dict(one.slots)} {one.unit}"
        if dict(one.meta).get("description") != "terms":  # what everybody's anatomy is may be said in mm
            assert not any(unit in words for unit in (" mm", " mL", "percent of the scan")), words
        assert one.subtask not in NEEDS_PLACE
    for one in derived_drafts(replace(case, unit="arbitrary"), random.Random(0)):
        assert one.subtask not in ("density", "denser")
        assert one.unit != "HU"
    assert next(one.text for one in lost if one.task == "report").startswith("Abdomen CT. ")


@pytest.mark.parametrize("blocks", [HEAD, BELLY])
@pytest.mark.parametrize("codes", ["PLI", "SPL", "LAS", "IPR"])
def test_the_array_s_orientation_changes_no_word(blocks, codes):
    one, other = (derived_drafts(world(blocks, orientation=c), random.Random(3)) for c in ("RAS", codes))
    assert one == other


def mirrored_world(blocks):
    swapped = {name: (tuple(sorted((-r[0], -r[1]))), a, s, hu) for name, (r, a, s, hu) in blocks.items()}
    return world({mirrored(name): block for name, block in swapped.items()})


@pytest.mark.parametrize("blocks", [HEAD, BELLY])
@pytest.mark.parametrize("family", ["larger", "higher", "forward", "closer", "sideways", "side", "asymmetry"])
def test_a_mirrored_patient_has_mirrored_answers(blocks, family):
    here = asked(world(blocks), family, range(60))
    there = asked(mirrored_world(blocks), family, range(60))
    assert there == {mirrored(text): mirrored(answer) for text, answer in here.items()}


def test_the_report_by_hand():
    text = next(derived.text for derived in derived_drafts(
        world(HEAD, source={"region": "head and neck"}), random.Random(0), kinds=["report"]))  # fmt: skip
    assert text == (
        "Head and neck CT, 200 mm from top to bottom. The brainstem measures 24 mL. The right parotid measures 60 mL. "
        "The left parotid measures 28 mL. The mandible measures 144 mL. The right parotid is the larger one. "
        "The left parotid has 53 percent less volume than the right parotid. "
        "The left parotid lies 10 mm higher than the right parotid. "
        "The left parotid lies 8 mm further forward than the right parotid. "
        "The centre of the brainstem lies 5 mm to the left of that of the mandible. "
        "The centre of the brainstem lies 5 mm to the left of that of the larynx. "
        "The centre of the spinal cord lies 5 mm to the left of that of the larynx."
    )


def test_the_report_of_another_region_by_hand():
    text = derived_drafts(world(BELLY, modality="MR", unit="arbitrary"), random.Random(0), kinds=["report"])[0].text
    assert text == (
        "MR, 200 mm from top to bottom. The liver measures 150 mL. The tumor measures 2.0 mL. "
        "The stomach measures 112 mL. The pancreas measures 42 mL. The left ovary measures 54 mL. "
        "The right ovary measures 50 mL. The colon runs out of the scan. "
        "The left ovary and the right ovary are of similar size. "
        "The left ovary lies 15 mm higher than the right ovary. "
        "The left ovary lies 15 mm further forward than the right ovary."
    )


def test_descriptions_hold_for_one_structure_only():
    known = facts(world(HEAD))
    drafts = [one for one in derived_drafts(world(HEAD), random.Random(1)) if one.subtask == "description"]
    by_facts = {(str(one.slots["description"]), (one.boxes or one.masks or ())[0])
                for one in drafts if one.meta["description"] == "facts"}  # fmt: skip
    assert ("The larger of the two parotids.", "right parotid") in by_facts
    assert ("The smaller of the two parotids.", "left parotid") in by_facts
    assert ("The parotid that lies higher.", "left parotid") in by_facts
    placed = {text: name for text, name in by_facts if text.startswith("The structure of")}
    for text, name in placed.items():
        assert f"about {about(known[name].volume_ml)} mL" in text
    assert len({text for text, _ in by_facts}) == len(by_facts)
    words = {str(one.slots["description"]): (one.boxes or one.masks or ())[0] for one in drafts}
    assert set(words.values()) == set(HEAD)  # the dictionary knows all seven
    assert not any(name in text.lower() for text, name in words.items() if "parotid" not in name)


def test_boxes_and_masks_are_given_by_name():
    drafts = derived_drafts(world(BELLY), random.Random(0), kinds=["rec", "reg", "seg"])
    named = {one.boxes for one in drafts if (one.task, one.subtask) == ("rec.box3d", "name")}
    assert named == {(name,) for name in BELLY}
    assert {one.masks for one in drafts if one.subtask == "single"} == named
    several = [one for one in drafts if one.subtask == "several"]
    assert [(one.slots["objects"], one.masks) for one in several] == [(list(BELLY), tuple(BELLY))]
    assert {one.task for one in drafts} == {"rec.box3d", "reg", "seg.sem", "seg.ref"}


def test_every_draft_says_how_it_was_made_and_a_seed_fixes_all():
    case = world(HEAD, absent=("trachea",), complete=True)
    drafts = derived_drafts(case, random.Random(7))
    assert {one.meta["derivation"] for one in drafts} == {"masks+header/6"}
    assert {one.template for one in drafts} == {
        "m3d.report", "m3d.retrieval", "m3d.vqa.closed", "m3d.vqa.open", "m3d.rec.box3d", "m3d.reg", "m3d.seg.sem",
        "m3d.seg.ref",
    }  # fmt: skip
    assert drafts == derived_drafts(case, random.Random(7))
    assert drafts != derived_drafts(case, random.Random(8))
    alone = [one for kind in KINDS for one in derived_drafts(case, random.Random(7), kinds=[kind])]
    assert alone == drafts
    with pytest.raises(ValueError, match="unknown kind 'vga'"):
        derived_drafts(case, random.Random(0), kinds=["vga"])


SAID = {  # who is asked openly does not know the ranges
    "volume of the mandible": "144 mL",
    "volume of the brainstem": "24 mL",
    "volume of the right parotid": "60 mL",
    "volume of the left parotid": "28 mL",
    "volume of the larynx": "32 mL",
    "length of the scan": "200 mm",
    "extent of the right parotid, left to right": "30 mm",
    "extent of the right parotid, top to bottom": "50 mm",
    "asymmetry of the parotids": "53 percent",
    "mean HU of the mandible": "700 HU",
    "mean HU of the right parotid": "0 HU",
    "mean HU of the left parotid": "10 HU",
    "mean HU of the larynx": "-200 HU",
    "height of the mandible": "55 percent",
    "height of the right parotid": "50 percent",
    "distance between left parotid and right parotid": "116 mm",
    "distance between brainstem and larynx": "113 mm",
}


def test_closed_and_open_are_one_question():
    drafts, said = derived_drafts(world(HEAD), random.Random(0), kinds=["vqa"]), dict(SAID)
    for closed, open_ in zip(drafts[::2], drafts[1::2], strict=True):
        assert (closed.task, open_.task) == ("vqa.closed", "vqa.open")
        assert closed.slots == open_.slots
        if open_.value is None:
            assert open_.text == closed.options[closed.choice]
        elif open_.quantity in SAID:
            assert open_.text == said.pop(open_.quantity)
        assert len(set(closed.options)) == len(closed.options)
    assert len(said) <= 5  # what this seed does not ask
    values = {one.quantity: (one.value, one.unit) for one in drafts if one.value is not None}
    assert values["volume of the larynx"] == (31.5, "mL")
    assert values["length of the scan"] == (200.0, "mm")


def test_named_options_stand_in_any_order():
    first = Counter()
    for seed in range(60):
        for one in questions(Scene.of(world(HEAD)), random.Random(seed)):
            if one.subtask == "higher":
                first[one.choice] += 1
    assert min(first[0], first[1]) >= 18


def test_places():
    assert counterparts(["left rib 4", "right rib 4", "left", "right", "left eye"]) == {
        "rib 4": ("left rib 4", "right rib 4")
    }
    known = facts(world(HEAD))
    assert distance_mm(known["brainstem"], known["spinal cord"]) == pytest.approx((20**2 + 67.5**2) ** 0.5)
    assert direction(known["brainstem"], known["esophagus"]) == (2, pytest.approx(130))
    assert direction(known["right parotid"], known["spinal cord"]) is None  # as much forward as to the right
    assert len(FAMILIES) >= 20
    assert set(quarters_of.VOLUME_ML) <= set(NAMES.values())
