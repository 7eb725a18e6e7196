"""Where measured answers go wrong: shares and ratios by hand."""

import pytest
from evidence import by_family, ratios


def test_shares_of_right_letters_by_family_and_in_all():
    found = by_family([("volume", True, False), ("volume", True, True), ("height", False, False)])
    assert found["volume"] == {"n": 2, "true values": 1.0, "not seen": 0.5}
    assert found["mean"] == {"n": 3, "true values": pytest.approx(2 / 3), "not seen": pytest.approx(1 / 3)}


def test_ratios_are_of_what_was_measured_by_what_is_true():
    def row(value, measured, **more):
        one = {"measure": "volume", "names": ["liver"], "value": measured, "unit": "mL"}
        return {"task": "vqa.open", "sight": "seeing", "value": value, "measured": [one], **more}

    rows = [row(10.0, 12.0), row(10.0, 8.0), row(10.0, 15.0), row(10.0, None), row(10.0, 99.0, sight="blind")]
    rows += [row(10.0, 99.0, task="vqa.closed"), {"task": "look", "sight": "seeing"}]
    apart = {"measure": "larger", "names": ["a", "b"], "value": -12.0, "unit": "%"}
    signed = {"task": "vqa.open", "sight": "seeing", "value": 10.0, "measured": [apart]}
    assert ratios([signed]) == {"larger: a, b": {"n": 1, "median ratio": 1.2}}  # how much, not which way
    assert ratios(rows) == {"volume: liver": {"n": 3, "median ratio": 1.2}}
