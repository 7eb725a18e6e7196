"""The bundle draws what the model draws: to the voxel of points and boxes, nearly so of names, by MONAI's command."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from jsonschema import Draft7Validator
from monai.bundle import ConfigParser

import m3d
from data_prep.phantoms import head_neck
from data_prep.preprocess import Preprocess
from data_prep.write import write_volume
from m3d.export.bundle import export_bundle, structures_of
from m3d.export.in_monai import read_network, scans
from m3d.inference.checkpoints import resolve
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.recipes.pretrain_segvol import save_segvol
from tests.conftest import GRID

NAMES = ["mandible", "spinal cord"]
COMMAND = [sys.executable, "-m", "monai.bundle"]
TENSOR = {"type": "object", "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range",
                                         "is_patch_data", "channel_def"]}  # fmt: skip
DESCRIBED = {  # MONAI Bundle Specification, "metadata.json File": the mandatory keys
    "type": "object",
    "required": ["version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
                 "description", "authors", "copyright", "network_data_format"],
    "properties": {
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {kind: {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
                           for kind in ("inputs", "outputs")},
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    done = export_bundle(resolve("m3d-tiny"), folder, NAMES)
    assert any("without a volume" in note for note in done.notes)
    return folder


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom whose axes are none of the model's, tilted a little, as a NIfTI."""
    volume = head_neck(20_001, shape=(48, 72, 72), spacing=(5.0, 6.0, 6.0), orientation="IRA").volume
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    path = tmp_path_factory.mktemp("scans") / "ct.nii.gz"
    write_volume(path, m3d.Volume(volume.array, tilt @ volume.affine))
    return path


@pytest.fixture(scope="module")
def scan(ct: Path) -> m3d.Scan:
    return m3d.load("m3d-tiny", device="cpu").look(ct)


OUT = tempfile.TemporaryDirectory()


def draw(folder: Path, image: Path, **given: object) -> np.ndarray:
    """What ``inference.json`` does, without the engine around it."""
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.update(
        {"bundle_root": str(folder), "image": str(image), "device": "cpu", "output_dir": str(OUT.name), **given}
    )
    parser.parse()
    item = parser.get_parsed_content("dataset")[0]
    network = parser.get_parsed_content("network")
    batch = {name: one[None] for name, one in item["prompts"].items()}
    with torch.inference_mode():
        item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], network, **batch)[0]
    drawn = parser.get_parsed_content("postprocessing")(item)["pred"]
    assert np.array_equal(np.asarray(drawn.affine), nib.load(image).affine)
    return np.asarray(drawn)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_points_and_boxes_draw_the_same_voxels(bundle: Path, ct: Path, scan: m3d.Scan):
    truth = scan.segment("mandible").masks[0].array
    inside = [float(side) for side in np.argwhere(truth)[len(np.argwhere(truth)) // 2]]
    (expected,) = scan.segment(points=[(tuple(inside), 1), ((1.0, 2.0, 3.0), 0)]).masks
    drawn = draw(bundle, ct, structures=[], points=[[*inside, 1], [1, 2, 3, 0]])
    assert expected.array.any() and np.array_equal(drawn[0], expected.array)
    mm = scan.volume.to_mm([inside])[0].tolist()
    in_mm = draw(bundle, ct, structures=[], points=[[*mm, 1]], frame="mm")
    assert np.array_equal(in_mm, draw(bundle, ct, structures=[], points=[[*inside, 1]]))

    lo, hi = np.argwhere(truth).min(axis=0).tolist(), (np.argwhere(truth).max(axis=0) + 1).tolist()
    (expected,) = scan.segment(box=m3d.Box(tuple(lo), tuple(hi))).masks
    drawn = draw(bundle, ct, structures=[], box=[*lo, *hi])
    assert expected.array.any() and np.array_equal(drawn[0], expected.array)


def test_names_draw_nearly_the_same(bundle: Path, ct: Path, scan: m3d.Scan):
    """The language model has not seen the volume, so its vectors differ a little."""
    drawn = draw(bundle, ct)
    assert drawn.shape == (1, *scan.volume.shape) and drawn.dtype == np.uint8
    apart = draw(bundle, ct, separate=True).astype(bool)
    for number, name in enumerate(NAMES):
        expected = scan.segment(name).masks[0].array
        assert dice(apart[number], expected) > 0.85, name
        assert np.array_equal(draw(bundle, ct, structures=[name])[0], apart[number])
        written = nib.load(Path(OUT.name) / f"ct_{name.replace(' ', '_')}.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), apart[number])
        assert np.array_equal(written.affine, nib.load(ct).affine)
    alone = apart.sum(axis=0) == 1
    for number in range(2):
        assert np.array_equal(drawn[0][alone] == number + 1, apart[number][alone])
    assert np.array_equal(drawn[0] > 0, apart.any(axis=0))


def test_what_cannot_be_drawn_is_an_error(bundle: Path, ct: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no structure 'liver' in this bundle; it has mandible, spinal cord"):
        read_network(bundle / "models", ["liver"])
    network = read_network(bundle / "models")
    points = {"points": torch.zeros(1, 1, 3), "point_labels": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="about one structure; structures has 2"):
        network(torch.zeros(1, 1, 64, 64, 96), **points)
    with pytest.raises(FileNotFoundError, match="no such scan; name one with --image"):
        scans(str(tmp_path / "no.nii.gz"), ".")
    with pytest.raises(FileNotFoundError, match=r"no \*\.nii"):
        scans(None, tmp_path)
    assert scans(None, ct.parent) == [{"image": str(ct)}]


def test_the_folder_is_a_bundle(bundle: Path):
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "configs/metadata.json", "configs/inference.json", "configs/logging.conf", "models/config.json",
        "models/model.safetensors", "models/preprocess.json", "docs/README.md", "LICENSE", "m3d_export.json",
    }  # fmt: skip
    described = json.loads((bundle / "configs" / "metadata.json").read_text())
    Draft7Validator(DESCRIBED).validate(described)
    out = described["network_data_format"]["outputs"]["pred"]
    assert out["channel_def"] == {"0": "mandible", "1": "spinal cord"} and out["num_channels"] == 2
    assert described["required_packages_version"]["m3d-lamed"] == m3d.__version__
    assert "not for clinical use" in (bundle / "docs" / "README.md").read_text()
    assert "Apache License" in (bundle / "LICENSE").read_text()


def test_a_head_without_a_language_model_draws_what_is_pointed_at(model, tmp_path: Path):
    torch.manual_seed(0)
    head = PromptedSegVol(M3DSegVolConfig.within(model.config, "it"))
    (tmp_path / "head").mkdir()
    save_segvol(tmp_path / "head", head, Preprocess(grid=GRID))
    export_bundle(tmp_path / "head", tmp_path / "bundle", [])
    network = read_network(tmp_path / "bundle" / "models")
    pixels, boxes = torch.rand(1, 1, *GRID), torch.tensor([[1.0, 2, 3, 5, 9, 12]])
    with torch.inference_mode():
        drawn = network(pixels, boxes=boxes)
        torch.testing.assert_close(drawn.shape, (1, 1, *GRID))
        with pytest.raises(ValueError, match="nothing says what to draw"):
            network(pixels)
    with pytest.raises(ValueError, match="no language model to read --structures with"):
        export_bundle(tmp_path / "head", tmp_path / "other", ["liver"])
    with pytest.raises(ValueError, match="does not say what it was taught to draw: give --structures"):
        structures_of(tmp_path / "head", None)
    assert structures_of(tmp_path / "head", " a, b,") == ["a", "b"]


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("fire") and find_spec("ignite")), reason="pip install 'm3d-lamed[bundle]'")
def test_monais_own_command_draws_it(bundle: Path, ct: Path, tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(DESCRIBED))  # that of MONAI is behind an address; this one is the specification's text
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def monai(*words: object) -> str:
        done = subprocess.run(
            [*COMMAND, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = monai("verify_metadata", "--meta_file", bundle / "configs" / "metadata.json", "--filepath", schema)
    assert "metadata is verified with no error" in said
    monai(
        *("run", "--config_file", bundle / "configs" / "inference.json", "--bundle_root", bundle, "--image", ct),
        *("--output_dir", tmp_path / "out", "--structures", "['mandible']"),
    )
    (written,) = (tmp_path / "out").glob("*")
    image = nib.load(written)
    assert written.name == "ct_seg.nii.gz" and np.array_equal(image.affine, nib.load(ct).affine)
    mask = np.asarray(image.dataobj)
    assert mask.any() and np.array_equal(mask, draw(bundle, ct, structures=["mandible"])[0])


def test_two_scans_of_one_name_are_refused_before_one_mask_replaces_the_other(tmp_path: Path):
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "ct.nii.gz").touch()
    with pytest.raises(ValueError, match="have the same name"):
        scans([str(tmp_path / patient / "ct.nii.gz") for patient in ("p1", "p2")], tmp_path)


@pytest.mark.parametrize("name", ["$__import__('os')", "@network", "%other.json"])
def test_names_that_monai_would_evaluate_are_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="MONAI would evaluate it"):
        export_bundle(resolve("m3d-tiny"), tmp_path / "bundle", ["mandible", name])
    assert not (tmp_path / "bundle").exists()
