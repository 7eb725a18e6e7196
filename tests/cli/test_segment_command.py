"""`m3d segment` with several names, with post-processing and with a label map."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


def result() -> dict:
    return json.loads(Path("out/result.json").read_text())


@pytest.fixture
def speckled(ct) -> Path:
    """The scan with a hole in its bright block and two bright voxels elsewhere."""
    image = nib.load(ct)
    array = np.asarray(image.dataobj).copy()
    array[6, 15, 5] = 0.0
    array[12, 5, 10:12] = 300.0
    path = ct.with_name("speckled.nii.gz")
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return path


def test_masks_stay_as_drawn_unless_asked(fake, run, speckled):
    assert run("segment", speckled, "mandible")[0] == 0
    assert result()["postprocess"] == [] and result()["masks"][0]["voxels"] == 150 - 1 + 2
    assert not list(Path("out").glob("label-map*"))


@pytest.mark.parametrize(
    ("words", "voxels"),
    [
        (["--largest-component"], 149),
        (["--fill-holes"], 152),
        (["--min-volume", "0.09"], 151),  # two voxels of 45 cubic mm are 0.09 mL
        (["--min-volume", "0.1"], 149),
        (["--fill-holes", "--largest-component"], 150),
    ],
)
def test_masks_are_cleaned_as_asked_and_the_result_says_so(words, voxels, fake, run, speckled):
    assert run("segment", speckled, "mandible", *words)[0] == 0
    (how,), (mask,) = result()["postprocess"], result()["masks"]
    assert mask["voxels"] == mask["measurements"]["voxels"] == voxels
    assert mask["volume_ml"] == pytest.approx(voxels * 0.045)
    assert how["fill_holes"] == ("--fill-holes" in words)
    assert np.count_nonzero(np.asarray(nib.load("out/mandible.nii.gz").dataobj)) == voxels


def test_a_mask_that_vanishes_is_warned_of(fake, run, speckled):
    code, out, err = run("segment", speckled, "mandible", "--min-volume", "50")
    assert code == 0 and "mandible: 0.0 mL" in out
    assert "warning: the mask of 'mandible' is empty after post-processing (components of at least 50 mL)" in err


def test_a_volume_that_is_none_is_told_before_the_model_is_loaded(fake, run, ct):
    code, out, err = run("segment", ct, "mandible", "--min-volume", "-1")
    assert (code, out) == (1, "") and "the minimum volume must be 0 mL or more, got -1.0" in err
    assert not fake.loads


def test_several_names_are_one_result(fake, run, ct):
    code, out, err = run("segment", ct, "mandible", "brainstem")
    assert code == 0 and "mandible: 6." in out and "brainstem: 6." in out and "[SEG]" not in out
    assert [call[1][0] for call in fake.calls] == [["mandible", "brainstem"]]
    assert len(fake.loads) == 1
    assert [mask["file"] for mask in result()["masks"]] == ["mandible.nii.gz", "brainstem.nii.gz"]
    assert err.count("a warning of preparation") == 1
    assert result()["absent"] == []


def test_of_several_names_those_that_are_refused_are_said(fake, run, ct):
    code, out, _ = run("segment", ct, "ghost", "mandible", "--labels")
    assert code == 0 and "ghost: not drawn: the model answered 'No.' without [SEG]" in out
    assert [one["name"] for one in result()["absent"]] == ["ghost"]
    labels = json.loads(Path("out/label-map.json").read_text())["labels"]
    assert [(label["value"], label["name"], label["drawn"]) for label in labels] == [
        (1, "ghost", False),
        (2, "mandible", True),
    ]
    assert run("segment", ct, "ghost", "--force")[0] == 1, "a name that is alone"


def test_all_is_the_vocabulary_as_a_label_map(fake, run, ct):
    code, out, err = run("segment", ct, "--all", "--min-volume", "0.1")
    assert code == 0 and "mandible: 6." in out and "ghost: not drawn" in out and "nothing: 0.0 mL" in out
    assert f"saved {Path('out') / 'label-map.png'}" in err
    assert result()["postprocess"][0]["min_volume_ml"] == 0.1
    labels = json.loads(Path("out/label-map.json").read_text())["labels"]
    assert [(label["name"], label["voxels"]) for label in labels] == [("mandible", 150), ("ghost", 0), ("nothing", 0)]


@pytest.mark.parametrize("words", [["mandible"], ["--point", "4,5,6"], ["--box", "1,1,1,3,3,3"]])
def test_all_beside_something_else_is_refused(words, fake, run, ct, capsys):
    with pytest.raises(SystemExit) as stop:
        run("segment", ct, *words, "--all")
    assert stop.value.code == 2 and "--all draws all that the model has learned" in capsys.readouterr().err
    assert not fake.loads


def test_a_label_map_comes_beside_the_result(fake, run, ct):
    code, _, err = run("segment", ct, "mandible", "nothing", "--labels", "--overlaps", "last")
    assert code == 0
    for name in ("label-map.nii.gz", "label-map.txt", "label-map.ctbl", "label-map.png", "label-map.json"):
        assert f"saved {Path('out') / name}" in err and (Path("out") / name).is_file()
    facts = json.loads(Path("out/label-map.json").read_text())
    assert facts["overlaps"] == "last"
    assert [(label["name"], label["voxels"]) for label in facts["labels"]] == [("mandible", 150), ("nothing", 0)]
    labels = nib.load("out/label-map.nii.gz")
    np.testing.assert_allclose(labels.affine, nib.load(ct).affine)
    np.testing.assert_array_equal(np.asarray(labels.dataobj) == 1, np.asarray(nib.load(ct).dataobj) > 200)


def test_a_label_map_that_exists_is_told_before_the_work(fake, run, ct):
    Path("out").mkdir()
    Path("out/label-map.ctbl").write_text("mine")
    code, out, err = run("segment", ct, "mandible", "--labels")
    assert (code, out) == (1, "") and "label-map.ctbl exists; use --force" in err
    assert not fake.loads
    assert run("segment", ct, "mandible", "--labels", "--force")[0] == 0


def test_points_with_several_names_are_refused(fake, run, ct, capsys):
    with pytest.raises(SystemExit) as stop:
        run("segment", ct, "mandible", "brainstem", "--point", "4,5,6")
    assert stop.value.code == 2
    assert "--point and --box are about one structure, and 2 are named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "zoom"),
    [
        (["mandible", "--zoom"], True),
        (["mandible", "--zoom", "native"], True),
        (["mandible", "--zoom=native", "--labels"], True),
        (["mandible", "brainstem", "--zoom", "2.5"], 2.5),
        (["--all", "--zoom", "2"], 2.0),
        (["mandible"], None),
    ],
)
def test_zooming_in_is_asked_for(words, zoom, fake, run, ct):
    assert run("segment", ct, *words)[0] == 0
    assert [told for name, told in fake.calls if name == "zoom"] == ([] if zoom is None else [zoom])


@pytest.mark.parametrize("word", ["mandible", "1", "-2", "nan"])
def test_what_is_no_zoom_is_told_before_the_work(word, fake, run, ct, capsys):
    with pytest.raises(SystemExit):
        run("segment", ct, f"--zoom={word}")
    assert "is no number above 1, nor 'native'" in capsys.readouterr().err and not fake.calls
