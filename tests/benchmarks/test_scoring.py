"""What the tables are made of: masks, words, and intervals whose width is known."""

import math

import numpy as np
import pytest
import scoring

BOX = (slice(2, 6), slice(4, 12), slice(6, 12))


def block(shape=(8, 16, 24), at=BOX) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def row(task: str, item: str, patient: str = "pt_1", sight: str = "seeing", **more) -> dict:
    return {"patient": patient, "sight": sight, "task": task, "item": item, **more}


# -- masks ----------------------------------------------------------------------------------------------------------


def test_a_refusal_counts_0():
    assert scoring.mask_row(None, block(), (1, 1, 1)) == {"dice": 0.0, "nsd": 0.0, "drawn": False}
    assert scoring.mask_row(block(), block(), (1, 1, 1)) == {"dice": 1.0, "nsd": 1.0, "drawn": True}


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("67 mL", "mL", 67.0), ("It is -31.5 HU.", "HU", -31.5), ("12 percent", "%", 12.0), ("12 %", "%", 12.0),
     ("67 mm", "mL", None), ("about sixty", "mL", None), ("<bx_start>[0.578, 0.3]<bx_end>", "mm", None)],
)  # fmt: skip
def test_a_number_is_read_with_its_unit(text, unit, value):
    assert scoring.number_in(text, unit) == value


def test_relative_errors():
    assert scoring.relative_error(24.0, 20.0) == pytest.approx(0.2)
    assert scoring.relative_error(-10.0, -20.0) == 0.5
    assert scoring.relative_error(0.5, 0.0) == 0.5  # of 1, where the truth is less
    assert scoring.relative_error(None, 20.0) == math.inf


def test_facts_of_a_report_are_its_sentences():
    truth = (
        "Head and neck CT, 300 mm from top to bottom. The brainstem measures 30 mL. The larynx runs out of the scan."
    )
    said = "Head and neck CT, 310 mm from top to bottom. The brainstem measures 20 mL."
    assert scoring.facts_right(said, truth) == ([1.0, 0.0, 0.0], [1.0, 0.0])
    assert scoring.facts_right(truth, truth) == ([1.0] * 3, [1.0] * 3)
    assert scoring.facts_right("", truth) == ([0.0] * 3, [])


def test_a_closed_answer_is_read_by_letter_or_words():
    asked = row("vqa.closed", "volume/0", options=["less than 10 mL", "more than 10 mL"], choice=1)
    for said, right in (("B. more than 10 mL", 1.0), ("A.", 0.0), ("more than 10 mL", 1.0), ("Here it is.", 0.0)):
        assert scoring.values_of({**asked, "text": said}) == {"vqa/volume": [right]}


# -- how sure -------------------------------------------------------------------------------------------------------


def patients(values) -> dict[str, list[float]]:
    return {f"pt_{number}": [float(value)] for number, value in enumerate(values)}


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0.6, 0.1, 200)
    found = scoring.measured([patients(values)])
    error = values.std() / math.sqrt(len(values))  # a bootstrap's standard error: that of the sample itself
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (found["n"], found["patients"]) == (200, 200)


def test_the_same_value_in_all_patients_is_certain():
    found = scoring.measured([patients([0.5] * 10)])
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.5, 0.5)


def test_questions_of_one_patient_count_as_one_piece_of_evidence():
    values = np.random.default_rng(2).random(30)
    once = scoring.measured([patients(values)])
    often = scoring.measured([{name: one * 10 for name, one in patients(values).items()}])
    assert often["n"] == 300
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))


def test_twins_that_differ_by_a_constant_have_a_certain_gain():
    values = np.random.default_rng(3).random(20)
    found = scoring.measured([patients(values + 0.1)], [patients(values)])
    assert (found["gain"], found["gain_low"], found["gain_high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert found["high"] - found["low"] > 0.1
    assert found["blind"] == pytest.approx(values.mean())


def test_a_mean_over_structures_weighs_rare_ones_alike():
    often, rare = patients([1.0] * 9), {"pt_0": [0.0]}
    found = scoring.measured([often, rare])
    assert found["value"] == 0.5
    assert (found["low"], found["high"]) == (0.5, 1.0)  # a resample without pt_0 has only the other structure


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 3.0], [5.0]])
def test_the_median_is_numpys(values):
    names = [f"pt_{number}" for number in range(len(values))]
    once = np.ones((1, len(values)), np.int64)
    assert scoring.median([patients(values)], names, once)[0] == np.median(values)


def test_the_median_of_a_resample_counts_patients_as_often_as_drawn():
    weights = np.array([[2, 0, 1], [0, 1, 2]])  # 1, 1, 9 and 5, 9, 9
    assert scoring.median([patients([1, 5, 9])], ["pt_0", "pt_1", "pt_2"], weights).tolist() == [1.0, 9.0]


def test_a_median_without_numbers_is_none():
    found = scoring.measured([patients([math.inf] * 4)], [patients([1.0] * 4)], scoring.median)
    assert (found["value"], found["high"], found["gain"], found["blind"]) == (None, None, None, 1.0)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_of_a_few_rows():
    rows = []
    for number, (seen, blind) in enumerate([(0.8, 0.2), (0.6, 0.0)]):
        for sight, value in (("seeing", seen), ("blind", blind)):
            at = {"patient": f"pt_{number}", "sight": sight}
            rows += [row("dice", name, dice=value, nsd=value / 2, **at) for name in ("mandible", "brainstem", "larynx")]
            answer = "B." if sight == "seeing" else "?"
            rows.append(row("vqa.closed", "volume/0", options=["a", "b", "c", "d"], choice=1, text=answer, **at))
            truth = {"truth": "20 mL", "value": 20.0, "unit": "mL"}
            rows.append(row("vqa.open", "volume/0", text="22 mL" if sight == "seeing" else "", **truth, **at))
            rows.append(row("reg", "left parotid", text="It is the left parotid.", **at))
            rows.append(row("look", "look", **at))
    table = scoring.score(rows)
    assert table["dice/mandible"]["value"] == pytest.approx(0.7)
    assert table["dice/five"]["n"] == 4  # the larynx is none of them
    assert table["dice/mean"]["n"] == 6
    assert table["nsd/mean"]["blind"] == pytest.approx(0.05)
    assert (table["vqa/mean"]["value"], table["vqa/mean"]["blind"], table["vqa/mean"]["chance"]) == (1.0, 0.0, 0.25)
    assert (table["vqa/volume"]["unparsable"], table["vqa/volume"]["blind_unparsable"]) == (0.0, 1.0)
    assert (table["vqa/gain"]["value"], table["vqa/gain"]["low"]) == (1.0, 1.0)
    assert (table["open/mean"]["value"], table["within20/mean"]["value"]) == (0.0, 1.0)
    assert (table["error/median"]["value"], table["error/median"]["blind"]) == (pytest.approx(0.1), None)
    assert table["reg/left parotid"]["value"] == 1.0


def test_a_table_without_a_twin():
    table = scoring.score([row("dice", "mandible", dice=0.5, nsd=0.4)])
    assert set(table) == {"dice/mandible", "dice/five", "dice/mean", "nsd/mandible", "nsd/five", "nsd/mean"}
    assert "blind" not in table["dice/five"]
