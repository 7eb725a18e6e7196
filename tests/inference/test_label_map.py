"""Label maps: what is read back is what was drawn, overlaps go where they were told to, tables are read as meant."""

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.volume import Volume
from m3d.inference import label_map, overlay
from m3d.inference.colors import PALETTE, color_of
from m3d.inference.label_map import write_label_map
from m3d.inference.results import FoundMask, NotDrawn, Result

AFFINE = np.array([[0, 0, -1.5, 30], [0, -2.0, 0, 20], [3.0, 0, 0, -10], [0, 0, 0, 1]])
SHAPE = (10, 12, 14)
FILES = {"label-map.nii.gz", "label-map.txt", "label-map.ctbl", "label-map.png", "label-map.json"}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr(overlay, "DPI", 40)


def block(lo: int, hi: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[lo:hi, lo:hi, lo:hi] = True
    return mask


def result(**masks: np.ndarray) -> Result:
    return named([(name.replace("_", " "), array) for name, array in masks.items()])


def named(masks: list[tuple[str, np.ndarray]]) -> Result:
    return Result(
        task="segment", prompt="", text="", boxes=(),
        masks=tuple(FoundMask(name, array, 0.5, float(array.sum() * 0.009)) for name, array in masks),
        volume=Volume(np.random.default_rng(0).normal(0, 400, SHAPE).astype(np.float32), AFFINE),
        scan_path=Path("/data/hospital/ct.nii.gz"), model_id="m3d-test", preprocess={}, warnings=(), seconds=1.0,
    )  # fmt: skip


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def said(folder: Path) -> dict:
    return json.loads((folder / "label-map.json").read_text(encoding="utf-8"))


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def as_itk_snap_reads(path: Path) -> dict[int, tuple[str, tuple[int, ...], float, bool, bool]]:
    """By the rules of ITK-SNAP's ``ColorLabelTable::LoadFromFile``: numbers, then what stands between double quotes."""
    table = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line or line.startswith("#"):
            continue
        before, _, after = line.partition('"')
        index, red, green, blue, alpha, visible, mesh = before.split()
        label = after.partition('"')[0]
        assert label, "ITK-SNAP calls an empty name a syntax error"
        table[int(index)] = (label, (int(red), int(green), int(blue)), float(alpha), visible != "0", mesh != "0")
    return table


def as_slicer_reads(path: Path) -> dict[int, tuple[str, tuple[float, ...]]]:
    """By the rules of Slicer's ``vtkMRMLColorTableStorageNode::ReadCtblFile``: six words, underscores are spaces."""
    table = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line or line.startswith("#"):
            continue
        index, name, *rgba = line.split()
        assert len(rgba) == 4
        table[int(index)] = (name.strip("'").replace("_", " "), tuple(float(part) for part in rgba))
    return table


def test_masks_that_do_not_overlap_are_read_back_as_they_were(tmp_path):
    answer = result(mandible=block(1, 4), left_parotid=block(5, 8), brainstem=block(8, 10))
    written = write_label_map(tmp_path / "out", answer)
    assert names_in(tmp_path / "out") == FILES == {path.name for path in written}
    image = nib.load(tmp_path / "out" / "label-map.nii.gz")
    assert image.get_data_dtype() == np.uint8 and image.shape == SHAPE
    np.testing.assert_allclose(image.affine, AFFINE)
    facts = said(tmp_path / "out")
    for mask, label in zip(answer.masks, facts["labels"], strict=True):
        assert (label["name"], label["file"]) == (mask.name, "label-map.nii.gz")
        assert (label["voxels"], label["hidden_voxels"]) == (mask.array.sum(), 0)
        np.testing.assert_array_equal(read(tmp_path / "out" / label["file"]) == label["value"], mask.array)


def test_json_says_everything_and_no_path(tmp_path):
    write_label_map(tmp_path, result(left_parotid=block(1, 4), mandible=block(3, 9)))
    facts = said(tmp_path)
    assert facts["labels"] == [
        {
            "value": 1, "name": "left parotid", "drawn": True, "present": None, "slug": "left_parotid",
            "color": "#56B4E9", "file": "label-map.nii.gz", "voxels": 27, "hidden_voxels": 0,
        },
        {
            "value": 2, "name": "mandible", "drawn": True, "present": None, "slug": "mandible",
            "color": "#E69F00", "file": "label-map.nii.gz", "voxels": 215, "hidden_voxels": 1,
        },
    ]  # fmt: skip
    assert facts["schema"] == "m3d.labels/1" and facts["overlaps"] == "smaller" and facts["background"] == 0
    assert facts["tables"] == {"itk_snap": "label-map.txt", "slicer": "label-map.ctbl"}
    assert facts["scan"]["shape"] == list(SHAPE) and facts["scan"]["file"] == "ct.nii.gz"
    assert facts["model_id"] == "m3d-test" and facts["notice"] == "Not for clinical use"
    assert "hospital" not in json.dumps(facts)


@pytest.mark.parametrize(
    ("overlaps", "in_both"),
    [("smaller", 1), ("last", 2)],
)
def test_overlaps_go_where_they_were_told_to(tmp_path, overlaps, in_both):
    small, large = block(2, 5), block(3, 9)
    write_label_map(tmp_path, result(small=small, large=large), overlaps=overlaps)
    labels = read(tmp_path / "label-map.nii.gz")
    assert (labels[small & large] == in_both).all() and (small & large).sum() == 8
    assert (labels[small & ~large] == 1).all() and (labels[large & ~small] == 2).all()
    assert (labels[~small & ~large] == 0).all()
    assert [label["hidden_voxels"] for label in said(tmp_path)["labels"]] == ([0, 8] if in_both == 1 else [8, 0])


def test_of_two_of_one_size_the_later_one_has_what_they_share(tmp_path):
    write_label_map(tmp_path, result(a=block(2, 5), b=block(3, 6)))
    assert read(tmp_path / "label-map.nii.gz")[4, 4, 4] == 2


def test_keep_loses_no_voxel_and_takes_no_more_maps_than_needed(tmp_path):
    answer = result(body=block(1, 9), inner=block(2, 5), other=block(5, 8))
    write_label_map(tmp_path, answer, overlaps="keep")
    assert names_in(tmp_path) == FILES | {"label-map-2.nii.gz"}
    labels = said(tmp_path)["labels"]
    assert [label["file"] for label in labels] == ["label-map.nii.gz", "label-map-2.nii.gz", "label-map-2.nii.gz"]
    for mask, label in zip(answer.masks, labels, strict=True):
        np.testing.assert_array_equal(read(tmp_path / label["file"]) == label["value"], mask.array)
        assert label["hidden_voxels"] == 0


def test_keep_needs_one_map_where_nothing_overlaps(tmp_path):
    write_label_map(tmp_path, result(a=block(1, 3), b=block(4, 6)), overlaps="keep")
    assert names_in(tmp_path) == FILES


def test_an_empty_mask_keeps_its_value(tmp_path):
    write_label_map(tmp_path, result(nothing=block(1, 1), some=block(1, 3)))
    assert [(label["value"], label["voxels"]) for label in said(tmp_path)["labels"]] == [(1, 0), (2, 8)]
    assert np.unique(read(tmp_path / "label-map.nii.gz")).tolist() == [0, 2]


def test_labels_mean_the_same_for_every_scan_whatever_is_drawn(tmp_path):
    names = ("a", "ghost", "b", "banana", "c")
    missing = tuple(NotDrawn(name, "the model drew 'a' instead") for name in ("ghost", "banana"))
    answer = replace(result(a=block(1, 3), b=block(2, 6), c=block(7, 9)), asked=names, not_drawn=missing)
    for overlaps in ("smaller", "last", "keep"):
        write_label_map(tmp_path, answer, overlaps=overlaps, force=True)
        labels = said(tmp_path)["labels"]
        assert [(label["value"], label["name"], label["drawn"]) for label in labels] == [
            (1, "a", True), (2, "ghost", False), (3, "b", True), (4, "banana", False), (5, "c", True),
        ]  # fmt: skip
        assert [label["color"] for label in labels] == list(PALETTE[:5])
        assert labels[1]["voxels"] == labels[1]["hidden_voxels"] == 0
        assert (read(tmp_path / labels[4]["file"])[block(7, 9)] == 5).all()
        assert (read(tmp_path / labels[2]["file"])[5, 5, 5]) == 3
    assert np.unique(read(tmp_path / "label-map.nii.gz")).tolist() == [0, 1, 5]  # b shares a voxel with a
    assert list(as_itk_snap_reads(tmp_path / "label-map.txt")) == [0, 1, 2, 3, 4, 5]
    assert as_slicer_reads(tmp_path / "label-map.ctbl")[4][0] == "banana"


def test_where_nothing_was_drawn_the_map_is_empty_and_names_what_was_asked_for(tmp_path):
    answer = replace(result(), asked=("ghost",), not_drawn=(NotDrawn("ghost", "it is not there"),))
    write_label_map(tmp_path, answer)
    assert not read(tmp_path / "label-map.nii.gz").any()
    assert [(label["name"], label["drawn"]) for label in said(tmp_path)["labels"]] == [("ghost", False)]


def test_the_picture_shows_all_masks_in_the_maps_colours(tmp_path, monkeypatch):
    shown = []
    draw = label_map.save_overlay
    monkeypatch.setattr(
        label_map, "save_overlay", lambda *given, **more: (shown.append((given[2], more)), draw(*given, **more))
    )
    answer = replace(result(a=block(1, 4), b=block(3, 9), d=block(5, 7)), asked=("a", "b", "c", "d"))
    write_label_map(tmp_path, answer)
    ((findings, how),) = shown
    assert [(one.name, one.color) for one in findings] == list(zip("abcd", PALETTE, strict=False))
    assert [label["color"] for label in said(tmp_path)["labels"]] == [one.color for one in findings]
    assert how["centre"] == (5, 5, 5) and how["title"] == "3 of 4 structures"  # slices 3, 5 and 6 cut two masks
    image = pyplot_free_pixels(tmp_path / "label-map.png")
    for color in (PALETTE[1], PALETTE[3]):
        assert (np.abs(image - np.array(list(bytes.fromhex(color[1:])))).max(axis=-1) < 30).any()


def pyplot_free_pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_more_than_255_labels_are_uint16_on_the_same_grid(tmp_path):
    places = [divmod(number, 14) for number in range(140)]
    masks = []
    for number in range(300):
        mask = np.zeros(SHAPE, bool)
        d, w = places[number % 140]
        mask[d, number // 140, w] = True
        masks.append((f"node {number}", mask))
    write_label_map(tmp_path, named(masks))
    image = nib.load(tmp_path / "label-map.nii.gz")
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_allclose(image.affine, AFFINE)
    assert image.header.get_xyzt_units()[0] == "mm" and image.header["sform_code"] == image.header["qform_code"] == 1
    labels = np.asarray(image.dataobj)
    for number in (0, 139, 254, 255, 256, 299):
        np.testing.assert_array_equal(labels == number + 1, masks[number][1])


def test_itk_snap_reads_names_and_colours(tmp_path):
    masks = [('the "deep" lobe\nleft', block(1, 3)), ("下颌骨", block(4, 6)), ("\n", block(7, 9))]
    write_label_map(tmp_path, named(masks))
    text = (tmp_path / "label-map.txt").read_text(encoding="utf-8")
    assert text.splitlines()[:2] == ["#" * 48, "# ITK-SnAP Label Description File"]
    assert '    0     0    0    0        0  0  0    "Clear Label"\n' in text  # as ITK-SNAP writes it
    assert '    2   230  159    0        1  1  1    "下颌骨"\n' in text
    assert as_itk_snap_reads(tmp_path / "label-map.txt") == {
        0: ("Clear Label", (0, 0, 0), 0.0, False, False),
        1: ("the 'deep' lobe left", (0x56, 0xB4, 0xE9), 1.0, True, True),
        2: ("下颌骨", (0xE6, 0x9F, 0x00), 1.0, True, True),
        3: ("finding", (0x00, 0x9E, 0x73), 1.0, True, True),
    }


def test_slicer_reads_names_and_colours(tmp_path):
    masks = [("Left 'Parotid' (deep)", block(1, 3)), ("left parotid deep", block(4, 6))]
    write_label_map(tmp_path, named(masks))
    text = (tmp_path / "label-map.ctbl").read_text(encoding="utf-8")
    assert text == (
        "# Color table file label-map.ctbl\n"
        "# 3 values\n"
        "0 Background 0 0 0 0\n"
        "1 left_parotid_deep 86 180 233 255\n"
        "2 left_parotid_deep_2 230 159 0 255\n"
    )
    assert as_slicer_reads(tmp_path / "label-map.ctbl")[2] == ("left parotid deep 2", (230.0, 159.0, 0.0, 255.0))


def test_colours_are_the_pictures_first_and_all_differ():
    assert [color_of(number) for number in range(6)] == list(PALETTE)
    many = [color_of(number) for number in range(400)]
    assert len(set(many)) == 400
    assert all(re.fullmatch("#[0-9A-F]{6}", color) for color in many)


def test_what_was_drawn_to_measure_it_takes_part_once(tmp_path):
    answer = replace(named([("a", block(1, 3)), ("b", block(4, 6)), ("a", block(1, 4))]), num_measured=2)
    write_label_map(tmp_path, answer)
    labels = said(tmp_path)["labels"]
    assert [(label["name"], label["voxels"]) for label in labels] == [("b", 8), ("a", 27)]
    assert [label["color"] for label in labels] == [PALETTE[1], PALETTE[2]], "as in the result's pictures"


def test_a_result_without_masks_and_an_unknown_way_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a label map needs masks, and the result has none"):
        write_label_map(tmp_path, result())
    with pytest.raises(ValueError, match="unknown overlaps 'first'; known: smaller, last, keep"):
        write_label_map(tmp_path, result(a=block(1, 3)), overlaps="first")
    assert names_in(tmp_path) == set()


def test_refuses_to_overwrite_and_force_replaces_it_whole(tmp_path):
    overlapping = result(a=block(1, 9), b=block(2, 5))
    write_label_map(tmp_path, overlapping, overlaps="keep")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"label-map.nii.gz exists; use --force"):
        write_label_map(tmp_path, overlapping)
    assert said(tmp_path)["overlaps"] == "keep"
    write_label_map(tmp_path, overlapping, force=True)
    assert names_in(tmp_path) == FILES | {"mine.txt"} and said(tmp_path)["overlaps"] == "smaller"


def test_what_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(label_map, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        write_label_map(tmp_path / "out", result(a=block(1, 3)))
    assert names_in(tmp_path) == set()


def test_it_lies_beside_a_result_and_goes_with_it(tmp_path):
    answer = named([("label map", block(1, 3)), ("label-map", block(4, 6))])
    answer.save(tmp_path)
    write_label_map(tmp_path, answer)
    assert {"label_map.nii.gz", "label_map_2.nii.gz", "result.json"} | FILES <= names_in(tmp_path)
    answer.save(tmp_path, force=True)
    assert not FILES & names_in(tmp_path), "a map of an earlier result would be taken for this one's"


def test_a_foreign_map_is_left_alone(tmp_path):
    (tmp_path / "label-map.json").write_text('{"labels": []}')
    result(a=block(1, 3)).save(tmp_path, force=True)
    assert (tmp_path / "label-map.json").exists()
    outside = {"schema": "m3d.labels/1", "files": ["../label-map.txt", "mine.png"]}
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "label-map.json").write_text(json.dumps(outside))
    for mine in (tmp_path / "label-map.txt", folder / "mine.png"):
        mine.write_text("mine")
    write_label_map(folder, result(a=block(1, 3)), force=True)
    assert (tmp_path / "label-map.txt").read_text() == (folder / "mine.png").read_text() == "mine"
