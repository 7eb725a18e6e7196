"""Post-processing: each option on masks whose outcome is drawn by hand, and what a result says of it."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_prep.volume import Volume
from m3d.inference.postprocess import PostProcess
from m3d.inference.results import FoundMask, FoundMeasure, Result

SPACING = (2.0, 5.0, 10.0)  # 0.1 mL a voxel


def empty() -> np.ndarray:
    return np.zeros((12, 12, 12), bool)


def cube(lo: int, hi: int) -> np.ndarray:
    mask = empty()
    mask[lo:hi, lo:hi, lo:hi] = True
    return mask


def test_without_options_nothing_is_done():
    mask = cube(2, 6)
    done = PostProcess().apply(mask, SPACING)
    np.testing.assert_array_equal(done, mask)
    assert done is not mask and not PostProcess()
    assert str(PostProcess()) == "nothing"


def test_the_largest_component_stays_and_the_mask_given_is_not_changed():
    mask = cube(1, 4)
    mask[8:10, 8:10, 8:10] = True
    given = mask.copy()
    np.testing.assert_array_equal(PostProcess(largest_component=True).apply(mask, SPACING), cube(1, 4))
    np.testing.assert_array_equal(mask, given)


def test_voxels_that_share_a_corner_belong_together():
    mask = cube(1, 4)
    mask[4, 4, 4] = True  # touches (3, 3, 3) at a corner
    mask[6, 6, 6] = True  # touches nothing
    done = PostProcess(largest_component=True).apply(mask, SPACING)
    assert done[4, 4, 4] and not done[6, 6, 6] and done.sum() == 28


def test_of_equal_components_the_first_stays():
    mask = empty()
    mask[1, 1, 1:3] = mask[9, 9, 1:3] = True
    done = PostProcess(largest_component=True).apply(mask, SPACING)
    assert done[1, 1, 1:3].all() and done.sum() == 2


def test_a_cavity_is_filled_and_what_opens_to_the_outside_is_not():
    hollow = cube(2, 9)
    hollow[4:7, 4:7, 4:7] = False
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(hollow, SPACING), cube(2, 9))
    opened = hollow.copy()
    opened[2:4, 5, 5] = False  # a channel from the face
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(opened, SPACING), opened)


def test_a_ring_that_is_closed_in_a_slice_only_is_no_hole():
    ring = empty()
    ring[5, 2:9, 2:9] = True
    ring[5, 4:7, 4:7] = False
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(ring, SPACING), ring)


def test_a_hole_is_closed_where_only_edges_and_corners_leak():
    hollow = cube(2, 9)
    hollow[5, 5, 5] = False
    hollow[4, 4, 4] = False  # a second hole, joined by a corner alone
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(hollow, SPACING), cube(2, 9))


def test_what_opens_to_the_scans_edge_is_no_hole():
    mask = np.ones((5, 5, 5), bool)
    mask[0:3, 2, 2] = False
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(mask, SPACING), mask)


def test_components_below_the_volume_go_and_those_of_it_stay():
    mask = empty()
    mask[1, 1, 1:4] = True  # 0.3 mL
    mask[5, 5, 1:3] = True  # 0.2 mL
    mask[9, 9, 9] = True  # 0.1 mL
    done = PostProcess(min_volume_ml=0.2).apply(mask, SPACING)
    assert done.sum() == 5 and done[5, 5, 1:3].all() and not done[9, 9, 9]
    assert not PostProcess(min_volume_ml=0.4).apply(mask, SPACING).any()
    assert PostProcess(min_volume_ml=0.2).apply(mask, SPACING, voxel_ml=0.2)[9, 9, 9]  # a sheared grid says its own


def test_a_thousand_voxels_of_a_cubic_mm_are_a_millilitre():
    mask = np.zeros((12, 12, 12), bool)
    mask[1:11, 1:11, 1:11] = True
    for spacing in ((1.0, 1.0, 1.0), (0.1, 10.0, 1.0), (0.7, 1 / 0.7, 1.0)):
        assert PostProcess(min_volume_ml=1.0).apply(mask, spacing).sum() == 1000


def test_holes_are_filled_before_volumes_are_judged():
    hollow = cube(2, 7)
    hollow[3:6, 3:6, 3:6] = False  # 125 - 27 = 98 voxels, 9.8 mL; 12.5 mL when filled
    assert not PostProcess(min_volume_ml=12).apply(hollow, SPACING).any()
    np.testing.assert_array_equal(PostProcess(fill_holes=True, min_volume_ml=12).apply(hollow, SPACING), cube(2, 7))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipy_on_random_masks(seed):
    mask = np.random.default_rng(seed).random((9, 10, 11)) < 0.6
    np.testing.assert_array_equal(PostProcess(fill_holes=True).apply(mask, SPACING), ndimage.binary_fill_holes(mask))
    sparse = np.random.default_rng(seed).random((9, 10, 11)) < 0.06
    labels, count = ndimage.label(sparse, np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(sparse, labels, np.arange(1, count + 1))
    kept = PostProcess(min_volume_ml=0.3).apply(sparse, SPACING)
    np.testing.assert_array_equal(kept, np.isin(labels, 1 + np.flatnonzero(sizes >= 3)))
    assert PostProcess(largest_component=True).apply(sparse, SPACING).sum() == sizes.max()


def test_an_empty_mask_stays_empty():
    every = PostProcess(largest_component=True, fill_holes=True, min_volume_ml=1)
    assert not every.apply(empty(), SPACING).any()


@pytest.mark.parametrize("volume", [-1.0, float("nan"), float("inf")])
def test_a_minimum_that_is_no_volume_is_refused(volume):
    with pytest.raises(ValueError, match="must be 0 mL or more, got"):
        PostProcess(min_volume_ml=volume)


def test_it_is_frozen_and_says_what_it_does():
    how = PostProcess(largest_component=True, fill_holes=True, min_volume_ml=0.5)
    with pytest.raises(FrozenInstanceError):
        how.fill_holes = False  # type: ignore[misc]
    assert str(how) == "holes filled, components of at least 0.5 mL, largest component"
    assert how.to_dict() == {
        "fill_holes": True,
        "min_volume_ml": 0.5,
        "largest_component": True,
        "connectivity": 26,
    }


# -- results --------------------------------------------------------------------------------------------------------


def result(*masks: FoundMask, affine: np.ndarray | None = None) -> Result:
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    return Result(
        task="segment", prompt="", text="", boxes=(), masks=masks,
        volume=Volume(np.zeros((12, 12, 12), np.float32), affine), scan_path=Path("ct.nii.gz"),
        model_id="m3d-test", preprocess={}, warnings=("one of before",), seconds=1.0,
    )  # fmt: skip


def found(name: str, array: np.ndarray) -> FoundMask:
    return FoundMask(name, array, 0.75, float(array.sum() * 0.1))


def test_a_result_keeps_what_was_done_and_its_volumes_are_new():
    speck = cube(1, 4)
    speck[9, 9, 9] = True
    before = result(found("a", speck))
    after = before.postprocessed(PostProcess(largest_component=True)).postprocessed(PostProcess(fill_holes=True))
    assert after.masks[0].volume_ml == pytest.approx(2.7) and after.masks[0].score == 0.75
    assert after.warnings == ("one of before",)
    assert before.masks[0].array[9, 9, 9], "the first result is as it was"
    said = after.to_dict()
    assert [step["largest_component"] for step in said["postprocess"]] == [True, False]
    assert said["masks"][0]["voxels"] == said["masks"][0]["measurements"]["voxels"] == 27
    assert before.to_dict()["postprocess"] == []
    assert before.postprocessed(PostProcess()) is before


def test_a_result_warns_of_masks_that_lost_much():
    speck = empty()
    speck[1, 1, 1] = True
    halves = empty()
    halves[1, 1, 1:4] = halves[5, 5, 1:3] = halves[9, 9, 1:3] = True  # 3 of 7 voxels stay
    half = empty()
    half[1, 1, 1:3] = half[5, 5, 1:3] = True  # 2 of 4 stay: not more than half is lost
    how = PostProcess(largest_component=True, min_volume_ml=0.2)
    after = result(found("speck", speck), found("halves", halves), found("half", half), found("none", empty()))
    assert after.postprocessed(how).warnings[1:] == (
        f"the mask of 'speck' is empty after post-processing ({how}): it had 0.1 mL",
        f"the mask of 'halves' lost more than half of its volume in post-processing ({how}): 0.7 to 0.3 mL",
    )


def test_volumes_on_a_sheared_grid_are_those_of_its_voxels():
    affine = np.array([[10.0, 0, 0, 0], [0, 10.0, 6.0, 0], [0, 0, 8.0, 0], [0, 0, 0, 1]])  # sides of 10 mm, 0.8 mL
    one = empty()
    one[5, 5, 5] = True
    before = result(found("a", one), affine=affine)
    assert before.postprocessed(PostProcess(min_volume_ml=0.79)).masks[0].volume_ml == pytest.approx(0.8)
    assert not before.postprocessed(PostProcess(min_volume_ml=0.81)).masks[0].array.any()


def test_masks_that_measures_rest_on_stay_as_they_were_measured():
    speck = cube(1, 4)
    speck[9, 9, 9] = True
    measured = FoundMeasure("volume", ("a",), 2.8, "mL")
    before = replace(result(found("a", speck), found("a", speck)), measured=(measured,), num_measured=1)
    after = before.postprocessed(PostProcess(largest_component=True))
    assert [int(mask.array.sum()) for mask in after.masks] == [28, 27]
