"""Closed questions: right, wrong, unread, and what the released letter-dot makes of each."""

import math

import numpy as np
import pytest

from data_prep.record import Record
from m3d.bench.metrics.base import Sample
from m3d.bench.metrics.choices import Accuracy, LetterDot, LikelihoodAccuracy, Unparsed, chance, choice_metrics

FOUR = ("Liver", "Right kidney", "Spleen", "Pancreas")
RECORD = Record.model_validate(
    {
        "id": "m3dvqa/1/q7",
        "image_id": "1",
        "patient_id": "1",
        "split": "test",
        "source": {"dataset": "M3D-VQA"},
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
        "task": "vqa.closed",
        "prompt": {"text": "Which organ shows a mass?"},
        "target": {"options": FOUR, "choice": 1},
    }
)


def answer(choice=None, *, options=FOUR, true_choice=1, **fields):
    return Sample(record=RECORD, options=options, choice=choice, true_choice=true_choice, **fields)


def values(metric, *samples):
    rows = metric.statistics(samples)
    assert rows.shape == (len(samples), 1)
    return rows[:, 0].tolist()


FAILED = answer(1, said="B. Right kidney", likelihoods=(-2.0, -1.0, -3.0, -4.0), failure="TimeOut: 60 s")


def test_accuracy_counts_the_option_that_was_read():
    samples = [answer(1), answer(0), answer(None), FAILED, answer(0, true_choice=0)]
    assert values(Accuracy(), *samples) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert values(Unparsed(), *samples) == [0.0, 0.0, 1.0, 1.0, 0.0]
    rows = Accuracy().statistics(samples)
    assert Accuracy().reduce(rows.sum(axis=0)[None], np.array([5.0]))[0] == pytest.approx(0.4)
    assert Accuracy().worst == (0.0,) and Unparsed().worst == (1.0,)


def test_what_has_no_right_option_is_not_judged():
    """Nothing read beside nothing true is no agreement."""
    for metric in (Accuracy(), Unparsed(), LetterDot(), LikelihoodAccuracy()):
        assert np.isnan(metric.statistics([answer(None, true_choice=None)])).all()
        assert metric.statistics([]).shape == (0, 1)


@pytest.mark.parametrize(
    ("likelihoods", "expected"),
    [
        ((-2.0, -1.0, -3.0, -4.0), 1.0),
        ((-1.0, -2.0, -3.0, -4.0), 0.0),
        ((-1.0, -1.0, -3.0, -4.0), 0.5),  # two equals
        ((-5.0, -5.0, -5.0, -5.0), 0.25),  # knows nothing: chance
        ((-1.0, -2.0, -1.0, -4.0), 0.0),
        ((-math.inf, -9.0, -math.inf, -math.inf), 1.0),
    ],
)
def test_the_likeliest_option(likelihoods, expected):
    assert values(LikelihoodAccuracy(), answer(0, likelihoods=likelihoods)) == [expected]


def test_likelihoods_are_judged_where_they_are_given():
    given = answer(likelihoods=(-2.0, -1.0, -3.0, -4.0))
    np.testing.assert_equal(values(LikelihoodAccuracy(), given, answer(), FAILED), [1.0, math.nan, 0.0])
    assert np.isnan(values(LikelihoodAccuracy(), answer(), FAILED)).all()  # a system that gives none
    assert values(LikelihoodAccuracy(), FAILED) == [0.0]
    with pytest.raises(ValueError, match="m3dvqa/1/q7: 2 likelihoods for 4 options"):
        LikelihoodAccuracy().statistics([answer(likelihoods=(-1.0, -2.0))])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B. Right kidney", 1.0),
        ("The answer is B.", 1.0),
        ("A. MRB. Liver", 1.0),  # within a word, and though A was chosen
        ("B", 0.0),
        ("(B) Right kidney", 0.0),
        ("b. right kidney", 0.0),
        ("Right kidney", 0.0),
        ("", 0.0),
    ],
)
def test_letter_dot_as_released(text, expected):
    assert values(LetterDot(), answer(said=text, reference="B. Right kidney")) == [expected]
    assert values(LetterDot(), answer(said=text)) == [expected]


def test_letter_dot_judges_no_question_without_letters():
    yes_no = {"options": ("Yes", "No"), "true_choice": 0}
    samples = answer(0, said="Yes", reference="Yes", **yes_no), answer(0, said="A. Yes", reference="A. Yes", **yes_no)
    np.testing.assert_equal(values(LetterDot(), *samples), [math.nan, 1.0])
    assert values(LetterDot(), FAILED) == [0.0]
    with pytest.raises(ValueError, match="m3dvqa/1/q7: option 27 has no letter"):
        LetterDot().statistics([answer(options=tuple(map(str, range(30))), true_choice=26)])


def test_chance_is_that_of_the_options():
    assert chance([answer(), answer(options=("Yes", "No"), true_choice=0)]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert chance([]) is None and chance([answer(options=())]) is None


def test_each_protocol_has_its_own_metrics():
    standard = choice_metrics("standard")
    assert [(metric.name, metric.better) for metric in standard] == [
        ("accuracy", "higher"),
        ("accuracy by likelihood", "higher"),
        ("unparsed", "lower"),
    ]
    assert [metric.name for metric in choice_metrics("m3d")] == ["letter-dot accuracy"]
    assert len({metric.variant for metric in (*standard, *choice_metrics("m3d"))}) == 4
