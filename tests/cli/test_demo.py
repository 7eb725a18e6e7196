"""`m3d demo`: which scan it takes and why, what it writes, and that finding nothing is no failure."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep import openkbp
from m3d.cli import demo, demo_scan
from m3d.cli.demo import hard_dice


@pytest.fixture
def case(ct) -> Path:
    """A folder with a scan and contours: the bright block is the mandible; the spinal cord is elsewhere."""
    scan = nib.load(ct)
    labels = np.zeros(scan.shape, np.uint8)
    labels[np.asarray(scan.dataobj) > 200] = 7
    labels[4:9, 12:15, 3:8] = 1  # half of the block
    labels[12:14, 10:12, 5:9] = 2
    nib.save(nib.Nifti1Image(labels, scan.affine), ct.parent / "structures.nii.gz")
    return ct.parent


@pytest.fixture
def offline(monkeypatch):
    def fail(cache, **_):
        raise openkbp.FetchFailed("https://example.org: could not be downloaded (no network)")

    monkeypatch.setattr(openkbp, "fetch_case", fail)


def test_dice_by_hand():
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    a[:2], b[1:3] = True, True
    assert hard_dice(a, b) == 0.5
    assert hard_dice(a, a) == 1.0
    assert hard_dice(a & False, a & False) == 1.0
    assert hard_dice(a & False, b) == 0.0


def test_a_named_case_is_judged_against_its_contours(fake, run, case):
    code, out, err = run("demo", case / "ct.nii.gz")
    assert code == 0
    assert "named on the command line" in err
    assert "Dice 0.67" in out  # 75 of 150 voxels: 2 * 75 / (150 + 75)
    assert "Not for clinical use" in out
    facts = json.loads(Path("out/demo.json").read_text())
    scores = {step["what"]: (step["score_name"], step["score"]) for step in facts["steps"]}
    assert scores["mask of the mandible"] == ("Dice", pytest.approx(2 / 3, abs=1e-4))
    assert scores["mask of the spinal cord"] == ("Dice", 0.0)
    assert scores["box of the brainstem"] == ("IoU", 0.5)
    files = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert files == {
        "demo.json",
        "overview.png",
        "report/result.json",
        "answer/result.json",
        "box/result.json",
        "box/brainstem.png",
        *(f"mask_mandible/{name}" for name in ("mandible.nii.gz", "mandible.png", "result.json")),
        *(f"mask_spinal_cord/{name}" for name in ("spinal_cord.nii.gz", "spinal_cord.png", "result.json")),
    }


def test_a_folder_with_a_case_and_a_scan_without_contours_are_taken_too(fake, run, case):
    assert run("demo", case, "--out", "a")[0] == 0
    (case / "structures.nii.gz").unlink()
    code, out, _ = run("demo", case / "ct.nii.gz", "--out", "b", "--json")
    facts = json.loads(out)
    assert code == 0
    assert all(step["score"] is None for step in facts["steps"])


def test_contours_that_do_not_fit_are_said_and_not_used(fake, run, case):
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), case / "structures.nii.gz")
    code, _, err = run("demo", case / "ct.nii.gz")
    assert code == 0 and "structures.nii.gz beside it is not used" in err


def test_order_of_choice(case, tmp_path, monkeypatch, offline):
    assert demo_scan.choose(case / "ct.nii.gz").kind == "named"
    assert demo_scan.choose(None, phantom=3).kind == "phantom"

    data = tmp_path / "data"
    shutil.copytree(case, data / "openkbp" / "validation" / "pt_9")
    shutil.copytree(case, data / "openkbp" / "train" / "pt_1")
    monkeypatch.setenv("M3D_DATA", str(data))
    chosen = demo_scan.choose(None)
    assert chosen.kind == "data" and "pt_9" in chosen.reasons[-1]

    shutil.rmtree(data)
    data.mkdir()
    monkeypatch.setattr(openkbp, "fetch_case", lambda cache, **_: case)
    chosen = demo_scan.choose(None)
    assert chosen.kind == "download"
    assert any("holds no case" in reason for reason in chosen.reasons)


def test_training_patients_are_never_taken(case, tmp_path, monkeypatch, offline):
    data = tmp_path / "data"
    shutil.copytree(case, data / "train" / "pt_1")
    monkeypatch.setenv("M3D_DATA", str(data))
    assert demo_scan.choose(None, phantom=None).kind == "phantom"


def test_without_network_a_phantom_is_made_and_kept(fake, run, offline):
    code, out, err = run("demo", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["scan"]["source"] == "phantom"
    for words in ("no scan was named", "$M3D_DATA is not set", "no network", "not a patient"):
        assert words in err and any(words in reason for reason in facts["scan"]["why"])
    phantom = nib.load("out/phantom.nii.gz")
    assert list(phantom.shape) == facts["scan"]["shape"]
    assert all(step["score"] is not None for step in facts["steps"] if step["what"].startswith("mask"))
    question = next(step for step in facts["steps"] if step["folder"] == "answer")
    assert question["truth"], "a phantom knows its answers"


def test_a_cache_that_cannot_be_written_is_no_failure(monkeypatch):
    def fail(cache, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(openkbp, "fetch_case", fail)
    chosen = demo_scan.choose(None)
    assert chosen.kind == "phantom"
    assert any("XDG_CACHE_HOME" in reason for reason in chosen.reasons)


def test_a_model_that_finds_nothing_is_said_and_the_rest_goes_on(fake, run, case, monkeypatch):
    monkeypatch.setattr(demo, "DRAWN", ("ghost", "nothing"))
    monkeypatch.setattr(demo, "BOXED", ("ghost",))
    (case / "structures.nii.gz").unlink()
    code, out, err = run("demo", case / "ct.nii.gz")
    assert code == 0
    assert "mask of the ghost: nothing drawn" in err
    assert "without [SEG]" in out and "the model drew nothing in this scan" in out and "the model named no box" in out
    assert not Path("out/mask_ghost").exists()
    assert json.loads(Path("out/demo.json").read_text())["steps"][-1]["problem"]
    assert not Path("out/overview.png").exists()


def test_another_structures_mask_is_not_counted_as_the_one_asked_for(fake, run, case, monkeypatch):
    monkeypatch.setattr(demo, "DRAWN", ("impostor", "mandible"))
    monkeypatch.setitem(openkbp.NAMES, 7, "impostor")
    monkeypatch.setitem(openkbp.NAMES, 1, "mandible")
    code, out, _ = run("demo", case / "ct.nii.gz", "--json")
    steps = {step["what"]: step for step in json.loads(out)["steps"]}
    assert code == 0
    assert steps["mask of the impostor"]["score"] == 0.0
    assert steps["mask of the impostor"]["problem"] == "the model drew something else: larynx (6.7 mL)"
    assert steps["mask of the mandible"]["score"] > 0.5


def test_a_later_demo_with_force_leaves_no_older_overview(fake, run, case, monkeypatch):
    assert run("demo", case / "ct.nii.gz")[0] == 0
    assert Path("out/overview.png").exists()
    monkeypatch.setattr(demo, "DRAWN", ("ghost", "nothing"))
    monkeypatch.setattr(demo, "BOXED", ("ghost",))
    (case / "structures.nii.gz").unlink()
    assert run("demo", case / "ct.nii.gz", "--force")[0] == 0
    assert not Path("out/overview.png").exists()


def test_a_real_case(fake, run, shared_data):
    patients = sorted((shared_data / "data" / "openkbp" / "validation").glob("*/ct.nii.gz"))
    if not patients:
        pytest.skip("no OpenKBP validation patients here")
    code, out, _ = run("demo", patients[0], "--json")
    assert code == 0
    assert {step["score_name"] for step in json.loads(out)["steps"]} >= {"Dice"}
