"""How sure a number is: against scipy, against algebra, and where there is nothing to be sure of."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from m3d.bench.bootstrap import difference, drawn, estimate, summed, two_sided
from m3d.bench.metrics.base import mean


class Mean:
    name, variant, better, unit, worst = "mean", "of what is given", "higher", "", (0.0,)

    def statistics(self, samples):
        raise NotImplementedError

    def reduce(self, sums, counts):
        return mean(sums, counts)


def column(values):
    return np.array(values, dtype=np.float64)[:, None]


def test_sums_are_by_patient_and_pass_over_what_is_not_judged():
    sums = summed(column([1, 2, np.nan, 5]), ["b", "a", "a", "b"])
    assert sums.patients == ("a", "b")
    assert sums.totals.tolist() == [[2], [6]] and sums.counts.tolist() == [1, 2]
    assert summed(column([1.0]), ["a"], ["a", "z"]).counts.tolist() == [1, 0]


def test_every_resample_draws_as_many_patients_as_there_are():
    weights = drawn(7)
    assert weights.shape == (2000, 7) and (weights.sum(axis=1) == 7).all() and (weights >= 0).all()
    assert weights.mean() == 1.0 and np.array_equal(weights, drawn(7))


def test_one_sample_a_patient_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).normal(2, 1, 40)
    found = estimate(Mean(), summed(column(values), [f"{n:02}" for n in range(40)]))
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, random_state=0)
    assert found.value == pytest.approx(values.mean()) and (found.n, found.patients) == (40, 40)
    assert [found.low, found.high] == pytest.approx(list(other.confidence_interval), abs=0.03)


def test_samples_of_one_patient_are_drawn_together():
    values = column([1, 1, 1, 1, 0, 0, 0, 0])
    together = estimate(Mean(), summed(values, list("aaaabbbb")))
    apart = estimate(Mean(), summed(values, list("abcdefgh")))
    assert (together.low, together.high) == (0.0, 1.0)  # two patients: all of one, or all of the other
    assert 0 < apart.low < apart.high < 1


def test_what_is_not_there_has_no_value():
    assert estimate(Mean(), summed(column([]).reshape(0, 1), [])).value is None
    found = estimate(Mean(), summed(column([np.nan, np.nan]), ["a", "b"]))
    assert (found.value, found.low, found.high, found.n, found.patients) == (None, None, None, 0, 0)


def test_a_constant_gain_is_certain_and_other_patients_are_refused():
    values = np.random.default_rng(0).random(9)
    names = [f"{n}" for n in range(9)]
    one, other = summed(column(values + 0.25), names), summed(column(values), names)
    found = difference(Mean(), one, other)
    assert [found.value, found.low, found.high] == pytest.approx([0.25] * 3)
    with pytest.raises(ValueError, match="same patients"):
        difference(Mean(), one, summed(column(values), [*names[1:], "x"]))


def test_a_permutation_of_few_patients_is_that_of_all_exchanges():
    one, other = np.array([3.0, 1.0, 4.0, 2.5]), np.array([1.0, 1.5, 1.0, 2.0])
    gaps = one - other
    exact = np.mean([abs(np.mean(gaps * signs)) >= abs(gaps.mean()) for signs in product((1, -1), repeat=4)])
    names = list("abcd")
    found = two_sided(Mean(), summed(column(one), names), summed(column(other), names))
    assert found == pytest.approx(exact, abs=0.03)
    assert two_sided(Mean(), summed(column(one), names), summed(column(one), names)) == 1.0
