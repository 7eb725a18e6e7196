"""What the model will see: facts with known answers, a picture, and no torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.volume import Volume, spl_affine
from m3d.inference.look_at import look_at


def scan() -> Volume:
    """Air, 10 x 20 x 20 voxels of tissue in it, and one of metal."""
    array = np.full((20, 40, 40), -1000.0, np.float32)
    array[5:15, 10:30, 10:30] = 50.0
    array[10, 20, 20] = 3000.0
    return Volume(array, spl_affine((2.0, 1.0, 1.0)))


PREPROCESS = Preprocess(grid=(8, 16, 16), intensity=Window(-200, 400), crop=Foreground(-400), spacing=(3.0, 2.0, 2.0))


def test_facts_are_those_that_can_be_counted_by_hand():
    seen = look_at(scan(), PREPROCESS, model_id="tiny", path=Path("somewhere/ct.nii.gz"))
    facts = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    assert facts["schema"] == "m3d.inspect/1"
    assert facts["scan"]["file"] == "ct.nii.gz"
    assert facts["scan"]["size_mm"] == [40.0, 40.0, 40.0]
    assert facts["scan"]["range"] == [-1000.0, 3000.0]
    model = facts["model"]
    assert model["window"] == [-200, 400] and model["window_kind"] == "window"
    assert model["crop"] == {"lo": [5.0, 10.0, 10.0], "hi": [15.0, 30.0, 30.0]}
    assert model["darker"] == pytest.approx(1 - 4000 / 32000, abs=1e-4)
    assert model["brighter"] == pytest.approx(1 / 32000, abs=1e-4)
    assert model["grid"] == [8, 16, 16] and model["grid_spacing_mm"] == [3.0, 2.0, 2.0]
    assert Preprocess.from_dict(facts["preprocess"]) == PREPROCESS


def test_the_picture_has_both_rows(tmp_path):
    look_at(scan(), PREPROCESS, model_id="tiny").save_picture(tmp_path / "inspect.png")
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "inspect.png").shape
    assert height > 900 and width > 900


def test_a_checkpoint_without_preprocess_or_with_a_damaged_one_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocess\.json is missing"):
        Preprocess.read(tmp_path)
    (tmp_path / "preprocess.json").write_text('{"grid": [8, 8')
    with pytest.raises(ValueError, match=r"preprocess\.json: "):
        Preprocess.read(tmp_path)
    (tmp_path / "preprocess.json").write_text('{"grid": [8, 8, 8], "spacings": null}')
    with pytest.raises(ValueError, match="did you mean 'spacing'"):
        Preprocess.read(tmp_path)


def test_looking_needs_no_torch():
    code = """
import sys, m3d.inference.look_at, m3d.inference.results, m3d.inference.checkpoints
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
