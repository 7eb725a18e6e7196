"""Masks at known distances, overlaps counted by hand, and the released evaluation's own numbers (fixture losses)."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from data_prep.record import Record
from m3d.bench.metrics.base import Sample
from m3d.bench.metrics.masks import HD95, NSD, Dice, MaskPair, SoftDice, mask_metrics
from m3d.bench.published import soft_sums

FOLDER = Path(__file__).parents[1] / "fixtures" / "losses"
INPUTS, OUTPUTS = load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "outputs.safetensors")
SHAPE = (12, 14, 16)
DIAGONAL = math.sqrt(12**2 + 14**2 + 16**2)
RECORD = Record.model_validate(
    {
        "id": "openkbp/1/mandible",
        "image_id": "1",
        "patient_id": "1",
        "split": "test",
        "source": {"dataset": "OpenKBP"},
        "media": [
            {
                "image_id": "1",
                "kind": "volume",
                "path": "1.npy",
                "modality": "CT",
                "shape": SHAPE,
                "axes": "DHW",
                "intensity": {"unit": "HU"},
            }
        ],
        "task": "seg.sem",
        "prompt": {"text": "Please segment the mandible."},
        "target": {"masks": []},
    }
)


def block(*sides, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def pair(guess, truth, spacing=(1.0, 1.0, 1.0), soft=None):
    return MaskPair("mandible", guess, truth, spacing, soft)


def asked(*pairs, failure=None):
    return Sample(record=RECORD, masks=pairs, failure=failure)


def total(metric, *samples):
    """The metric of samples, as scoring finds it."""
    rows = metric.statistics(samples)
    judged = rows[~np.isnan(rows).any(axis=1)]
    return metric.reduce(judged.sum(axis=0)[None], np.array([float(len(judged))]))[0]


NOTHING = block((0, 0), (0, 0), (0, 0))
CUBE5, CUBE3 = block((2, 7), (2, 7), (2, 7)), block((3, 6), (3, 6), (3, 6))


# -- Dice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "expected"),
    [
        (block((0, 4), (0, 4), (0, 4)), 1.0),
        (block((2, 6), (0, 4), (0, 4)), 0.5),  # 32 of 64 voxels in common
        (block((0, 4), (0, 4), (0, 1)), 2 * 16 / (16 + 64)),
        (block((3, 4), (3, 4), (3, 4)), 2 / 65),  # a single voxel
        (block((6, 8), (6, 8), (6, 8)), 0.0),
        (NOTHING, 0.0),
        (None, 0.0),
    ],
)
def test_dice_counts_voxels(guess, expected):
    assert Dice().value(pair(guess, block((0, 4), (0, 4), (0, 4)))) == pytest.approx(expected)


@pytest.mark.parametrize(("guess", "expected"), [(NOTHING, 1.0), (None, 1.0), (CUBE3, 0.0)])
def test_what_is_absent_is_drawn_rightly_by_drawing_nothing(guess, expected):
    absent = pair(guess, NOTHING)
    assert Dice().value(absent) == expected
    assert NSD().value(absent) == expected
    assert HD95().value(absent) == pytest.approx(0.0 if expected else DIAGONAL)


# -- surfaces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "spacing", "distance"), [(0, (2.5, 1, 1), 7.5), (1, (2.5, 0.8, 1), 2.4), (2, (4, 4, 0.5), 1.5)]
)
def test_two_plates_of_one_slice_lie_as_far_apart_as_they_do(axis, spacing, distance):
    """Three slices apart along one axis, whole in the others."""
    guess, truth = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    np.moveaxis(guess, axis, 0)[2], np.moveaxis(truth, axis, 0)[5] = True, True
    plates = pair(guess, truth, spacing)
    assert HD95().value(plates) == pytest.approx(distance)
    assert NSD(distance + 0.01).value(plates) == 1.0
    assert NSD(distance - 0.01).value(plates) == 0.0
    assert Dice().value(plates) == 0.0


def test_a_surface_exactly_at_the_tolerance_is_near():
    apart = pair(block((2, 3), (0, 5), (0, 5)), block((4, 5), (0, 5), (0, 5)), (1.5, 1, 1))
    assert NSD(3.0).value(apart) == 1.0


def test_of_two_plates_of_which_one_is_far_two_thirds_of_the_surface_are_near():
    truth, far = block((0, 1), (0, 4), (0, 4)), block((11, 12), (0, 4), (0, 4))
    assert NSD().value(pair(truth | far, truth)) == pytest.approx(32 / 48)  # 16 true, 16 of 32 drawn
    assert NSD().value(pair(truth, truth | far)) == pytest.approx(32 / 48)


def test_a_cube_within_a_cube():
    """Of the outer 98 surface voxels 54 are 1 from the inner cube, 36 sqrt 2 and 8 sqrt 3; the inner 26 are all 1."""
    cubes = pair(CUBE3, CUBE5)
    assert NSD(1).value(cubes) == pytest.approx((26 + 54) / (26 + 98))
    assert NSD(1.5).value(cubes) == pytest.approx((26 + 54 + 36) / (26 + 98))
    assert NSD(2).value(cubes) == 1.0
    assert HD95().value(cubes) == pytest.approx(math.sqrt(3))  # place .95 * 97 = 92.15 of the sorted 98


def test_95_percent_lie_between_what_is_near_and_what_is_far():
    """100 voxels at 0 and 6 at 9 mm: place .95 * 105 = 99.75 lies at three quarters from the last 0 to the first 9."""
    truth, far = block((1, 2), (0, 10), (0, 10)), block((4, 5), (0, 2), (0, 3))
    assert HD95().value(pair(truth | far, truth, (3, 1, 1))) == pytest.approx(0.75 * 9)
    assert HD95().value(pair(truth, truth | far, (3, 1, 1))) == pytest.approx(0.75 * 9)  # the larger direction
    five = block((4, 5), (0, 1), (0, 5))  # place .95 * 104 = 98.8 of 105 lies among the 100 zeros
    assert HD95().value(pair(truth | five, truth, (3, 1, 1))) == 0.0


def test_single_voxels_in_opposite_corners():
    corners = pair(block((0, 1), (0, 1), (0, 1)), block((11, 12), (13, 14), (15, 16)), (3, 1, 2))
    assert HD95().value(corners) == pytest.approx(math.sqrt(33**2 + 13**2 + 30**2))
    assert HD95().value(corners) < corners.diagonal_mm == pytest.approx(math.sqrt(36**2 + 14**2 + 32**2))
    assert NSD().value(corners) == 0.0


def test_a_scan_of_one_slice():
    flat = (1, 8, 8)
    masks = pair(block((0, 1), (0, 4), (0, 4), shape=flat), block((0, 1), (0, 4), (2, 6), shape=flat), (5, 1, 1))
    assert Dice().value(masks) == 0.5
    assert NSD(2).value(masks) == 1.0  # a slice is all surface, and no voxel farther than two from the other
    assert NSD(1).value(masks) == pytest.approx((12 + 12) / 32)
    assert HD95().value(masks) == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(4))
def test_surfaces_agree_with_all_distances_between_all_surface_voxels(seed):
    random, spacing = np.random.default_rng(seed), (3.0, 0.7, 1.3)
    guess, truth = (random.random(SHAPE) < share for share in (0.9, 0.8))
    guess[:, :5], truth[:3] = False, False
    surfaces = [np.argwhere(mask & ~whole_neighbours(mask)) * spacing for mask in (guess, truth)]
    far = cdist(*surfaces)
    there, back = far.min(axis=1), far.min(axis=0)
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert HD95().value(pair(guess, truth, spacing)) == pytest.approx(expected, rel=1e-5)
    near = ((there <= 1).sum() + (back <= 1).sum()) / (len(there) + len(back))
    assert 0.1 < near < 0.9
    assert NSD(1).value(pair(guess, truth, spacing)) == pytest.approx(near, rel=1e-5)


def whole_neighbours(mask):
    """Where all six neighbours belong to the mask; outside of the scan is none."""
    wide = np.pad(mask, 1)
    inner = slice(1, -1)
    found = np.ones_like(mask)
    for axis in range(3):
        for side in (slice(0, -2), slice(2, None)):
            found &= wide[tuple(side if other == axis else inner for other in range(3))]
    return found


def test_a_mask_beside_nothing_is_as_wrong_as_can_be():
    for one in (pair(NOTHING, CUBE3), pair(None, CUBE3), pair(CUBE3, NOTHING)):
        assert NSD().value(one) == 0.0
        assert HD95().value(one) == pytest.approx(DIAGONAL)


def test_nothing_is_said_of_what_monai_will_be():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NSD().value(pair(CUBE3, CUBE3)) == 1.0
        assert HD95().value(pair(CUBE3, CUBE3)) == 0.0


# -- samples --------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_mean_of_its_masks_and_a_result_that_of_its_samples():
    half = pair(block((2, 6), (0, 4), (0, 4)), block((0, 4), (0, 4), (0, 4)))
    two, one = asked(half, pair(None, CUBE3)), asked(pair(CUBE3, CUBE3))
    np.testing.assert_allclose(Dice().statistics([two, one]), [[0.25], [1.0]])
    assert total(Dice(), two, one) == pytest.approx(0.625)
    assert total(HD95(), asked(pair(None, CUBE3), pair(CUBE3, CUBE3))) == pytest.approx(DIAGONAL / 2)


def test_a_failure_is_the_worst_even_where_its_masks_were_right():
    failed = asked(pair(CUBE3, CUBE3, (3, 1, 1)), pair(None, NOTHING, (3, 1, 1)), failure="NoMask: drew the skin")
    assert [total(metric, failed) for metric in (Dice(), NSD(), SoftDice())] == [0.0, 0.0, 0.0]
    assert total(HD95(), failed) == pytest.approx(math.sqrt(36**2 + 14**2 + 16**2))
    assert Dice().worst == NSD().worst == (0.0,) and HD95().worst is None


def test_a_failure_without_masks_has_no_scan_to_be_far_in():
    failed = asked(failure="OutOfMemory: 30 GB")
    assert total(Dice(), failed) == 0.0
    with pytest.raises(ValueError, match=r"openkbp/1/mandible: failed \(OutOfMemory: 30 GB\).*guess=None"):
        HD95().statistics([failed])


def test_a_sample_of_no_masks_is_not_judged():
    for metric in (Dice(), NSD(), HD95(), SoftDice()):
        assert np.isnan(metric.statistics([asked()])).all()
        assert len(metric.statistics([])) == 0


# -- the released Dice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in OUTPUTS}))
def test_soft_dice_of_stored_sums_is_the_references(case):
    sums = soft_sums(INPUTS[f"{case}/logits"], INPUTS[f"{case}/target"]).tolist()
    samples = [asked(pair(CUBE3, CUBE3, soft=tuple(row))) for row in sums]
    assert total(SoftDice(), *samples) == pytest.approx(OUTPUTS[f"{case}/bench_dice"].item(), abs=1e-6)


def test_soft_dice_by_hand():
    assert SoftDice().value(pair(CUBE3, CUBE3, soft=(20.0, 30.0, 27.0))) == pytest.approx(40 / 58)
    assert SoftDice().value(pair(NOTHING, NOTHING, soft=(0.0, 5.0, 0.0))) == 0.0  # a right refusal


def test_soft_dice_of_a_refusal_is_zero_and_of_a_mask_without_probabilities_unknown():
    soft, refused = asked(pair(CUBE3, CUBE3, soft=(20.0, 30.0, 27.0))), asked(pair(None, CUBE3))
    failed, bare = asked(pair(None, CUBE3), failure="NoMask"), asked(pair(CUBE3, CUBE3))
    absent = asked(pair(CUBE3, NOTHING))  # whatever the probabilities were
    assert total(SoftDice(), soft) == pytest.approx(40 / 58)
    assert total(SoftDice(), refused) == total(SoftDice(), failed) == total(SoftDice(), absent) == 0.0
    assert np.isnan(total(SoftDice(), bare))
    assert total(SoftDice(), soft, refused, failed, absent, bare) == pytest.approx(40 / 58 / 4)
    assert np.isnan(total(SoftDice(), refused, failed, absent, bare))  # a system that gives no probabilities
    assert np.isnan(total(SoftDice(), asked(pair(CUBE3, CUBE3, soft=(20.0, 30.0, 27.0)), pair(CUBE3, CUBE3))))


# -- what is refused ------------------------------------------------------------------------------------------------


def test_masks_must_lie_on_one_grid():
    with pytest.raises(ValueError, match=r"'mandible' was drawn on a grid of \(2, 2, 2\).*\(12, 14, 16\)"):
        pair(np.ones((2, 2, 2), bool), CUBE3)
    with pytest.raises(ValueError, match=r"guess of 'mandible' must be a bool array.*float64"):
        pair(np.ones(SHAPE), CUBE3)
    with pytest.raises(ValueError, match=r"truth of 'mandible'.*\(14, 16\)"):
        pair(None, CUBE3[0])


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.nan, 1.0)])
def test_spacing_is_three_positive_mm(spacing):
    with pytest.raises(ValueError, match="three positive mm"):
        pair(CUBE3, CUBE3, spacing)


@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan])
def test_a_tolerance_is_a_distance(tolerance):
    with pytest.raises(ValueError, match="tolerance of NSD"):
        NSD(tolerance)


def test_each_protocol_has_its_own_metrics():
    assert [metric.name for metric in mask_metrics("standard")] == ["Dice", "NSD@3mm", "HD95"]
    assert [metric.name for metric in mask_metrics("m3d")] == ["soft Dice"]
    assert [(metric.better, metric.unit) for metric in mask_metrics("standard")] == [
        ("higher", ""),
        ("higher", ""),
        ("lower", "mm"),
    ]
    assert NSD(2.5).name == "NSD@2.5mm" and "2.5 mm" in NSD(2.5).variant


def test_nothing_in_mm_is_judged_of_a_scan_without_spacing():
    same = pair(CUBE5, CUBE5, spacing=None)
    for failure in (None, "NoMask: x"):
        sample = asked(same, failure=failure)
        assert np.isnan(NSD().statistics([sample])).all() and np.isnan(HD95().statistics([sample])).all()
        assert Dice().statistics([sample]).tolist() == [[1.0 if failure is None else 0.0]]
