"""Numbers with their unit in answers of two languages, and names in answers of any wording."""

from types import SimpleNamespace

import numpy as np
import pytest

from m3d.bench.metrics.answers import NamesIt, NumberWithin, number_in


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("67 mL", "mL", 67.0),
        ("about 12.5mL of it", "mL", 12.5),
        ("\u4f53\u79ef\u7ea612.5 mL", "mL", 12.5),  # Chinese stands right before it
        ("\u7ea6\u4e3a12.5 mL\u7684", "mL", 12.5),  # and right behind
        ("12%\u5927", "%", 12.0),
        ("12 percent larger", "%", 12.0),
        ("1,234 mL", "mL", 1234.0),
        ("between 1,2 and 3 mL", "mL", 3.0),
        ("-30 HU", "HU", -30.0),
        ("\u221230 HU", "HU", -30.0),
        ("30 mLs", "mL", None),
        ("v2.5 mL", "mL", None),
        ("67 mm", "mL", None),
        ("", "mL", None),
    ],
)
def test_a_number_is_read_with_its_unit(text, unit, expected):
    assert number_in(text, unit) == expected


def asked(said, value=None, unit=None, reference=""):
    target = SimpleNamespace(value=value, unit=unit)
    return SimpleNamespace(said=said, reference=reference, record=SimpleNamespace(target=target))


def test_numbers_within_a_share_of_the_truth_are_right():
    samples = [
        asked("24 mL", 20.0, "mL"), asked("24.1 mL", 20.0, "mL"), asked("0.5 mL", 0.4, "mL"),
        asked("no idea", 20.0, "mL"), asked("24 mL"),
    ]  # fmt: skip
    rows = NumberWithin().statistics(samples)
    assert rows[:4].tolist() == [[1.0], [0.0], [1.0], [0.0]] and np.isnan(rows[4, 0])


def test_a_structure_is_named_in_whatever_wording_of_ours():
    reference = "The box holds the left parotid."
    said = ["Left parotid", "the left parotid.", "The right parotid", ""]
    rows = NamesIt().statistics([asked(one, reference="left parotid") for one in said])
    assert rows.tolist() == [[1.0], [1.0], [0.0], [0.0]]
    assert NamesIt().statistics([asked(reference, reference=reference)]).tolist() == [[1.0]]
