"""Clicks of a user who knows the truth: how they are counted, what the table holds, and going on after a stop."""

import json
from types import SimpleNamespace

import clicks
import numpy as np
import pytest
from clicks import click, clicks_needed, examine, speed, table, values_of
from tiny_accuracy import Answers

import m3d
from data_prep.case import Case
from data_prep.volume import Volume, spl_affine

ABOUT = {"fingerprint": "f" * 64}
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def case() -> Case:
    """A mandible of 5 x 5 x 5 voxels, and a brainstem of 3 x 3 x 3."""
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[2:7, 2:7, 2:7], labels[10:13, 10:13, 10:13] = 7, 1
    array = np.random.default_rng(0).random(labels.shape, np.float32)
    volume = Volume(array, spl_affine(SPACING))
    return Case(id="pt_1", patient_id="pt_1", volume=volume, labels=labels, names={1: "brainstem", 7: "mandible"})


class Painter:
    """An object whose mask is, after each click, the next of a list; it keeps what it was told."""

    def __init__(self, masks, named=None) -> None:
        self.masks, self.named, self.told = list(masks), named, []
        self.current = SimpleNamespace(array=np.zeros_like(self.masks[0]))

    def add_name(self, name):
        if self.named is None:
            raise m3d.NoMask("nothing to be seen")
        self.current = SimpleNamespace(array=self.named, milliseconds=9.0)

    def add_point(self, at, *, positive):
        self.told.append((at, positive))
        mask = self.masks[min(len(self.told), len(self.masks)) - 1]
        return SimpleNamespace(array=mask, milliseconds=float(len(self.told)))


class Knowing:
    """A scan that draws the truth at the second click, and counts its sessions."""

    def __init__(self, case: Case) -> None:
        self.case, self.asked, self.blind = case, [], False

    def blinded(self):
        other = Knowing(self.case)
        other.blind = True
        return other

    def session(self, *, feedback):
        self.asked.append(feedback)
        blank = np.zeros(self.case.volume.shape, bool)
        return SimpleNamespace(object=lambda name: Painter([blank, blank if self.blind else self.case.mask(name)]))


def test_a_name_comes_before_the_clicks_and_may_be_refused(case):
    truth = case.mask("brainstem")
    wrong = np.zeros_like(truth)
    wrong[0, 0, 0] = True
    named = Painter([truth], named=truth)
    assert click(named, truth, SPACING, name="brainstem") == {
        "dice": [1.0] * 11,
        "milliseconds": [],
        "clicks": [],
    }
    refused = click(Painter([wrong] * 9), truth, SPACING, name="brainstem")
    assert refused["dice"] == [0.0] * 11 and len(refused["milliseconds"]) == 10


def test_how_many_clicks_are_needed():
    assert clicks_needed([0.0, 0.5, 0.8, 0.7]) == 2
    assert clicks_needed([0.9, 0.9]) == 0
    assert clicks_needed([0.0, 0.79]) is None


def row_of(patient: str, scores: list[float], way: str = "clicks", sight: str = "seeing") -> dict:
    about = {"patient": patient, "sight": sight, "task": way, "item": "mandible"}
    return {**about, "dice": scores, "milliseconds": [10.0, 30.0]}


def test_what_is_never_reached_counts_as_the_most_clicks():
    values = values_of(row_of("a", [0.0] + [0.5] * 10))
    assert values == {
        **{f"clicks: dice@{number}": 0.5 for number in (1, 3, 5, 10)},
        "clicks: noc80": 10.0,
        "clicks: never80": 1.0,
    }
    assert values_of(row_of("a", [0.3] * 11, way="name"))["name: dice@0"] == 0.3


def test_the_table_is_over_patients_beside_the_blind_twin():
    rows = [row_of("a", [0.0] + [0.5] * 10), row_of("b", [0.0, 0.7, 0.9] + [1.0] * 8)]
    rows += [row_of(patient, [0.0] * 11, sight="blind") for patient in "ab"]
    found = table(rows)
    first = found["clicks: dice@1/mandible"]
    assert first["value"] == pytest.approx(0.6) and (first["n"], first["patients"]) == (2, 2)
    assert (first["low"], first["high"]) == pytest.approx((0.5, 0.7))  # two patients: either alone, or both
    assert first["blind"] == 0.0 and first["gain"] == pytest.approx(0.6)
    assert found["clicks: noc80/mandible"]["value"] == pytest.approx((10 + 2) / 2)
    assert found["clicks: never80/five"]["value"] == found["clicks: never80/mean"]["value"] == 0.5
    assert speed(rows) == {"clicks": {"median": 20.0, "p90": 30.0, "n": 4}}


def test_a_stopped_run_goes_on_where_it_was(case, tmp_path):
    scans = []
    load = lambda: SimpleNamespace(look=lambda volume: scans.append(Knowing(case)) or scans[-1])  # noqa: E731
    path = tmp_path / "a.jsonl"
    examine(load, case, Answers(path, ABOUT))
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(whole) == 1 + 2 * 3 * 2  # sights, ways, structures
    assert scans[0].asked == [True, True, False, False, True, True]
    path.write_text("".join(whole[:-2]) + whole[-2][:30], encoding="utf-8")
    examine(load, case, Answers(path, ABOUT))
    assert [json.loads(line).get("item") for line in path.read_text(encoding="utf-8").splitlines()][1:] == [
        json.loads(line)["item"] for line in whole[1:]
    ]
    examine(load, case, Answers(path, ABOUT))
    assert len(scans) == 2  # nothing was left: the scan was not even looked at
    rows = list(Answers(path, ABOUT).rows.values())
    found = table(rows)
    assert (found["clicks: noc80/mean"]["value"], found["clicks: noc80/mean"]["blind"]) == (2.0, 10.0)


def test_nothing_is_measured_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clicks.py", "--data", str(tmp_path / "nowhere")])
    clicks.main()
    assert "nothing measured" in capsys.readouterr().out
