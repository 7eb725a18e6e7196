"""Facts whose values are worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.boxes import Box
from data_prep.case import Case, layered
from data_prep.derived import facts, scan_length_mm
from data_prep.volume import Volume

# axes P, L, I with 4, 2, 3 mm; voxel (0, 0, 0) lies at R 20, A 50, S 30
AFFINE = np.array([[0, -2.0, 0, 20], [-4.0, 0, 0, 50], [0, 0, -3.0, 30], [0, 0, 0, 1]])


def case_of(blocks, *, shape=(10, 21, 8), hu=0.0, **more):
    """Labelled blocks in a body from R 18 (j = 1) to R -18 (j = 19), its middle at 0; air on both of its sides."""
    array, labels = np.full(shape, hu, np.float32), np.zeros(shape, np.uint8)
    array[:, [0, -1]] = -1000
    names = {}
    for label, (name, place, value) in enumerate(blocks, start=1):
        array[place], labels[place], names[label] = value, label, name
    return Case(id="x", patient_id="x", volume=Volume(array, AFFINE), labels=labels, names=names, **more)


def test_a_block_by_hand():
    case = case_of([("gland", np.s_[2:5, 1:3, 4:6], 25.0)])
    fact = facts(case)["gland"]
    assert fact.volume_ml == pytest.approx(3 * 2 * 2 * 24 / 1000)
    assert fact.box == Box((2, 1, 4), (5, 3, 6), "voxel", "gland")
    # middle voxel (3, 1.5, 4.5): R 20 - 3, A 50 - 12, S 30 - 13.5
    assert fact.centroid_mm == pytest.approx((17.0, 38.0, 16.5))
    assert fact.extent_mm == pytest.approx((2 * 2, 3 * 4, 2 * 3))
    assert fact.mean_hu == 25.0
    assert (fact.side, fact.touches_edge, fact.cut) == ("right", False, False)


def test_mean_hu_is_the_mean_of_its_voxels():
    case = case_of([("gland", np.s_[2:4, 1:2, 4:5], np.array([[[10.0]], [[40.0]]]))])
    assert facts(case)["gland"].mean_hu == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("name", "place", "side"),
    [
        ("a", np.s_[4:5, 1:2, 4:5], "right"),  # R 18
        ("a", np.s_[4:5, 19:20, 4:5], "left"),  # R -18
        ("a", np.s_[4:5, 5:6, 4:5], "midline"),  # R 10
        ("a", np.s_[4:5, 4:5, 4:5], "right"),  # R 12
        ("left lung", np.s_[4:5, 1:2, 4:5], "left"),  # the name knows better
        ("lung_right", np.s_[4:5, 19:20, 4:5], "right"),
        ("leftover", np.s_[4:5, 1:2, 4:5], "right"),  # not a word "left"
    ],
)
def test_the_side_is_the_patients(name, place, side):
    assert facts(case_of([(name, place, 0.0)]))[name].side == side


def test_the_side_follows_the_affine_not_the_array():
    case = case_of([("a", np.s_[4:5, 1:2, 4:5], 0.0)])
    flipped = AFFINE.copy()
    flipped[0] = [0, 2.0, 0, -20]
    other = Case(
        id="y", patient_id="y", volume=Volume(case.volume.array, flipped), labels=case.labels, names=case.names
    )
    assert (facts(case)["a"].side, facts(other)["a"].side) == ("right", "left")


def test_the_middle_is_the_bodys_and_a_thin_arm_does_not_shift_it():
    shape = (10, 41, 8)
    case = case_of([("a", np.s_[4:5, 5:6, 4:5], 0.0)], shape=shape, hu=-1000.0)  # R 10
    case.volume.array[:, 1:10] = 50  # the body: R 18 to 2, its middle 10
    case.volume.array[4, 10:, 4] = 50  # an arm to R -60: the middle of the outermost voxels is at -20
    assert facts(case)["a"].side == "midline"
    empty = case_of([("a", np.s_[4:5, 5:6, 4:5], -1000.0)], shape=shape, hu=-1000.0)
    assert facts(empty)["a"].side is None  # no body, no side


def test_a_body_wider_than_the_scan_tells_no_side_but_a_name_does():
    case = case_of([("a", np.s_[4:5, 1:2, 4:5], 0.0), ("left b", np.s_[5:6, 19:20, 4:5], 0.0)])
    case.volume.array[:, 0] = 30.0  # the right flank lies outside
    assert [facts(case)[name].side for name in ("a", "left b")] == [None, "left"]


def test_a_wide_structure_is_in_the_middle_though_its_centroid_is_not():
    case = case_of([("jaw", np.s_[4:5, 1:31, 4:5], 0.0)], shape=(10, 61, 8))  # 60 mm wide, centroid R -11
    assert facts(case)["jaw"].centroid_mm[0] == pytest.approx(-11.0)
    assert facts(case)["jaw"].side == "right"  # the body's middle is at R -40, more than a quarter of 60 mm away
    case = case_of([("jaw", np.s_[4:5, 9:39, 4:5], 0.0)], shape=(10, 61, 8))  # centroid R -27, 13 mm off
    assert facts(case)["jaw"].side == "midline"


@pytest.mark.parametrize("place", [np.s_[0:2, 3:5, 3:5], np.s_[8:10, 3:5, 3:5], np.s_[2:4, 20:21, 3:5]])
def test_touching_any_face_is_said(place):
    assert facts(case_of([("a", place, 0.0)]))["a"].touches_edge


def test_cut_is_what_the_case_declares():
    case = case_of([("a", np.s_[2:3, 3:4, 3:4], 0.0), ("b", np.s_[5:6, 3:4, 3:4], 0.0)], cut_by_crop=("b",))
    assert [facts(case)[name].cut for name in ("a", "b")] == [False, True]


def test_what_has_no_voxels_has_no_facts():
    case = case_of([("a", np.s_[2:3, 3:4, 3:4], 0.0), ("b", np.s_[5:5, 3:4, 3:4], 0.0)])
    assert list(facts(case)) == ["a"]


def test_an_oblique_grid_keeps_volume_and_centroid():
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2.0, 3.0, 4.0])
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[3:6, 3:6, 3:6] = 1
    case = Case(
        id="x", patient_id="x", volume=Volume(labels * 10.0, affine), labels=labels, names={1: "cube"}, complete=True
    )
    fact = facts(case)["cube"]
    assert fact.volume_ml == pytest.approx(27 * 24 / 1000)
    assert fact.centroid_mm == pytest.approx(tuple(turn @ [8.0, 12.0, 16.0]))
    assert fact.extent_mm == pytest.approx((0.8 * 6 + 0.6 * 9, 0.6 * 6 + 0.8 * 9, 12.0))  # its hull


def test_labels_must_lie_on_the_scan_and_have_names():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[1] = 2
    volume = Volume(np.zeros((3, 3, 3), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="x: labels have shape"):
        Case(id="x", patient_id="x", volume=volume, labels=labels[:2], names={2: "a"})
    with pytest.raises(ValueError, match=r"x: labels \[2\] have no name"):
        Case(id="x", patient_id="x", volume=volume, labels=labels, names={1: "a"})
    case = Case(id="x", patient_id="x", volume=volume, labels=labels, names={2: "a", 3: "b"})
    assert case.mask("a").sum() == 9
    assert not case.mask("b").any()
    with pytest.raises(KeyError, match="no structure 'c'; known: a, b"):
        case.mask("c")


@pytest.mark.parametrize(
    ("place", "edges"),  # the axes grow to P, L, I
    [
        (np.s_[0:2, 3:5, 3:5], ("anterior",)),
        (np.s_[8:10, 3:5, 3:5], ("posterior",)),
        (np.s_[2:4, 0:2, 3:5], ("right",)),
        (np.s_[2:4, 20:21, 3:5], ("left",)),
        (np.s_[2:4, 3:5, 0:2], ("superior",)),
        (np.s_[2:4, 3:5, 6:8], ("inferior",)),
        (np.s_[2:4, 3:5, 0:8], ("inferior", "superior")),
        (np.s_[0:4, 3:5, 7:8], ("anterior", "inferior")),
        (np.s_[2:4, 3:5, 3:5], ()),
    ],
)
def test_the_edges_are_the_patients(place, edges):
    fact = facts(case_of([("a", place, 0.0)]))["a"]
    assert fact.edges == edges
    assert fact.touches_edge == bool(edges)
    assert fact.whole == (not edges)


def test_slices_are_counted_along_the_body():
    assert facts(case_of([("a", np.s_[2:4, 3:8, 1:6], 0.0)]))["a"].slices == 5
    assert scan_length_mm(case_of([])) == 8 * 3


def test_layers_are_read_as_one_and_may_overlap():
    liver, tumor = np.zeros((10, 21, 8), bool), np.zeros((10, 21, 8), bool)
    liver[2:6, 3:9, 2:6] = True
    tumor[3:5, 4:6, 3:5] = True
    labels, names = layered({"liver": liver, "tumor": tumor, "nothing": np.zeros_like(liver)})
    array = np.full(liver.shape, 10.0, np.float32)
    array[tumor] = 40.0
    known = facts(Case(id="x", patient_id="x", volume=Volume(array, AFFINE), labels=labels, names=names))
    assert labels.shape[0] == 2
    assert {name: fact.voxels for name, fact in known.items()} == {"liver": 4 * 6 * 4, "tumor": 8}
    assert known["liver"].mean_hu == pytest.approx((88 * 10 + 8 * 40) / 96)
    assert known["tumor"].mean_hu == 40.0
    assert known["liver"].box == Box((2, 3, 2), (6, 9, 6), "voxel", "liver")


def test_a_structure_spread_over_two_layers_is_one():
    labels = np.zeros((2, 10, 21, 8), np.uint8)
    labels[0, 2:4, 3:5, 3:5] = 1
    labels[1, 6:8, 3:5, 3:5] = 1
    volume = Volume(np.zeros(labels.shape[1:], np.float32), AFFINE)
    fact = facts(Case(id="x", patient_id="x", volume=volume, labels=labels, names={1: "a"}))["a"]
    assert (fact.voxels, fact.box) == (16, Box((2, 3, 3), (8, 5, 5), "voxel", "a"))


def test_without_a_place_there_are_no_mm_and_without_hu_no_density():
    case = case_of([("a", np.s_[0:2, 3:4, 3:4], 5.0), ("left b", np.s_[5:6, 3:4, 3:4], 0.0)])
    lost = facts(replace(case, placed=False))
    for fact in lost.values():
        assert (fact.volume_ml, fact.centroid_mm, fact.extent_mm, fact.slices, fact.edges) == (None,) * 4 + ((),)
    assert (lost["a"].side, lost["left b"].side) == (None, "left")
    assert lost["a"].touches_edge  # of the array, whatever the patient's side
    other = facts(replace(case, unit="arbitrary"))["a"]
    assert (other.mean_hu, other.side) == (None, None)
    assert other.volume_ml == pytest.approx(2 * 0.024)


def test_the_extent_on_an_oblique_grid_is_that_of_the_voxels_not_of_their_box():
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn
    labels = np.zeros((9, 9, 3), np.uint8)
    labels[np.arange(1, 8), np.arange(7, 0, -1), 1] = 1  # a diagonal of 7 voxels
    case = Case(id="x", patient_id="x", volume=Volume(labels * 10.0, affine), labels=labels, names={1: "rod"})
    # from (1, 7) to (7, 1): 6 * (0.6 + 0.8) along R, 6 * (0.8 - 0.6) along A, and a voxel's own 1.4, 1.4 and 1 mm
    assert facts(case)["rod"].extent_mm == pytest.approx((8.4 + 1.4, 1.2 + 1.4, 1.0))
