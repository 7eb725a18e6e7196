"""`m3d doctor`: what is there, what is missing with the command that fixes it, with and without torch."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from m3d import torchvision_remedy
from m3d.cli import doctor
from m3d.inference import checkpoints


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A bundled model that is whole."""
    folder = tmp_path / "m3d-tiny"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"git_commit": "abc123", "seed": 0}))
    monkeypatch.setattr(checkpoints, "bundled", lambda: ["m3d-tiny"])
    monkeypatch.setattr(checkpoints, "resolve", lambda name: folder)
    return folder


@pytest.fixture
def checks(run):
    def call(*words):
        code, out, _ = run("doctor", "--json", *words)
        facts = json.loads(out)
        assert facts["schema"] == "m3d.doctor/1"
        assert facts["ok"] == (code == 0)
        return code, {(check["section"], check["name"]): check for check in facts["checks"]}

    return call


def without(monkeypatch, *names):
    """As if these packages were not installed."""
    real = metadata.version

    def version(name):
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_a_whole_installation_is_healthy(model, checks):
    code, found = checks()
    assert code == 0
    assert found["versions", "torch"]["detail"].startswith("2.")
    assert {name for section, name in found if section == "versions"} >= {
        *("python", "m3d", "torch", "transformers", "monai", "peft", "SimpleITK", "nibabel")
    }
    assert "cores" in found["devices", "cpu"]["detail"]
    assert found["devices", "torchvision"]["state"] == "ok"
    assert "GB free" in found["disk", "here"]["detail"] and "GB free" in found["disk", "cache"]["detail"]
    assert "abc123" in found["models", "m3d-tiny"]["detail"]


def test_missing_torch_is_said_with_its_fix_and_the_rest_still_works(model, checks, monkeypatch):
    without(monkeypatch, "torch")
    code, found = checks()
    assert code == 1
    assert found["versions", "torch"]["state"] == "missing"
    assert found["versions", "torch"]["fix"].startswith("pip install 'torch>=")
    assert found["versions", "nibabel"]["state"] == "ok"
    assert ("models", "m3d-tiny") in found


def test_a_broken_torch_is_said(model, checks, monkeypatch):
    real = doctor.importlib.import_module

    def broken(name, *args):
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")
        return real(name, *args)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    code, found = checks()
    assert code == 1
    assert "libtorch_cpu.so" in found["devices", "torch"]["detail"]


def test_a_missing_extra_is_a_note_with_its_command(model, checks, monkeypatch):
    without(monkeypatch, "deepspeed", "highdicom")
    code, found = checks()
    assert code == 0
    assert found["extras", "train"]["fix"] == "pip install 'm3d-lamed[train]'"
    assert found["extras", "dicom"]["state"] == "note" and "without highdicom" in found["extras", "dicom"]["detail"]


def test_an_old_package_is_missing_too(model, checks, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "monai" else real(name))
    code, found = checks()
    assert code == 1
    assert found["versions", "monai"]["detail"].startswith("0.1, but ")


def test_no_bundled_model_is_essential(checks, monkeypatch):
    monkeypatch.setattr(checkpoints, "bundled", lambda: [])
    code, found = checks()
    assert code == 1
    assert found["models", "m3d-tiny"]["state"] == "missing" and found["models", "m3d-tiny"]["fix"]


def test_a_model_without_its_manifest_is_not_whole(model, checks):
    (model / "manifest.json").unlink()
    code, found = checks()
    assert code == 1 and found["models", "m3d-tiny"]["state"] == "missing"


def test_a_broken_torchvision_is_essential(model, checks, monkeypatch):
    monkeypatch.setattr(torchvision_remedy, "state", lambda: "broken")
    code, found = checks()
    assert code == 1
    assert found["devices", "torchvision"]["state"] == "missing"


def test_a_device_asked_for_must_be_usable(model, checks):
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    code, found = checks("--device", "mps")
    assert code == 1 and found["devices", "mps"]["state"] == "missing"


def test_a_driver_without_a_cuda_torch_is_told(model, checks, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "pytorch.org" in checks()[1]["devices", "cuda"]["fix"]


def test_little_disk_is_a_note(model, checks, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9))
    code, found = checks()
    assert code == 0
    assert found["disk", "here"]["state"] == "note" and "make room" in found["disk", "here"]["fix"]


def test_words_for_people_and_a_file(model, run):
    code, out, err = run("doctor", "--out", "d")
    assert code == 0
    for words in ("torch", "devices", "extras", "m3d-tiny"):
        assert words in out
    assert "all that is essential is here" in err
    assert json.loads(Path("d/doctor.json").read_text())["ok"]


def test_a_checkout_that_was_never_installed_reads_its_own_setup_cfg(monkeypatch):
    installed = doctor._requirements()

    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", none)
    own = {(r.name, r.extra) for r in doctor._requirements()}
    assert ("torch", "") in own and ("deepspeed", "train") in own
    assert {r.name for r in installed} >= {"torch", "nibabel"}
