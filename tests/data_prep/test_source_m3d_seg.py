"""M3D-Seg on miniatures of its two layouts; the table of its classes against counts known beforehand."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.case import Case
from data_prep.sources.m3d_seg import M3DSeg, seg_datasets
from data_prep.sources.tables import BadTable
from data_prep.volume import BadScan

SHAPE = (4, 6, 5)
RAW = (5, 6, 4)  # X, Y, Z


def ramp(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def block(at: slice, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def prepared(root: Path, code: str, case: str, masks: dict[int, np.ndarray]) -> list[dict[str, str]]:
    """A prepared case, and its items as the published preparation writes them: absolute, on another machine."""
    folder = root / "M3D_Seg_npy" / code / case
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", ramp()[None])
    rows = []
    for number, mask in masks.items():
        np.save(folder / "masks" / f"mask_{number}.npy", mask)
        there = f"/somewhere/else/data/M3D_Seg_npy/{code}/{case}"
        rows.append({"image": f"{there}/image.npy", "label": f"{there}/masks/mask_{number}.npy"})
    return rows


def raw(root: Path, code: str, case: str, masks: np.ndarray) -> dict[str, str]:
    """A raw case (C, X, Y, Z) and its item."""
    folder = root / "M3D_Seg" / code / case
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", (ramp(RAW) * 3 - 1)[None])
    name = f"mask_{masks.shape}"  # scipy appends .npz
    sparse.save_npz(folder / name, sparse.csr_matrix(masks.reshape(len(masks), -1).astype(np.int32)))
    return {"image": f"{code}/{case}/image.npy", "label": f"{code}/{case}/{name}.npz"}


def write(root: Path, code: str, folder: str = "M3D_Seg_npy", **lists: object) -> None:
    path = root / folder / code / f"{code}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lists), encoding="utf-8")


def read_one(root: Path, **options: object) -> Case:
    (entry,) = M3DSeg(root=root, **options).entries()  # type: ignore[arg-type]
    return pickle.loads(pickle.dumps(entry.read))()


def test_the_table_of_classes_is_what_was_published() -> None:
    found = seg_datasets()
    assert list(found) == [f"{number:04d}" for number in range(26)]
    published = [one.published for dataset in found.values() for one in dataset.classes]
    assert (len(published), len(set(published))) == (340, 222)
    assert [code for code, dataset in found.items() if dataset.name is None] == ["0025"]
    assert (found["0003"].name, found["0011"].name, found["0012"].name) == (
        "AbdomenCT-1k", "TotalSegmentator", "CT-ORG",
    )  # fmt: skip
    assert len(found["0011"].classes) == 104


@pytest.mark.parametrize("code", ["0014", "0015"])
def test_the_second_l1_is_l2(code: str) -> None:
    classes = seg_datasets()[code].classes
    assert [one.name for one in classes[19:22]] == ["vertebra L1", "vertebra L2", "vertebra L3"]
    assert [one.published for one in classes[19:21]] == ["lumbar spine L1"] * 2


def test_names_are_natural_and_without_underscores() -> None:
    by_published = {(code, one.published): one.name for code, data in seg_datasets().items() for one in data.classes}
    assert by_published["0011", "kidney left"] == "left kidney"
    assert by_published["0002", "postcava"] == by_published["0025", "postcava"] == "inferior vena cava"
    assert by_published["0009", "liver kyste"] == by_published["0009", "liver kyst"] == "liver cyst"
    assert by_published["0020", "tumour"] == "liver tumor"
    assert not any("_" in name or name != name.strip() for name in by_published.values())
    for name in by_published.values():  # a side stands in front, or close to it
        assert not name.endswith((" left", " right"))


def test_items_of_an_image_make_one_case_with_layers(tmp_path: Path) -> None:
    rows = prepared(tmp_path, "0020", "case_1", {0: block(np.s_[:2])[None], 1: block(np.s_[1:3])[None]})
    write(tmp_path, "0020", train=rows, test=[])
    (entry,) = M3DSeg(root=tmp_path).entries()
    assert (entry.dataset, entry.image_id, entry.patient_id, entry.split) == (
        "M3D-Seg:MSD-Liver", "case_1", "case_1", "train",
    )  # fmt: skip
    assert entry.drafts == () and [path.name for path in entry.files] == ["image.npy", "mask_0.npy", "mask_1.npy"]
    case = read_one(tmp_path)
    assert case.names == {1: "liver", 2: "liver tumor"} and case.labels.shape == (2, *SHAPE)
    np.testing.assert_array_equal(case.mask("liver"), block(np.s_[:2]))
    np.testing.assert_array_equal(case.mask("liver tumor"), block(np.s_[1:3]))
    np.testing.assert_array_equal(case.volume.array, ramp())
    assert (case.unit, case.placed, case.complete, case.modality) == ("norm01", False, False, "CT")


def test_train_and_test_and_codes(tmp_path: Path) -> None:
    for code in ("0003", "0008"):
        train = prepared(tmp_path, code, "a", {0: block(np.s_[:1])})
        write(tmp_path, code, train=train, test=prepared(tmp_path, code, "b", {0: block(np.s_[:1])[None]}))
    all_of_them = [(entry.dataset, entry.image_id, entry.split) for entry in M3DSeg(root=tmp_path).entries()]
    assert all_of_them == [
        (name, image, split)
        for name in ("M3D-Seg:AbdomenCT-1k", "M3D-Seg:Pancreas-CT")
        for image, split in (("a", "train"), ("b", "test"))
    ]
    chosen = list(M3DSeg(root=tmp_path / "M3D_Seg_npy", codes=("0008",)).entries())
    assert [entry.dataset for entry in chosen] == ["M3D-Seg:Pancreas-CT"] * 2
    with pytest.raises(FileNotFoundError, match=r"no 0011/0011.json in it"):
        list(M3DSeg(root=tmp_path, codes=("0011",)).entries())
    with pytest.raises(ValueError, match=r"unknown code '8'; codes are '0000' to '0025', in quotes"):
        M3DSeg(root=tmp_path, codes=("8",))


def test_a_case_called_like_its_data_set(tmp_path: Path) -> None:
    write(tmp_path, "0003", train=prepared(tmp_path, "0003", "0003", {0: block(np.s_[:1])[None]}))
    (tmp_path / "M3D-Seg").mkdir()
    (tmp_path / "M3D_Seg_npy").rename(tmp_path / "M3D-Seg" / "M3D_Seg_npy")
    assert read_one(tmp_path).id == "0003"


def test_an_empty_mask_says_nothing(tmp_path: Path) -> None:
    negative = np.zeros((1, 1, 1, 1), bool)
    masks = {0: block(np.s_[:2])[None], 1: negative, 2: np.zeros((1, *SHAPE), bool)}
    write(tmp_path, "0003", test=prepared(tmp_path, "0003", "a", masks))
    case = read_one(tmp_path)
    assert case.names == {1: "liver"} and not case.complete
    assert case.source["empty_masks"] == ("kidneys", "spleen")


def test_a_case_without_any_mask_is_still_an_image(tmp_path: Path) -> None:
    write(tmp_path, "0003", test=prepared(tmp_path, "0003", "a", {0: np.zeros((1, 1, 1, 1), bool)}))
    case = read_one(tmp_path)
    assert case.names == {} and not case.labels.any() and case.labels.shape == SHAPE


def test_classes_of_one_name_are_one_structure(tmp_path: Path) -> None:
    names = [one.published for one in seg_datasets()["0009"].classes]
    first, second = names.index("liver tumor 01"), names.index("liver tumor 02")
    rows = prepared(tmp_path, "0009", "a", {first: block(np.s_[:1])[None], second: block(np.s_[2:3])[None]})
    write(tmp_path, "0009", train=rows)
    case = read_one(tmp_path)
    assert case.names == {1: "liver tumor"}
    np.testing.assert_array_equal(case.mask("liver tumor"), block(np.s_[[0, 2]]))


def test_raw_cases_are_unpacked_onto_slices_first(tmp_path: Path) -> None:
    masks = np.zeros((4, *RAW), bool)
    masks[0, :3], masks[1, 2:4, 1, 1], masks[3, 4, 5, 3] = True, True, True
    row = raw(tmp_path, "0003", "case_7", masks)
    write(tmp_path, "0003", "M3D_Seg", train=[row])
    case = read_one(tmp_path)
    assert case.volume.shape == (4, 6, 5) and case.unit == "arbitrary" and not case.placed
    np.testing.assert_array_equal(case.volume.array, (ramp(RAW) * 3 - 1).transpose(2, 1, 0))
    assert case.names == {1: "liver", 2: "kidneys", 3: "pancreas"} and case.source["empty_masks"] == ("spleen",)
    for name, mask in zip(("liver", "kidneys", "pancreas"), masks[[0, 1, 3]], strict=True):
        np.testing.assert_array_equal(case.mask(name), mask.transpose(2, 1, 0))


def test_the_first_published_layout_too(tmp_path: Path) -> None:
    folder = tmp_path / "0016"
    (folder / "ct").mkdir(parents=True)
    (folder / "gt").mkdir()
    np.save(folder / "ct" / "case_00000.npy", ramp(RAW)[None])
    name = f"case_00000.{(1, *RAW)}.npz"
    sparse.save_npz(folder / "gt" / name, sparse.csr_matrix(block(np.s_[:1], RAW).reshape(1, -1)))
    (folder / "0016.json").write_text(
        json.dumps({"training": [{"image": "0016/ct/case_00000.npy", "label": f"0016/gt/{name}"}]})
    )
    case = read_one(tmp_path)
    assert case.id == "case_00000"
    np.testing.assert_array_equal(case.mask("liver"), block(np.s_[:, :, :1]))


def item(label: str, code: str = "0003", case: str = "a") -> dict[str, str]:
    return {"image": f"{code}/{case}/image.npy", "label": f"{code}/{case}/{label}"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([item("masks/mask_4.npy")], r"train\[0\]: mask_4.npy is no class of 0003, which has 4, counted from 0"),
        ([item("masks/mask_liver.npy")], r"'mask_liver.npy' is neither mask_<class>.npy nor"),
        ([item("mask_(4, 5, 6).npz")], r"'mask_\(4, 5, 6\).npz' is neither"),
        ([item("mask_(4, 5, 6, 4).npz.py")], "is neither"),
        ([item("mask_(5, 5, 6, 4).npz")], r"has 5 classes, 0003 has 4"),
        ([item("mask_(4, 5, 6, 4).npz"), item("mask_(4, 9, 9, 9).npz")], r"train\[1\]: the masks of a were listed"),
        ([item("m/mask_1.npy"), item("n/mask_1.npy")], r"train\[1\]: the masks of a were listed before"),
        ([{"image": "../x.npy", "label": "y"}], "does not stay inside the data folder"),
        ([{"image": "x.npy"}], r'train\[0\]: an item \{"image"'),
        ([], "no list train or test with anything in it"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, str]], said: str) -> None:
    write(tmp_path, "0003", train=rows)
    with pytest.raises(BadTable, match=rf"0003\.json.*{said}"):
        list(M3DSeg(root=tmp_path).entries())


def test_bad_rows_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = prepared(tmp_path, "0003", "a", {0: block(np.s_[:1])[None]})
    write(tmp_path, "0003", train=[*rows, item("masks/mask_9.npy")])
    source = M3DSeg(root=tmp_path, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        (entry,) = source.entries()
    assert entry.image_id == "a" and len(source.rejected) == 1 and "mask_9.npy" in caplog.text


def test_a_case_in_two_splits(tmp_path: Path) -> None:
    rows = prepared(tmp_path, "0003", "a", {0: block(np.s_[:1])[None]})
    write(tmp_path, "0003", train=rows, test=rows)
    with pytest.raises(BadTable, match=r"1 images \(a\)"):
        list(M3DSeg(root=tmp_path).entries())
    assert [entry.split for entry in M3DSeg(root=tmp_path, on_leak="drop").entries()] == ["test"]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.ones((1, 4, 6, 4), bool), r"the mask has shape \(4, 6, 4\), the image \(4, 6, 5\)"),
        (np.ones((1, 1, 1, 1), bool), r"the mask has shape \(1, 1, 1\)"),
        (np.full((1, *SHAPE), 3), r"a mask has 0 and 1, this one has \[3\]"),
        (np.full((1, *SHAPE), np.nan), r"a mask has 0 and 1"),
        (np.full((1, *SHAPE), None), "not a plain .npy array"),
        (np.full((1, *SHAPE), "a"), "one array of numbers"),
        (np.ones((2, *SHAPE), bool), r"this array has shape \(2, 4, 6, 5\)"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, mask: np.ndarray, said: str) -> None:
    write(tmp_path, "0003", train=prepared(tmp_path, "0003", "a", {2: mask}))
    with pytest.raises(BadScan, match=rf"mask_2\.npy: .*{said}"):
        read_one(tmp_path)


def test_masks_of_ones_and_zeros_in_any_type(tmp_path: Path) -> None:
    mask = block(np.s_[:2])
    write(
        tmp_path, "0003", train=prepared(tmp_path, "0003", "a", {0: mask.astype(np.float32), 1: mask.astype(np.int64)})
    )
    case = read_one(tmp_path)
    np.testing.assert_array_equal(case.mask("kidneys"), mask)
    np.testing.assert_array_equal(case.mask("liver"), mask)


def test_a_missing_mask_fails_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "0003", train=prepared(tmp_path, "0003", "a", {0: block(np.s_[:1])[None]}))
    (tmp_path / "M3D_Seg_npy/0003/a/masks/mask_0.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"mask_0\.npy: no such file"):
        read_one(tmp_path)


def broken_raw(root: Path, matrix: object, **arrays: np.ndarray) -> None:
    row = raw(root, "0016", "a", np.ones((1, *RAW), bool))
    path = root / "M3D_Seg" / row["label"]
    if arrays:
        np.savez(path, **arrays)
    elif isinstance(matrix, bytes):
        path.write_bytes(matrix)
    else:
        sparse.save_npz(path, matrix)
    write(root, "0016", "M3D_Seg", train=[row])


def test_packed_masks_that_cannot_be_used(tmp_path: Path) -> None:
    size = int(np.prod(RAW))
    csr = {"format": np.array(b"csr"), "shape": np.array([1, size]), "data": np.ones(1), "indptr": np.array([0, 1])}
    broken_raw(tmp_path, b"PK\x03\x04 cut short")
    with pytest.raises(BadScan, match=r"\.npz: not a sparse matrix, or a damaged one"):
        read_one(tmp_path)
    broken_raw(tmp_path, sparse.csr_matrix((1, 7)))
    with pytest.raises(BadScan, match=rf"a matrix of 1 x {size} is needed, this is \(1, 7\)"):
        read_one(tmp_path)
    broken_raw(tmp_path, None, **csr, indices=np.array([size + 5]))  # a voxel outside the image
    with pytest.raises(BadScan, match="a damaged one"):
        read_one(tmp_path)
    broken_raw(tmp_path, None, **{**csr, "data": np.array([print], object)}, indices=np.array([0]))
    with pytest.raises(BadScan, match=r"allow_pickle=False"):
        read_one(tmp_path)
    broken_raw(tmp_path, None, other=np.ones(3))
    with pytest.raises(BadScan, match="not a sparse matrix"):
        read_one(tmp_path)


def test_a_packed_mask_of_another_shape(tmp_path: Path) -> None:
    row = raw(tmp_path, "0016", "a", np.ones((1, *RAW), bool))
    np.save(tmp_path / "M3D_Seg/0016/a/image.npy", ramp((1, 5, 6, 5)))
    write(tmp_path, "0016", "M3D_Seg", train=[row])
    with pytest.raises(BadScan, match=r"its name says \(5, 6, 4\), the image has \(5, 6, 5\)"):
        read_one(tmp_path)


def test_no_lists_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no <code>/<code>.json in it nor in M3D_Seg_npy"):
        list(M3DSeg(root=tmp_path).entries())
