"""What only deserves a look is a warning, found by its own check, and leaves a store in order."""

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


def scatter(store):
    rows = small.read_lines(records(store))
    small.write_lines(records(store), [*rows[1:], rows[0]])


def forget_in_records(store):
    rows = small.read_lines(records(store))
    small.write_lines(records(store), [row for row in rows if row["image_id"] != "mini/c"])


def leave_temporary(store):
    (store / "images/mini/.0a1b2c3d.d.npy").write_bytes(b"half")


def leave_stray(store):
    (store / "images/mini/d.npy").write_bytes(b"whole")


def reject(store):
    rows = [{"image_id": f"mini/{n}", "error": "BadScan", "reason": f"x/{n}.nii: {n} slices"} for n in "78"]
    small.write_lines(store / "rejects.jsonl", rows)


def nearly_blank(store):
    array = np.zeros((12, 30, 30), np.uint8)
    array[0, 0, 0] = 9
    for path, change in (("records.jsonl", lambda row: row["media"][0]), ("images.jsonl", lambda row: row["media"])):
        small.edit(store / path, lambda row, change=change: change(row).update(shape=[12, 30, 30]), image_id="mini/a")
    small.save_image(store, "mini/a", array)
    labels = np.zeros((1, 12, 30, 30), np.uint8)
    labels[:, :6, :8, :10] = small.labels()
    small.save_labels(store, "mini/a", labels)


def copied_within_split(store):
    (store / "images/mini/c.npy").write_bytes((store / "images/mini/a.npy").read_bytes())


def short_report(store):
    for image_id in ("mini/a", "mini/b"):
        edit(store, lambda row: row["target"].update(text="No abnormality is seen."), id=f"{image_id}/3")


def report_by_rule(store):
    text = small.REPORTS["mini/a"]
    for image_id in ("mini/a", "mini/b"):
        edit(store, lambda row: row.update(meta={"derivation": "x/1"}, target={"text": text}), id=f"{image_id}/3")


def unknown_term(store):
    edit_index(store, lambda row: row["names"].update({"3": "planning target"}))


def answer_in_path(store):
    edit(store, lambda row: row["target"].update(options=["mini", "spleen"], choice=0), id="mini/a/7")


WARNINGS = [
    (scatter, "order", "records.jsonl:27: entries of image 'mini/a' stand further up"),
    (forget_in_records, "index", "image 'mini/c' has no record"),
    (nearly_blank, "blank", "99.99% of the voxels have one value"),
    (copied_within_split, "volumes", "mini/a (train), mini/c (train)"),
    (short_report, "reports", "short texts may well agree"),
    (report_by_rule, "reports", "both are made by rule"),
    (unknown_term, "names", "'planning target' (1 image(s)) is no term of the dictionary"),
    (answer_in_path, "answers", "the right option 'mini' stands in the path 'images/mini/a.npy'"),
    (leave_temporary, "leftovers", "images/mini/.0a1b2c3d.d.npy: is a temporary file"),
    (leave_stray, "leftovers", "images/mini/d.npy: 1 file(s) under images/"),
    (reject, "rejects", "2 refused, such as mini/7: x/7.nii: 7 slices"),
]


@pytest.mark.parametrize(("breach", "check", "message"), WARNINGS, ids=[breach.__name__ for breach, _, _ in WARNINGS])
def test_what_only_deserves_a_look_is_a_warning(store, breach, check, message):
    breach(store)
    small.seal(store)
    report = verify(store, settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("warning", check)], report.findings
    assert message in str(report.findings[0])
    assert report.ok
