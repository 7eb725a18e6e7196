"""Boxes: half-open arithmetic, frames, and the hull in millimetres."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.boxes import Box, box_of_mask, iou, to_mm, to_norm, to_voxel


def test_box_of_mask_is_half_open():
    mask = np.zeros((5, 6, 7), bool)
    mask[1:3, 4, 2:7] = True
    box = box_of_mask(mask, "x")
    assert box == Box((1, 4, 2), (3, 5, 7), "voxel", "x")
    assert box.sides == (2, 1, 5)
    assert box.volume == mask.sum() == 10
    assert box.center == (2.0, 4.5, 4.5)


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError, match=r"empty mask has no box \(liver\)"):
        box_of_mask(np.zeros((2, 2, 2)), "liver")


def test_norm_and_back():
    box = Box((1, 4, 2), (3, 5, 7), name="x")
    norm = to_norm(box, (4, 10, 8))
    assert norm == Box((0.25, 0.4, 0.25), (0.75, 0.5, 0.875), "norm", "x")
    assert to_voxel(norm, (4, 10, 8)) == Box((1, 4, 2), (3, 5, 7), "voxel", "x")
    assert to_voxel(box, (4, 10, 8)) is box


def test_mm_of_one_voxel_reaches_half_a_voxel_around_its_centre():
    affine = np.array([[0, 0, -2, 10], [0, -1, 0, 20], [3, 0, 0, -30], [0, 0, 0, 1.0]])
    assert to_mm(Box((0, 0, 0), (1, 1, 1)), affine) == Box((9, 19.5, -31.5), (11, 20.5, -28.5), "mm")
    assert to_voxel(Box((9, 19.5, -31.5), (11, 20.5, -28.5), "mm"), (9, 9, 9), affine) == Box((0, 0, 0), (1, 1, 1))


def test_mm_of_an_oblique_box_is_the_hull():
    turn = math.radians(45)
    affine = np.eye(4)
    affine[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    box = to_mm(Box((0.5, 0.5, 0.5), (2.5, 2.5, 1.5)), affine)  # a square of side 2 from the origin, on its tip
    assert np.allclose(box.lo, (-math.sqrt(2), 0, 0), atol=1e-12)
    assert np.allclose(box.hi, (math.sqrt(2), 2 * math.sqrt(2), 1), atol=1e-12)


def test_iou_by_hand():
    one, two = Box((0, 0, 0), (2, 2, 2)), Box((1, 0, 0), (3, 2, 2))
    assert iou(one, two) == 4 / 12
    assert iou(one, one) == 1.0
    assert iou(one, Box((2, 0, 0), (4, 2, 2))) == 0.0  # touching is not overlapping
    assert iou(Box((5, 5, 5), (6, 6, 6)), Box((0, 0, 0), (1, 1, 1))) == 0.0
    assert iou(Box((1, 1, 1), (1, 1, 1)), Box((1, 1, 1), (1, 1, 1))) == 0.0  # nothing, not a division by zero


corners = st.tuples(*[st.integers(0, 6)] * 6).map(
    lambda c: Box(
        tuple(min(a, b) for a, b in zip(c[:3], c[3:], strict=True)),
        tuple(max(a, b) + 1 for a, b in zip(c[:3], c[3:], strict=True)),
    )
)


@given(corners, corners)
def test_iou_counts_voxels(one: Box, two: Box):
    def draw(box: Box) -> np.ndarray:
        mask = np.zeros((8, 8, 8), bool)
        mask[tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))] = True
        return mask

    first, second = draw(one), draw(two)
    assert iou(one, two) == pytest.approx((first & second).sum() / (first | second).sum())
    assert box_of_mask(first) == one


@pytest.mark.parametrize(
    ("lo", "hi", "frame", "message"),
    [
        ((0, 0), (1, 1, 1), "voxel", "as many"),
        ((2, 0, 0), (1, 1, 1), "voxel", "lo <= hi"),
        ((0, 0, math.nan), (1, 1, 1), "voxel", "lo <= hi"),
        ((0, 0, 0), (1, 1, math.inf), "voxel", "finite"),
        ((0, 0, 0), (1, 1, 1), "pixel", "unknown frame"),
    ],
)
def test_nonsense_is_refused(lo, hi, frame, message):
    with pytest.raises(ValueError, match=message):
        Box(lo, hi, frame)


def test_frames_do_not_mix():
    voxel, millimetres = Box((0, 0, 0), (1, 1, 1)), Box((0, 0, 0), (1, 1, 1), "mm")
    with pytest.raises(ValueError, match="different frames"):
        iou(voxel, millimetres)
    with pytest.raises(ValueError, match="needs a voxel box"):
        to_norm(millimetres, (2, 2, 2))
    with pytest.raises(ValueError, match="pass affine="):
        to_voxel(millimetres, (2, 2, 2))
    with pytest.raises(ValueError, match="to_voxel first"):
        millimetres.clip((2, 2, 2))


def test_clip():
    assert Box((-1, 0, 2), (9, 3, 4)).clip((5, 5, 3)) == Box((0, 0, 2), (5, 3, 3))
    assert Box((-0.5, 0, 0), (2, 0.5, 1), "norm").clip((5, 5, 5)) == Box((0, 0, 0), (1, 0.5, 1), "norm")
