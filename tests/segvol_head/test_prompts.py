"""Prompts refuse what contradicts itself; simulated clicks and boxes lie where they should."""

import pytest
import torch

from segvol_head.prompts import Prompts, box_of, sample_points


def test_they_count_move_and_select_together():
    prompts = Prompts(points=torch.rand(3, 2, 3), point_labels=torch.tensor([[1, 0], [1, -1], [0, 0]]))
    assert len(prompts) == len(prompts.to("cpu")) == 3
    chosen = prompts[torch.tensor([2, 0])]
    assert torch.equal(chosen.points, prompts.points[[2, 0]])
    assert chosen.point_labels.tolist() == [[0, 0], [1, 0]]
    assert len(prompts[0:0]) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one of"),
        ({"text": torch.zeros(4)}, r"text must be \(P, C\), got \(4,\)"),
        ({"boxes": torch.zeros(1, 4)}, r"boxes must be \(P, 6\), got \(1, 4\)"),
        ({"points": torch.zeros(1, 3), "point_labels": torch.zeros(1, 1)}, r"points must be \(P, N, 3\)"),
        ({"mask": torch.zeros(1, 2, 4, 4, 4)}, "one channel"),
        ({"points": torch.zeros(1, 2, 3)}, "point_labels is missing"),
        ({"point_labels": torch.zeros(1, 2)}, "points is missing"),
        ({"points": torch.zeros(1, 2, 3), "point_labels": torch.zeros(1, 3)}, r"need point_labels \(1, 2\)"),
        ({"points": torch.zeros(1, 1, 3), "point_labels": torch.full((1, 1), 2)}, r"got \[2\]"),
        ({"text": torch.zeros(2, 4), "boxes": torch.zeros(3, 6)}, "'text': 2, 'boxes': 3"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Prompts(**given)


def test_box_of_a_mask_has_inclusive_corners():
    mask = torch.zeros(5, 6, 7, dtype=torch.bool)
    assert box_of(mask) is None
    mask[1:3, 2:6, 4] = True
    assert box_of(mask).tolist() == [1, 2, 4, 2, 5, 4]


def test_simulated_clicks_lie_in_and_out():
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[1, 1, 1:3] = True
    points, labels = sample_points(mask, positive=4, negative=3, generator=torch.Generator().manual_seed(0))
    assert points.shape == (8, 3)
    at = mask[tuple(points[labels >= 0].long().T)]
    assert torch.equal(at, labels[labels >= 0] == 1)
    assert labels.tolist() == [1, 1, 1, 0, 0, 0, -1, -1]  # one, both voxels again, three outside, two missing


def test_nothing_to_click_on_is_a_padding_point():
    points, labels = sample_points(torch.zeros(2, 2, 2), positive=4, negative=0)
    assert points.tolist() == [[-1, -1, -1]]
    assert labels.tolist() == [-1]
