"""How good probabilities are, against values that are known by hand or by going through all pairs."""

import numpy as np
import pytest

from m3d.bench.reliability import auc, bins_of, brier, calibration_error, draw_reliability, measures, share_right


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    said, true = rng.integers(0, 7, 60) / 6, rng.random(60) < 0.4  # with ties
    pairs = [(a > b) + (a == b) / 2 for a in said[true] for b in said[~true]]
    assert auc(said, true) == pytest.approx(np.mean(pairs))
    assert auc(said, np.ones(60, bool)) is None


def test_brier_and_shares_by_hand():
    said, true = np.array([0.9, 0.4, 0.2, 0.6]), np.array([True, True, False, False])
    assert brier(said, true) == pytest.approx((0.01 + 0.36 + 0.04 + 0.36) / 4)
    assert (share_right(said, true, kind=True), share_right(said, true, kind=False)) == (0.5, 0.5)
    assert share_right(said[:2], true[:2], kind=False) is None
    assert share_right(np.array([0.5]), np.array([True]), kind=True) == 1.0  # the threshold itself is "there"


def test_bins_hold_equally_many_in_order():
    said = np.array([0.8, 0.1, 0.3, 0.9, 0.2, 0.7])
    true = np.array([True, False, True, True, False, False])
    bins = bins_of(said, true, 3)
    assert [one.n for one in bins] == [2, 2, 2]
    assert [one.said for one in bins] == pytest.approx([0.15, 0.5, 0.85])
    assert [one.true for one in bins] == [0.0, 0.5, 1.0]
    assert (bins[1].low, bins[1].high) == (0.3, 0.7)
    assert calibration_error(bins) == pytest.approx((0.15 + 0.0 + 0.15) / 3)
    assert len(bins_of(said[:2], true[:2], 10)) == 2


def test_what_means_what_it_says_has_next_to_no_calibration_error():
    rng = np.random.default_rng(1)
    said = rng.random(20_000)
    true = rng.random(20_000) < said
    assert calibration_error(bins_of(said, true)) < 0.015
    assert calibration_error(bins_of(said**3, true)) > 0.15


def test_measures_have_intervals_over_patients():
    said, true = [0.9, 0.8, 0.3, 0.6] * 10, [True, True, False, False] * 10
    found = measures(said, true, [str(number // 4) for number in range(40)])
    assert (found["n"], found["there"], found["not there"], found["patients"]) == (40, 20, 20, 10)
    assert found["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["not there, called not there"]["value"] == 0.5
    assert sum(one["n"] for one in found["bins"]) == 40
    alone = measures([0.7, 0.9], [True, True], ["a", "b"])
    assert alone["auc"] == {"value": None, "low": None, "high": None}


def test_nothing_is_not_measured():
    with pytest.raises(ValueError, match="nothing was asked"):
        measures([], [], [])


def test_the_picture_is_a_png(tmp_path):
    found = measures([0.9, 0.1, 0.6], [True, False, True], ["a", "b", "c"])
    draw_reliability(tmp_path / "reliability.png", {"one": found, "other": found}, "a model")
    assert (tmp_path / "reliability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_reliability(tmp_path / "none.png", {}, "a model")
    assert (tmp_path / "none.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
