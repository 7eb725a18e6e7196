"""What the commands give when all is well: words, JSON, files, and what reaches the model."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.boxes import Box


def test_report_and_ask_speak_on_stdout_and_write_nothing(fake, run, ct):
    code, out, err = run("report", ct)
    assert (code, out) == (0, "A scan of a test.\n")
    assert "Not for clinical use" in err and "warning: a warning of preparation" in err
    code, out, _ = run("ask", ct, "How large?", "--max-new-tokens", 7)
    assert (code, out) == (0, "It is large.\N{REPLACEMENT CHARACTER}[31m\n"), "no escape codes from a model"
    assert fake.calls == [("ask", ("How large?", {"max_new_tokens": 7}))]
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "words", [["report"], ["ask", "q?"], ["locate", "mandible"], ["segment", "mandible"], ["inspect"], ["demo"]]
)
def test_json_is_alone_on_stdout(words, fake, run, ct):
    name, *more = words
    code, out, _ = run(name, ct, *more, "--json", "--device", "cpu")
    facts = json.loads(out)
    assert code == 0
    assert facts["schema"].startswith("m3d.")
    assert facts["scan"]["file"] == "ct.nii.gz" and str(ct.parent) not in out
    assert facts["scan"]["shape"] == [20, 24, 16] and facts["scan"]["orientation"] == "PLI"
    assert facts["notice"] == "Not for clinical use"
    assert fake.loads == ([] if name == "inspect" else [("m3d-tiny", "cpu")])


def test_locate_gives_voxels_and_mm_and_a_picture(fake, run, ct):
    code, out, _ = run("locate", ct, "mandible", "--out", "found")
    assert code == 0
    assert "mandible: voxels (4.0, 12.0, 3.0) to (9.0, 18.0, 8.0)" in out
    assert "mm (R, A, S) (-16.5, 4.5, 2.5) to (1.5, 19.5, 27.5)" in out  # by hand from the affine
    assert {path.name for path in Path("found").iterdir()} == {"mandible.png", "result.json"}


def test_locate_says_when_there_is_no_box(fake, run, ct):
    code, out, err = run("locate", ct, "ghost")
    assert code == 0
    assert out == "There is no ghost.\n" and "no box of 'ghost'" in err


def test_segment_writes_the_mask_on_the_scans_own_grid(fake, run, ct):
    code, out, err = run("segment", ct, "mandible")
    assert code == 0
    assert re.search(r"mandible: 6\.[78] mL, score 0\.90", out), "150 voxels of 45 cubic mm are 6.75 mL"
    assert f"saved {Path('out') / 'mandible.nii.gz'}" in err
    scan, mask = nib.load(ct), nib.load("out/mandible.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, np.asarray(scan.dataobj) > 200)
    facts = json.loads(Path("out/result.json").read_text())
    assert facts["masks"][0]["file"] == "mandible.nii.gz" and facts["masks"][0]["voxels"] == 150


def test_an_empty_mask_is_written_and_not_an_error(fake, run, ct):
    assert run("segment", ct, "nothing")[0] == 0
    assert not np.asarray(nib.load("out/nothing.nii.gz").dataobj).any()


def test_points_and_boxes_reach_the_model_in_voxels(fake, run, ct):
    assert run("segment", ct, "--point", "4,5,6", "--point", "7,8,9,-", "--box", "1,2,3,10,11,12")[0] == 0
    name, points, box = fake.calls[-1][1]
    assert name is None
    assert points == [((4.0, 5.0, 6.0), 1), ((7.0, 8.0, 9.0), 0)]
    assert box == Box((1, 2, 3), (10, 11, 12))


def test_mm_are_patient_coordinates_and_may_be_negative(fake, run, ct):
    # x = 36 - 3 h, y = 30 - 3 d, z = 40 - 5 w
    words = ["--point", "-12,0,10,+", "--box", "-13.5,-4.5,7.5,-1.5,4.5,22.5", "--frame", "mm"]
    assert run("segment", ct, "mandible", *words)[0] == 0
    name, points, box = fake.calls[-1][1]
    assert name == "mandible"
    np.testing.assert_allclose(points[0][0], (10, 16, 6))
    np.testing.assert_allclose(box.lo, (9, 13, 4))
    np.testing.assert_allclose(box.hi, (12, 17, 7))


def test_npy_needs_and_takes_spacing(fake, run, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(0, 100, (8, 9, 10)).astype(np.float32))
    code, out, _ = run("inspect", tmp_path / "a.npy", "--spacing", "3,1,2", "--json")
    assert code == 0
    assert json.loads(out)["scan"]["spacing_mm"] == [3.0, 1.0, 2.0]


def test_inspect_shows_what_the_model_sees(fake, run, ct):
    code, out, err = run("inspect", ct)
    assert code == 0
    for words in ("20 x 24 x 16 voxels", "PLI", "3 x 3 x 5 mm", "-1000 to 300", "-200 to 400", "8 x 16 x 16", "crop"):
        assert words in out
    assert "saved" in err
    assert {path.name for path in Path("out").iterdir()} == {"inspect.png", "inspect.json"}
    assert json.loads(Path("out/inspect.json").read_text())["model"]["grid"] == [8, 16, 16]
