"""Zooming in, measured: what is asked, how it is told from the same without, and what a command takes."""

import os
import subprocess
import sys

import large_volume
import numpy as np
import pytest
import zoom
from tiny_accuracy import Answers

import m3d
from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.volume import Volume, spl_affine
from m3d.inference.results import FoundMask, Result


@pytest.fixture(scope="module")
def case() -> Case:
    """A mandible of 5 x 5 x 5 voxels, and a brainstem of 3 x 3 x 3."""
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[2:7, 2:7, 2:7], labels[10:13, 10:13, 10:13] = 7, 1
    array = np.random.default_rng(0).random(labels.shape, np.float32)
    volume = Volume(array, spl_affine((1.0, 1.0, 1.0)))
    return Case(id="pt_1", patient_id="pt_1", volume=volume, labels=labels, names={1: "brainstem", 7: "mandible"})


class Knowing:
    """Draws the truth from closer, and without only what lies beyond the fourth slice; refuses the brainstem's name."""

    def __init__(self, case: Case) -> None:
        self.case, self.asked = case, []

    def look(self, volume):
        return self

    def segment(self, name=None, *, points=None, box=None, zoom=False) -> Result:
        self.asked.append((name, points, box, zoom))
        if name == "brainstem":
            raise m3d.NoMask("nothing to be seen")
        meant = name or next(
            one
            for one in self.case.present
            if (box == box_of_mask(self.case.mask(one)) if box else self.case.mask(one)[points[0][0]])
        )
        mask = self.case.mask(meant).copy()
        if zoom is False:
            mask[:4] = False
        found = FoundMask(name or "prompted", mask, 0.9, 0.1)
        return Result("segment", "", "", (), (found,), self.case.volume, None, "knowing", {}, (), 0.1)


def test_every_structure_is_drawn_each_way_with_and_without(case, tmp_path):
    scan, answers = Knowing(case), Answers(tmp_path / "lines.jsonl", {"fingerprint": "f"})
    zoom.examine(lambda: scan, case, ["2", "native"], answers)
    assert len(answers.rows) == 2 * 3 * 3
    assert [asked[3] for asked in scan.asked[:3]] == [False, 2.0, True]
    points = [asked[1] for asked in scan.asked if asked[1]]
    assert {points[0][0], points[3][0]} == {((4, 4, 4), 1), ((11, 11, 11), 1)}
    zoom.examine(lambda: pytest.fail("nothing is left to draw"), case, ["2", "native"], answers)
    found = zoom.table(list(answers.rows.values()), ["2", "native"])
    mandible = found["box: dice, native/mandible"]
    assert mandible["value"] == 1 and mandible["without"] == pytest.approx(2 * 75 / (75 + 125))
    assert mandible["gain"] == pytest.approx(0.25) and mandible["n"] == 1
    assert found["name: dice, 2/brainstem"]["value"] == 0  # a refusal
    assert found["name: dice, 2/mean"]["value"] == 0.5


def test_a_commands_own_peak_is_told_whatever_its_parent_holds():
    held = np.ones(60_000_000)  # 480 MB
    taken = large_volume.timed([sys.executable, "-c", "x = bytearray(150_000_000)"], dict(os.environ))
    assert held.nbytes / 1e6 > 400 > taken["peak_mb"] > 150
    assert 0 < taken["cpu_seconds"] <= taken["seconds"] * 4
    with pytest.raises(subprocess.CalledProcessError):
        large_volume.timed([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))
