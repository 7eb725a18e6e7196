"""Boxes whose overlap is a product of whole tenths, and what the released code makes of texts."""

import math

import numpy as np
import pytest

from data_prep.record import Record
from m3d.bench.metrics.base import Sample
from m3d.bench.metrics.boxes import AccuracyAtIoU, BoxIoU, EnclosingIoU, box_metrics, matched_ious

TRUTH = (0.0, 0.0, 0.0, 0.4, 0.4, 0.4)
APART = (0.5, 0.5, 0.5, 0.9, 0.9, 0.9)
RECORD = Record.model_validate(
    {
        "id": "openkbp/1/box",
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
                "shape": [32, 64, 64],
                "axes": "DHW",
                "intensity": {"unit": "HU"},
            }
        ],
        "task": "rec.box3d",
        "prompt": {"text": "Where is the mandible?"},
        "target": {"boxes": []},
    }
)


def answer(*boxes, truth=(TRUTH,), **fields):
    return Sample(record=RECORD, boxes=boxes, true_boxes=truth, **fields)


def values(metric, *samples):
    rows = metric.statistics(samples)
    assert rows.shape == (len(samples), 1)
    return rows[:, 0].tolist()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (TRUTH, 1.0),
        ((0, 0, 0.2, 0.4, 0.4, 0.6), 1 / 3),  # half of each in common
        ((0.2, 0.2, 0.2, 0.6, 0.6, 0.6), 0.008 / (0.064 + 0.064 - 0.008)),
        ((0, 0, 0, 0.2, 0.4, 0.4), 0.5),  # a half of it
        ((0, 0, 0, 0.8, 0.8, 0.8), 1 / 8),
        (APART, 0.0),
        ((0.4, 0, 0, 0.8, 0.4, 0.4), 0.0),  # half-open: they touch
        ((0.4, 0.4, 0.4, 0, 0, 0), 1.0),  # inverted corners
        ((0.4, 0, 0, 0, 0.4, 0.4), 1.0),  # inverted along one axis
        ((-0.4, -0.1, 0, 0.4, 0.4, 0.4), 1.0),  # cut to the image
        ((-0.5, -0.5, -0.5, -0.1, -0.1, -0.1), 0.0),  # outside
        ((0.1, 0, 0, 0.1, 0.4, 0.4), 0.0),  # no volume
        ((0, 0, 0, math.nan, 0.4, 0.4), 0.0),
        ((0, 0, 0, math.inf, 0.4, 0.4), 0.0),
    ],
)
def test_true_iou(box, expected):
    assert values(BoxIoU(), answer(box)) == [pytest.approx(expected)]


def test_a_box_of_one_slice_of_32_has_an_iou():
    slice_5 = (5 / 32, 0.25, 0.25, 6 / 32, 0.75, 0.75)
    two = (5 / 32, 0.25, 0.25, 7 / 32, 0.75, 0.75)
    truth = (slice_5,)
    found = values(BoxIoU(), answer(slice_5, truth=truth), answer(two, truth=truth))
    assert found == [pytest.approx(1.0), pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("share", "expected"),  # the box is this share of the truth, which is then its IoU
    [(0.1, [0, 0, 0]), (0.2, [1, 0, 0]), (0.25, [1, 1, 0]), (0.3, [1, 1, 0]), (0.5, [1, 1, 1]), (1.0, [1, 1, 1])],
)
def test_an_iou_at_the_threshold_is_enough(share, expected):
    one = answer((0.1, 0.3, 0.7, 0.4, 0.6, 0.7 + 0.3 * share), truth=((0.1, 0.3, 0.7, 0.4, 0.6, 1.0),))
    assert [values(AccuracyAtIoU(threshold), one)[0] for threshold in (0.2, 0.25, 0.5)] == expected


def test_several_boxes_are_matched_one_to_one_for_the_largest_sum():
    """Taking the best pair first, 0.3 of 0.5 in common, would leave two boxes that are apart."""

    def along(low, high):
        return (0.0, 0.0, low, 0.4, 0.4, high)

    boxes, truth = (along(0.1, 0.5), along(0.4, 0.8)), (along(0.2, 0.6), along(0.0, 0.3))
    assert matched_ious(answer(*boxes, truth=truth)) == pytest.approx((0.2 / 0.5, 0.2 / 0.6))
    assert values(AccuracyAtIoU(0.35), answer(*boxes, truth=truth)) == [0.5]


def test_a_box_too_many_and_one_too_few_cost_their_share():
    assert matched_ious(answer(TRUTH, APART)) == pytest.approx((1.0, 0.0))
    assert values(BoxIoU(), answer(TRUTH, APART), answer(TRUTH, truth=(TRUTH, APART)), answer()) == [0.5, 0.5, 0.0]
    assert values(AccuracyAtIoU(0.5), answer(APART, TRUTH, truth=(TRUTH,))) == [0.5]


@pytest.mark.parametrize("metric", box_metrics("standard"), ids=lambda metric: metric.name)
def test_of_what_is_absent_no_box_is_right_and_any_is_wrong(metric):
    none, some = answer(truth=()), answer(TRUTH, truth=())
    assert values(metric, none, some) == [1.0, 0.0]
    failed = answer(TRUTH, failure="TimeOut: 60 s"), answer(truth=(), failure="TimeOut: 60 s")
    assert values(metric, *failed) == [0.0, 0.0]
    assert metric.worst == (0.0,) and metric.statistics([]).shape == (0, 1)


def test_values_of_samples_are_averaged():
    rows = BoxIoU().statistics([answer(TRUTH), answer((0, 0, 0, 0.2, 0.4, 0.4)), answer()])
    assert BoxIoU().reduce(rows.sum(axis=0)[None], np.array([3.0]))[0] == pytest.approx(0.5)


def test_boxes_that_are_none_are_refused_by_name():
    with pytest.raises(ValueError, match=r"openkbp/1/box: the true box .* has no volume; boxes are half-open"):
        matched_ious(answer(TRUTH, truth=((0.1, 0, 0, 0.1, 0.4, 0.4),)))
    with pytest.raises(ValueError, match=r"openkbp/1/box: a box is \(d0, h0, w0, d1, h1, w1\), got \(0.1, 0.2\)"):
        matched_ious(answer((0.1, 0.2)))
    with pytest.raises(ValueError, match="threshold of an IoU"):
        AccuracyAtIoU(0)


# -- as released ----------------------------------------------------------------------------------------------------


def said(text, **fields):
    return answer(said=text, **fields)


def test_the_released_iou_reads_the_first_box_of_the_text():
    """Moved by half along all axes: .2^3 of the box around both, .6^3; a true IoU would be .008 / .12."""
    moved = "The mandible is at <bx_start>[0.2, 0.2, 0.2, 0.6, 0.6, 0.6]<bx_end>."
    dropped = "The mandible is at [0.2, 0.2, 0.2, 0.6, 0.6, 0.6], or [0.0, 0.0, 0.0, 0.4, 0.4, 0.4]."
    by_hand = 0.008 / (0.216 + 1e-6)
    assert values(EnclosingIoU(), said(moved), said(dropped)) == [pytest.approx(by_hand, abs=1e-9)] * 2


def test_the_released_iou_reads_the_truth_from_its_text_too():
    reference = "Sure. <bx_start>[0.0, 0.0, 0.0, 0.4, 0.4, 0.2]<bx_end>"
    exact = (0.0, 0.0, 0.0, 0.4, 0.4, 0.2004)
    one = said("[0.0, 0.0, 0.0, 0.4, 0.4, 0.4]", reference=reference, truth=(exact,))
    assert values(EnclosingIoU(), one) == [pytest.approx(0.032 / (0.064 + 1e-6), abs=1e-9)]


@pytest.mark.parametrize(
    "sample",
    [
        said("There is none."),
        said(""),
        said("[0.0,0.0,0.0,0.4,0.4,0.4]"),  # without spaces
        said("[0.0, 0.0, 0.0, 0.4, 0.4, 0.4]", reference="There is none."),
        said("There is none.", reference="There is none.", truth=()),  # even a right refusal
        said("[0.0, 0.0, 0.0, 0.4, 0.4, 0.4]", truth=()),
        said("[0.0, 0.0, 0.0, 0.4, 0.4, 0.4]", failure="TimeOut: 60 s"),
    ],
)
def test_the_released_iou_is_minus_one_where_a_box_is_missing(sample):
    assert values(EnclosingIoU(), sample) == [-1.0] == list(EnclosingIoU().worst)


def test_a_box_of_no_thickness_never_scores_as_released():
    """Inclusive corners: a target of one slice begins and ends at the same number."""
    assert values(EnclosingIoU(), said("[0.1, 0.0, 0.0, 0.1, 0.4, 0.4]", truth=((0.1, 0, 0, 0.1, 0.4, 0.4),))) == [0.0]


def test_each_protocol_has_its_own_metrics():
    assert [metric.name for metric in box_metrics("standard")] == ["IoU", "Acc@0.2", "Acc@0.25", "Acc@0.5"]
    assert [metric.name for metric in box_metrics("m3d")] == ["enclosing-box IoU"]
    assert all(metric.better == "higher" and metric.unit == "" for metric in box_metrics("standard"))
    rows = EnclosingIoU().statistics([said(""), said("[0.0, 0.0, 0.0, 0.4, 0.4, 0.4]")])
    assert EnclosingIoU().reduce(rows.sum(axis=0)[None], np.array([2.0]))[0] == pytest.approx(0, abs=1e-4)
