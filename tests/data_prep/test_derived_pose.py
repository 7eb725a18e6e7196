"""What stays true of a patient who is turned or moved in the scan: labels of blocks, really turned and moved."""

import itertools
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.ndimage import affine_transform

from data_prep.case import Case
from data_prep.derived import derived_drafts
from data_prep.derived.questions import FAMILIES
from data_prep.derived.scene import Scene
from data_prep.volume import Volume

VOXEL, SIDE = 2.5, 80  # a world of 200 mm, its middle at the origin
# name: (R from, to), (A from, to), (S from, to) in mm, HU
BLOCKS = {
    "mandible": ((-55, 65), (50, 75), (-30, 10), 700),  # 120 mL
    "brainstem": ((-10, 15), (-40, -10), (35, 65), 30),  # 22.5 mL
    "spinal cord": ((-5, 5), (-50, -40), (-92.5, 30), 40),  # 7.5 mm above the end
    "right parotid": ((40, 70), (-20, 20), (-20, 20), 0),  # 48 mL around (55, 0, 0)
    "left parotid": ((-70, -50), (-10, 25), (-10, 25), 10),  # 24.5 mL around (-60, 7.5, 7.5): higher, further forward
    "larynx": ((-10, 20), (10, 45), (-60, -30), -200),  # 31.5 mL around (5, 27.5, -45)
    "esophagus": ((-10, 10), (-25, -5), (-85, -60), 20),
    "tumor": ((-15, 10), (5, 20), (40, 62.5), 35),  # 8.4 mL, beside nothing, around (-2.5, 12.5, 51.25)
    "liver": ((20, 55), (0, 30), (30, 60), 35),  # 31.5 mL, 10 mm beside the tumor
    "nodule": ((40, 55), (-45, -30), (-60, -45), 55),  # on the right
    "vertebra C2": ((-15, 10), (-75, -55), (5, 25), 300),  # around (-2.5, -65, 15)
    "vertebra C3": ((-10, 20), (-75, -55), (-20, 0), 320),  # around (5, -65, -10)
    "trachea": ((-5, 25), (-30, 0), (-90, -87.5), -900),  # 2.5 mm above the end
    "stomach": ((55, 80), (0, 30), (30, 60), 60),  # touches the liver
    "thyroid": ((-40, -20), (10, 30), (80, 100), 90),  # runs out at the top
}
NOT_THERE = ("spleen", "pancreas", "heart", "bladder")
STEADY = {"larger", "volume", "comparison", "largest", "smallest", "asymmetry", "distance", "side", "density", "denser"}
BOUND = {"length", "cut", "extent", "longest", "higher", "forward", "sideways", "closer", "height", "touch", "edge",
         "missing", "present", "count"}  # fmt: skip
POSES = [(axis, sign * 8.0, (0, 0, 0)) for axis in range(3) for sign in (1, -1)] + [
    (0, 0.0, tuple(sign * 12.0 * (axis == other) for other in range(3))) for axis in range(3) for sign in (1, -1)
]  # about R, A or S by so many degrees; by so many mm


def turned(axis, degrees):
    one, two = (other for other in range(3) if other != axis)
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[one, one] = matrix[two, two] = np.cos(angle)
    matrix[one, two], matrix[two, one] = -np.sin(angle), np.sin(angle)
    return matrix


@cache
def scene_of(axis=0, degrees=0.0, shift=(0, 0, 0), blocks=tuple(BLOCKS)):
    """The blocks, turned about the world's middle and then moved: nearest voxels, air from outside."""
    at = (np.arange(SIDE) + 0.5) * VOXEL - VOXEL * SIDE / 2
    array = np.where(np.abs(at) < 85, 0.0, -1000.0)[:, None, None] * np.ones((SIDE,) * 3)
    labels = np.zeros(array.shape, np.uint8)
    for value, name in enumerate(blocks, start=1):
        inside = [(at > low) & (at < high) for low, high in BLOCKS[name][:3]]
        place = inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]
        labels[place], array[place] = value, BLOCKS[name][3]
    back, middle = turned(axis, degrees).T, np.full(3, (SIDE - 1) / 2)
    offset = middle - back @ (middle + np.array(shift) / VOXEL)
    labels = affine_transform(labels, back, offset, order=0, mode="constant", cval=0)
    array = affine_transform(array, back, offset, order=0, mode="constant", cval=-1000.0)
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = at[0]
    names = dict(enumerate((*blocks, *NOT_THERE), start=1))
    return Scene.of(
        Case(id="w", patient_id="w", volume=Volume(array, affine), labels=labels, names=names, complete=True)
    )


@cache
def answers(scene):
    """Per subtask: question with its options -> answer, over some seeds, so that draws hide little."""
    found = {}
    for seed, (family, pose) in itertools.product(range(16), FAMILIES):
        for one in family(scene, random.Random(seed)):
            assert pose == ("fixed" if one.subtask in BOUND else "any")
            asked = (one.text, tuple(sorted(one.options)))
            found.setdefault(one.subtask, {})[asked] = one.options[one.choice]
    return found


def changed(family):
    """Questions whose answer some pose makes another, and how many were asked both before and after."""
    both, other = 0, set()
    for pose in POSES:
        before, after = answers(scene_of()).get(family, {}), answers(scene_of(*pose)).get(family, {})
        shared = before.keys() & after.keys()
        both += len(shared)
        other |= {asked for asked in shared if before[asked] != after[asked]}
    return both, other


def test_every_family_is_in_one_of_the_two_lists():
    assert set(answers(scene_of())) == STEADY | BOUND
    assert len(FAMILIES) == len(STEADY | BOUND) - 1  # the largest and the smallest are of one family


@pytest.mark.parametrize("family", sorted(STEADY))
def test_an_unmarked_family_keeps_its_answers(family):
    both, other = changed(family)
    assert both >= 6
    assert not other


@pytest.mark.parametrize("family", ["higher", "forward", "sideways", "extent", "height", "cut", "present"])
def test_a_marked_family_does_not(family):
    assert changed(family)[1]


def test_unmarked_descriptions_mean_the_same_structure_and_marked_ones_need_not():
    steady, bound = {}, {}
    for pose in [(), *POSES]:
        for seed in range(3):
            for one in derived_drafts(scene_of(*pose).case, random.Random(seed), kinds=["rec"]):
                if one.meta.get("description") == "facts":
                    kept = bound if "pose" in one.meta else steady
                    kept.setdefault(one.slots["description"], set()).add(one.boxes)
    assert steady == {
        "The larger of the two parotids.": {("right parotid",)},
        "The smaller of the two parotids.": {("left parotid",)},
    }
    assert bound["The parotid that lies higher."] == {("left parotid",), ("right parotid",)}


def test_drafts_carry_the_mark_of_their_family():
    case = scene_of().case
    drafts = derived_drafts(case, random.Random(0))
    for one in drafts:
        assert one.meta.get("pose") in (None, "fixed")
        if one.task.startswith("vqa"):
            assert ("pose" in one.meta) == (one.subtask in BOUND)
        elif one.task in ("report", "retrieval"):
            assert one.meta["pose"] == "fixed"
        elif one.meta.get("description") != "facts":
            assert "pose" not in one.meta
    assert {one.meta["derivation"] for one in drafts} == {"masks+header/6"}


@pytest.mark.parametrize(
    ("blocks", "pose"),
    [
        (("left parotid", "right parotid"), "any"),  # sizes compared, and what is missing
        (("left parotid", "right parotid", "esophagus"), "fixed"),  # and what runs out of the scan
    ],
)
def test_a_text_is_bound_if_one_of_its_sentences_is(blocks, pose):
    case = scene_of(0, 0.0, (0, 0, -20.0), blocks).case
    kinds = ["report", "retrieval"]
    lost, placed = (
        {one.task: one for one in derived_drafts(replace(case, placed=there), random.Random(0), kinds=kinds)}
        for there in (False, True)
    )
    assert lost["report"].meta.get("pose", "any") == pose
    assert ("run" in lost["report"].text) == (pose == "fixed")
    assert "pose" not in lost["retrieval"].meta  # without orientation it does not say what runs out, and where
    assert {one.meta["pose"] for one in placed.values()} == {"fixed"}  # they say how long the scan is
