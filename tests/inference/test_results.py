"""Results: what they say as JSON, and that they are written whole or not at all."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.boxes import box_of_mask, to_mm
from data_prep.volume import Volume
from m3d.inference import results
from m3d.inference.colors import color_of
from m3d.inference.label_map import write_label_map
from m3d.inference.results import FoundBox, FoundMask, NotDrawn, Result, slug, staged

AFFINE = np.array([[0, 0, -1.5, 30], [0, -2.0, 0, 20], [3.0, 0, 0, -10], [0, 0, 0, 1]])
SHAPE = (10, 12, 14)


def volume() -> Volume:
    return Volume(np.random.default_rng(0).normal(0, 400, SHAPE).astype(np.float32), AFFINE)


def block(*corner: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(start, start + 3) for start in corner)] = True
    return mask


def found(name: str, array: np.ndarray) -> FoundMask:
    return FoundMask(name, array, 0.875, float(array.sum() * 0.009))


def result(*masks: FoundMask, boxes: tuple[FoundBox, ...] = ()) -> Result:
    return Result(
        task="segment",
        prompt="Segment the left parotid.",
        text="Here is the left parotid [SEG].",
        boxes=boxes,
        masks=masks or (found("left parotid", block(2, 3, 4)),),
        volume=volume(),
        scan_path=Path("/data/hospital/ct.nii.gz"),
        model_id="m3d-test",
        preprocess={"grid": [8, 8, 8]},
        warnings=("no voxel is negative",),
        seconds=1.23456,
    )


def box_of(name: str, mask: np.ndarray) -> FoundBox:
    voxel = box_of_mask(mask, name)
    return FoundBox(name, voxel, to_mm(voxel, AFFINE))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_json_says_everything_and_only_that():
    answer = result(boxes=(box_of("left parotid", block(2, 3, 4)),))
    inside = answer.volume.array[2:5, 3:6, 4:7].astype(np.float64)
    said = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert said == {
        "schema": "m3d.result/1",
        "task": "segment",
        "prompt": "Segment the left parotid.",
        "text": "Here is the left parotid [SEG].",
        "measured": [],
        "boxes": [
            {
                "name": "left parotid",
                "voxel": {"lo": [2.0, 3.0, 4.0], "hi": [5.0, 6.0, 7.0]},
                "mm": {"lo": [20.25, 9.0, -5.5], "hi": [24.75, 15.0, 3.5]},  # by hand from AFFINE
            }
        ],
        "masks": [
            {
                "name": "left parotid",
                "file": "left_parotid.nii.gz",
                "score": 0.875,
                "present": None,
                "volume_ml": 0.243,
                "voxels": 27,
                "measurements": {
                    "voxels": 27,
                    "volume_ml": 0.243,
                    "extent_mm": [4.5, 6.0, 9.0],
                    "centroid_mm": [22.5, 12.0, -1.0],  # of voxel (3, 4, 5), by hand from AFFINE
                    "longest_diameter_mm": 11.7154,  # the root of 20.25 + 36 + 81
                    "mean": round(float(inside.mean()), 4),
                    "sd": round(float(inside.std()), 4),
                    "unit": "HU",
                    "touches_edge": False,
                },
            }
        ],
        "absent": [],
        "postprocess": [],
        "drawn_at_mm": None,
        "pictures": ["left_parotid.png", "left_parotid_2.png"],
        "scan": {
            "file": "ct.nii.gz",
            "shape": [10, 12, 14],
            "spacing_mm": [3.0, 2.0, 1.5],
            "orientation": "SPL",
            "affine": AFFINE.tolist(),
        },
        "model_id": "m3d-test",
        "preprocess": {"grid": [8, 8, 8]},
        "warnings": ["no voxel is negative"],
        "seconds": 1.235,
        "notice": "Not for clinical use",
    }
    assert "hospital" not in json.dumps(said)


def test_save_writes_json_a_mask_on_the_scans_own_grid_and_a_picture(tmp_path):
    answer = result()
    written = answer.save(tmp_path / "new" / "out")
    assert files_in(tmp_path / "new" / "out") == {"left_parotid.nii.gz", "left_parotid.png", "result.json"}
    assert {path.name for path in written} == files_in(tmp_path / "new" / "out")
    image = nib.load(tmp_path / "new/out/left_parotid.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), block(2, 3, 4))
    np.testing.assert_allclose(image.affine, AFFINE)
    assert json.loads((tmp_path / "new/out/result.json").read_text()) == answer.to_dict()


def test_words_alone_are_one_file(tmp_path):
    replace(result(), masks=(), task="report").save(tmp_path)
    assert files_in(tmp_path) == {"result.json"}


def test_an_empty_mask_is_kept_and_not_pictured(tmp_path):
    result(found("larynx", block(2, 3, 4) & False)).save(tmp_path)
    assert files_in(tmp_path) == {"larynx.nii.gz", "result.json"}


@pytest.mark.parametrize("existing", ["result.json", "left_parotid.nii.gz", "left_parotid.png"])
def test_refuses_to_overwrite_before_anything_is_written(tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{existing} exists; use --force"):
        result().save(tmp_path)
    assert files_in(tmp_path) == {existing}
    assert (tmp_path / existing).read_text() == "mine"


def test_force_replaces_a_result_whole_and_leaves_other_files(tmp_path):
    result(found("larynx", block(1, 1, 1)), found("mandible", block(5, 5, 5))).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    result(found("mandible", block(6, 6, 6))).save(tmp_path, force=True)
    assert files_in(tmp_path) == {"mandible.nii.gz", "mandible.png", "result.json", "notes.txt"}
    assert np.asarray(nib.load(tmp_path / "mandible.nii.gz").dataobj)[8, 8, 8] == 1


def test_a_foreign_result_json_does_not_make_us_delete_anything(tmp_path):
    (tmp_path / "keep.png").write_text("mine")
    outside = tmp_path / "out"
    outside.mkdir()
    entry = {"schema": "m3d.result/1", "masks": [{"file": "../keep.png"}], "pictures": ["../keep.png", 3]}
    (outside / "result.json").write_text(json.dumps(entry))
    result().save(outside, force=True)
    assert (tmp_path / "keep.png").read_text() == "mine"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, monkeypatch, there, code):
    folder = tmp_path / "deep" / "out"
    if there:
        folder.mkdir(parents=True)
        (folder / "older.txt").write_text("mine")
    before, calls = files_in(tmp_path), []
    real = results.write_mask

    def full(path, mask, *, like):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(code, "No space left on device")
        real(path, mask, like=like)

    monkeypatch.setattr(results, "write_mask", full)
    with pytest.raises(OSError, match=r"deep/out: the disk is full: up to [\d,]+ bytes are needed and [\d,]+ are free"):
        result(found("a", block(1, 1, 1)), found("b", block(2, 2, 2))).save(folder)
    assert len(calls) == 2
    assert files_in(tmp_path) == before


def test_an_interrupt_leaves_nothing_either(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        result().save(tmp_path / "out")
    assert files_in(tmp_path) == set()


def test_a_folder_that_is_a_file_is_said_so(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="out is a file; choose another folder"):
        result().save(tmp_path / "out")


def test_other_errors_while_staging_keep_their_own_words(tmp_path):
    with pytest.raises(PermissionError, match="not yours"), staged(tmp_path / "o", ["a"], force=False, needed=1):
        raise PermissionError(errno.EACCES, "not yours")
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left parotid", "left_parotid"),
        ("Left-Parotid (deep)", "left_parotid_deep"),
        ("../../etc/passwd", "etc_passwd"),
        ("Ösophagus", "osophagus"),
        ("下颌骨", "下颌骨"),
        ("...", "finding"),
        ("x" * 300, "x" * 60),
    ],
)
def test_names_become_safe_file_names(name, expected):
    assert slug(name) == expected


def test_equal_names_get_files_of_their_own():
    answer = result(found("node", block(1, 1, 1)), found("Node", block(2, 2, 2)), found("node 2", block(3, 3, 3)))
    assert len(set(answer.mask_files)) == 3
    assert answer.mask_files[:2] == ("node.nii.gz", "node_2.nii.gz")


def test_a_mask_on_another_grid_is_our_own_mistake():
    with pytest.raises(AssertionError):
        result(found("a", np.zeros((2, 2, 2), bool)))


def test_what_was_not_drawn_is_said_and_colours_go_by_what_was_asked_for():
    names = ("ghost", "b", "c", "a")
    both = replace(
        result(found("b", block(2, 2, 2)), found("a", block(1, 1, 1))),
        asked=names, not_drawn=(NotDrawn("ghost", "no such thing"), NotDrawn("c", "drew d", 0.125)),
    )  # fmt: skip
    assert both.absent == ("ghost", "c")
    assert both.to_dict()["absent"] == [
        {"name": "ghost", "reason": "no such thing", "present": None},
        {"name": "c", "reason": "drew d", "present": 0.125},
    ]
    assert [finding.color for finding in both.findings] == [color_of(1), color_of(3)]
    alone = result(found("b", block(2, 2, 2)), found("a", block(1, 1, 1)))
    assert [finding.color for finding in alone.findings] == [color_of(0), color_of(1)]


@pytest.mark.parametrize("write", [Result.save, write_label_map])
def test_the_scan_itself_is_never_replaced(tmp_path, write):
    scan = tmp_path / ("left_parotid.nii.gz" if write is Result.save else "label-map.nii.gz")
    scan.write_bytes(b"a scan")
    own = replace(result(), scan_path=scan)
    with pytest.raises(FileExistsError, match="is the scan itself"):
        write(own, tmp_path, force=True) if write is Result.save else write(tmp_path, own, force=True)
    assert files_in(tmp_path) == {scan.name} and scan.read_bytes() == b"a scan"
