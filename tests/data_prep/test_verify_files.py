"""Breaches in lines, files and voxels: each is found by its own check, and nothing else is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data_prep.verify.run import Settings, verify

spec = importlib.util.spec_from_file_location("small_store", Path(__file__).parents[1] / "fixtures" / "small_store.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)

ONE = Settings(workers=1)


@pytest.fixture
def store(tmp_path):
    return small.build(tmp_path / "store")


def records(store):
    return store / "records.jsonl"


def edit(store, change, **where):
    small.edit(records(store), change, **where)


def edit_index(store, change, image_id="mini/a"):
    small.edit(store / "images.jsonl", change, image_id=image_id)


def break_line(store):
    lines = records(store).read_text().splitlines()
    records(store).write_text("\n".join([lines[0][:-5], *lines[1:]]) + "\n")


def break_index_line(store):
    edit_index(store, lambda row: row["way"].pop("lattice"), "mini/c")
    lines = small.read_lines(records(store))
    small.write_lines(records(store), [row for row in lines if row["image_id"] != "mini/c"])
    for folder, ending in (("images", "npy"), ("masks", "npz")):
        (store / folder / f"mini/c.{ending}").unlink()


def twice(store):
    rows = small.read_lines(records(store))
    rows[1]["id"] = rows[0]["id"]
    small.write_lines(records(store), rows)


def other_patient(store):
    edit(store, lambda row: row.update(patient_id="patient-z"), id="mini/a/3")


def other_spacing(store):
    edit(store, lambda row: row["media"][0].update(spacing_mm=[1.0, 1.0, 1.0]), id="mini/a/3")


def forget_in_index(store):
    rows = small.read_lines(store / "images.jsonl")
    small.write_lines(store / "images.jsonl", rows[:2])
    (store / "parts/mini/c.json").unlink()


def unknown_task(store):
    edit(store, lambda row: row.update(task="vqa.oben"), id="mini/a/8")


def remove_image(store):
    (store / "images/mini/a.npy").unlink()


def remove_index(store):
    (store / "preprocess.json").unlink()


def truncate_image(store):
    path = store / "images/mini/a.npy"
    path.write_bytes(path.read_bytes()[:-7])


def empty_image(store):
    (store / "images/mini/a.npy").write_bytes(b"")


def pickle_image(store):
    small.save_image(store, "mini/a", np.array([{"a": 1}], dtype=object))


def no_array(store):
    (store / "images/mini/a.npy").write_bytes(b"<html>not found</html>")


def truncate_mask(store):
    path = store / "masks/mini/a.npz"
    path.write_bytes(path.read_bytes()[:-20])


def rename_member(store):
    np.savez(store / "masks/mini/a.npz", mask=small.labels())


def other_shape(store):
    small.save_image(store, "mini/a", np.random.default_rng(9).integers(0, 9, (6, 8, 9)).astype(np.uint8))


def other_dtype(store):
    small.save_image(store, "mini/a", np.random.default_rng(9).integers(0, 9, small.GRID).astype(np.int16))


def other_mask_shape(store):
    small.save_labels(store, "mini/a", small.labels()[..., :-1])


def float_labels(store):
    small.save_labels(store, "mini/a", small.labels().astype(np.float32))


def add_nan(store):
    array = np.random.default_rng(9).random(small.GRID).astype(np.float32)
    array[0, 0, 0] = np.nan
    small.save_image(store, "mini/a", array)


def out_of_unit(store):
    small.save_image(store, "mini/a", np.random.default_rng(9).normal(40, 300, small.GRID).astype(np.float32))


def constant(store):
    small.save_image(store, "mini/a", np.full(small.GRID, 7, np.uint8))


ERRORS = [
    (break_line, "schema", "records.jsonl:1: Invalid JSON"),
    (break_index_line, "schema", "images.jsonl:3: needs the key 'lattice'"),
    (twice, "ids", "records.jsonl:2: id 'mini/a/0' is that of line 1"),
    (other_patient, "agreement", "records.jsonl:4: image 'mini/a' is of patient 'patient-z'"),
    (other_spacing, "agreement", "spacing_mm of image 'mini/a' differ from images.jsonl:1"),
    (forget_in_index, "index", "records.jsonl:19: image 'mini/c' does not stand in images.jsonl"),
    (unknown_task, "tasks", "unknown task 'vqa.oben'; did you mean 'vqa.open'?"),
    (remove_image, "files", "image mini/a: images/mini/a.npy: missing"),
    (remove_index, "files", "preprocess.json: missing"),
    (truncate_image, "files", "is damaged or cut short"),
    (empty_image, "files", "is empty"),
    (pickle_image, "files", "is pickled, which is never opened"),
    (no_array, "files", "is no .npy or .npz file"),
    (truncate_mask, "files", "masks/mini/a.npz: is damaged or cut short"),
    (rename_member, "files", "holds no array 'labels', only 'mask'"),
    (other_shape, "arrays", "has shape (6, 8, 9), the record says (6, 8, 10)"),
    (other_dtype, "arrays", "voxels of type int16, which cannot be unit='norm01'"),
    (other_mask_shape, "arrays", "has shape (1, 6, 8, 9)"),
    (float_labels, "arrays", "labels of type float32"),
    (add_nan, "values", "1 voxels are NaN or infinite"),
    (out_of_unit, "values", "but unit='norm01' is 0 to 1"),
    (constant, "blank", "every voxel is 7"),
]


@pytest.mark.parametrize(("breach", "check", "message"), ERRORS, ids=[breach.__name__ for breach, _, _ in ERRORS])
def test_each_breach_is_found_and_nothing_else(store, breach, check, message):
    breach(store)
    small.seal(store)
    report = verify(store, settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("error", check)], report.findings
    assert message in str(report.findings[0])
    assert not report.ok
