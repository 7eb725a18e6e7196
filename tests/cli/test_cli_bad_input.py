"""Bad input: exit code 1, one line on stderr that names the file, nothing on stdout, nothing written."""

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from m3d.inference import results

Make = Callable[[Path], list[object]]
SHAPE = (12, 13, 14)


def voxels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape or SHAPE).astype(np.float32)


def nifti(folder: Path, array: np.ndarray, name: str = "bad.nii.gz") -> list[object]:
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name)
    return [folder / name]


def with_header(folder: Path, at: int, values: np.ndarray) -> list[object]:
    """A NIfTI whose header says something it should not, written past the library's checks."""
    (path,) = nifti(folder, voxels(), "bad.nii")
    raw = bytearray(path.read_bytes())
    raw[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(raw)
    return [path]


def missing(folder: Path) -> list[object]:
    return [folder / "bad.nii.gz"]


def text(folder: Path) -> list[object]:
    (folder / "bad.nii.gz").write_text("the scan is on the other server\n")
    return [folder / "bad.nii.gz"]


def zipped_text(folder: Path) -> list[object]:
    (folder / "bad.nii.gz").write_bytes(gzip.compress(b"the scan is on the other server\n" * 50))
    return [folder / "bad.nii.gz"]


def truncated(folder: Path) -> list[object]:
    (path,) = nifti(folder, voxels())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [path]


def with_nan(folder: Path) -> list[object]:
    array = voxels()
    array[3, 3, 3] = np.nan
    return nifti(folder, array)


def singular(folder: Path) -> list[object]:
    flat = np.zeros((3, 4), np.float32)
    flat[0, 0] = flat[1, 1] = flat[1, 2] = 1.0
    return with_header(folder, 280, flat)  # srow_x, srow_y, srow_z


def zero_spacing(folder: Path) -> list[object]:
    return with_header(folder, 80, np.zeros(3, np.float32))  # pixdim[1:4]


def npy(spacing: str | None) -> Make:
    def make(folder: Path) -> list[object]:
        np.save(folder / "bad.npy", voxels())
        return [folder / "bad.npy", *([] if spacing is None else [f"--spacing={spacing}"])]

    return make


def two_series(folder: Path) -> list[object]:
    for series in ("1.2.3.1", "1.2.3.2"):
        for number in range(3):
            data = pydicom.Dataset()
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            data.PatientName, data.Modality, data.SeriesInstanceUID = "Doe^Jane", "CT", series
            data.Rows = data.Columns = 4
            data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
            data.BitsAllocated = data.BitsStored = 16
            data.HighBit, data.PixelRepresentation = 15, 0
            data.PixelSpacing, data.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
            data.ImagePositionPatient, data.RescaleSlope, data.RescaleIntercept = [0, 0, number], 1, 0
            data.PixelData = np.arange(16, dtype=np.uint16).tobytes()
            data.save_as(folder / f"{series}-{number}.dcm", enforce_file_format=True)
    return [folder]


BAD: dict[str, tuple[Make, str]] = {
    "missing": (missing, "no such file"),
    "text": (text, "not a NIfTI"),
    "zipped text": (zipped_text, "not a NIfTI"),
    "truncated": (truncated, "truncated or damaged"),
    "2D": (lambda folder: nifti(folder, voxels(12, 13)), "3D"),
    "4D": (lambda folder: nifti(folder, voxels(6, 5, 4, 3)), "3D"),
    "NaN": (with_nan, "NaN"),
    "constant": (lambda folder: nifti(folder, np.full(SHAPE, 7, np.float32)), "every voxel has the value 7"),
    "singular affine": (singular, "singular"),
    "zero spacing": (zero_spacing, "spacing"),
    "npy without spacing": (npy(None), "spacing"),
    "npy with zero spacing": (npy("0,1,1"), "spacing"),
    "npy with negative spacing": (npy("1,-1,1"), "spacing"),
    "two series": (two_series, "series"),
}
COMMANDS: dict[str, Callable[..., list[object]]] = {
    "report": lambda scan, *more: ["report", scan, *more, "--out", "out"],
    "ask": lambda scan, *more: ["ask", scan, "how large?", *more, "--out", "out"],
    "locate": lambda scan, *more: ["locate", scan, "mandible", *more, "--out", "out"],
    "segment": lambda scan, *more: ["segment", scan, "mandible", *more],
    "inspect": lambda scan, *more: ["inspect", scan, *more],
    "demo": lambda scan, *more: ["demo", scan, *more],
}


def check(outcome: tuple[int, str, str], names: str, says: str) -> None:
    code, out, err = outcome
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and err.startswith("m3d: error: "), err
    assert names in err and says in err, err
    assert "Doe" not in err
    assert not list(Path.cwd().iterdir()), "nothing written"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_scan_is_one_line(kind, fake, run, tmp_path):
    make, says = BAD[kind]
    folder = tmp_path / "bad"
    folder.mkdir()
    check(run(*COMMANDS["segment"](*make(folder)), "--json"), "bad", says)
    assert fake.loads == [], "told before a model is loaded"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "truncated", "NaN", "two series"])
def test_every_command_is_as_clear(command, kind, fake, run, tmp_path):
    make, says = BAD[kind]
    folder = tmp_path / "bad"
    folder.mkdir()
    check(run(*COMMANDS[command](*make(folder))), "bad", says)


def test_two_series_are_listed_and_one_can_be_chosen(fake, run, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    _, _, err = run("report", *two_series(folder))
    assert "1.2.3.1" in err and "1.2.3.2" in err and "--series" in err
    assert run("report", folder, "--series", "1.2.3.9")[0] == 1


def test_an_answer_without_seg_is_one_line(fake, run, ct):
    check(run("segment", ct, "ghost"), "ghost", "without [SEG]")


@pytest.mark.parametrize("command", ["report", "inspect", "segment", "demo"])
def test_a_checkpoint_of_another_architecture_is_refused(command, run, ct, tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    check(run(*COMMANDS[command](ct), "--model", folder), "bert", "'m3d' checkpoint is needed")
    check(run(*COMMANDS[command](ct), "--model", tmp_path / "nowhere"), "nowhere", "no model")


@pytest.mark.parametrize("command", ["segment", "inspect", "demo", "report"])
def test_a_full_disk_is_one_line_and_leaves_nothing(command, fake, run, ct, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "write_json", full)
    code, out, err = run(*COMMANDS[command](ct))
    lines = err.splitlines()
    assert (code, out) == (1, "")
    assert lines[-1].startswith("m3d: error: out") and "the disk is full" in lines[-1] and "are free" in lines[-1]
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_is_not_overwritten_without_force(command, fake, run, ct):
    assert run(*COMMANDS[command](ct))[0] == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    loads = len(fake.loads)
    code, out, err = run(*COMMANDS[command](ct))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and "exists; use --force" in err
    assert len(fake.loads) == loads, "told before the work"
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert run(*COMMANDS[command](ct), "--force")[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--point", "40,1,1"], "point (40, 1, 1) lies outside the scan, whose voxels are (20, 24, 16)"),
        (["--point", "-1,1,1"], "outside the scan"),
        (["--point", "nan,1,1"], "three finite numbers"),
        (["--point", "900,0,0", "--frame", "mm"], "point (900, 0, 0) mm, which is voxel (10, -288, 8)"),
        (["--box", "5,5,5,5,9,9"], "must have lo < hi"),
        (["--box", "9,9,9,5,5,5"], "must have lo <= hi"),
        (["--box", "0,0,0,21,5,5"], "lie in the scan, whose voxels are (20, 24, 16)"),
        (["--box", "nan,0,0,5,5,5"], "must have lo <= hi"),
        (["--box", "900,900,900,950,950,950", "--frame", "mm"], "lie in the scan"),
    ],
)
def test_prompts_outside_the_scan_are_refused(words, says, fake, run, ct):
    check(run("segment", ct, *words), "", says)


@pytest.mark.parametrize(
    "words", [["ask", "{}", "  "], ["locate", "{}", " "], ["ask", "{}", "q", "--max-new-tokens", "0"]]
)
def test_empty_words_are_refused(words, fake, run, ct):
    check(run(*(word.format(ct) for word in words)), "", "")


def test_a_negative_phantom_is_refused(fake, run):
    check(run("demo", "--phantom", "-3"), "--phantom", "0 or more")
