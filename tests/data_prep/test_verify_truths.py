"""Breaches in labels, boxes, words and splits: each is found by its own check, and nothing else is."""

import importlib.util
from pathlib import Path

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


def nameless_label(store):
    array = small.labels()
    array[0, 0, 0, 0] = 9
    small.save_labels(store, "mini/a", array)


def other_name(store):
    def change(row):
        row["target"]["masks"][0]["name"] = "spleen"

    edit(store, change, id="mini/a/5")


def label_without_name(store):
    def change(row):
        row["target"]["masks"][0]["label"] = 3

    array = small.labels()
    small.save_labels(store, "mini/a", array)
    edit(store, change, id="mini/a/5")


def empty_mask(store):
    array = small.labels()
    array[array == 2] = 0
    small.save_labels(store, "mini/a", array)


def empty_boxed(store):
    """The record has a box and no mask; the index knows the label."""
    array = small.labels()
    array[array == 1] = 0
    small.save_labels(store, "mini/a", array)
    rows = small.read_lines(records(store))
    small.write_lines(records(store), [row for row in rows if row["id"] not in ("mini/a/5", "mini/a/6")])


def absent_but_drawn(store):
    edit(store, lambda row: row["target"].update(boxes=[]), id="mini/a/1")


def inclusive_box(store):
    def change(row):
        row["target"]["boxes"][0]["hi"] = [side - 1 for side in small.LIVER[1]]

    edit(store, change, id="mini/a/1")


def unknown_object(store):
    edit(store, lambda row: row["prompt"]["slots"].update(object="livver"), id="mini/a/1")


def unknown_box_name(store):
    def change(row):
        row["target"]["boxes"][0]["name"] = "purple unicorn"

    edit(store, change, id="mini/a/2")


def asks_for_another(store):
    edit(store, lambda row: row["prompt"]["slots"].update(object="spleen"), id="mini/a/1")


def one_name_for_two(store):
    """As the reference has it: two vertebrae by one name."""
    edit_index(store, lambda row: row.update(names={"1": "liver", "2": "spleen", "3": "spleen"}))


def misspelt_everywhere(store):
    def change(row):
        row["names"]["3"] = "gallblader"

    for image_id in small.SPLITS:
        edit_index(store, change, image_id)


def told_description(store):
    edit(store, lambda row: row["prompt"]["slots"].update(description="The Liver, a large organ."), id="mini/a/5")


def told_box_description(store):
    edit(store, lambda row: row["prompt"]["slots"].update(description="both lobes of the liver"), id="mini/a/0")


def told_option(store):
    edit(store, lambda row: row["prompt"]["slots"].update(question="Which of the 2 organs is it?"), id="mini/a/7")


def shared_patient(store):
    for number in range(9):
        edit(store, lambda row: row.update(patient_id="patient-a"), id=f"mini/b/{number}")
    edit_index(store, lambda row: row.update(patient_id="patient-a"), "mini/b")


def split_image(store):
    """One image in two splits is one leak, not two."""
    edit(store, lambda row: row.update(split="test"), id="mini/a/3")


def copied_volume(store):
    (store / "images/mini/b.npy").write_bytes((store / "images/mini/a.npy").read_bytes())


def copied_scan(store):
    edit_index(store, lambda row: row.update(sha256=f"{0:064x}"), "mini/b")


def copied_report(store):
    text = small.REPORTS["mini/a"].upper().replace(".", " ;")
    edit(store, lambda row: row["target"].update(text=text), id="mini/b/3")


def nearly_copied_report(store):
    text = small.REPORTS["mini/a"].replace("The upper", "An upper")
    edit(store, lambda row: row["target"].update(text=text), id="mini/b/3")


ERRORS = [
    (nameless_label, "labels", "labels [9] have voxels and no name"),
    (other_name, "labels", "label 1 is called 'spleen' here and 'liver' in images.jsonl"),
    (empty_mask, "empty", "records.jsonl:7: masks/mini/a.npz: the mask of 'spleen' (label 2) has no voxel"),
    (empty_boxed, "empty", "a box is drawn around 'liver', but its label 1 has no voxel"),
    (absent_but_drawn, "empty", "says that there is no 'liver', but label 1 has voxels"),
    (inclusive_box, "boxes", "the box of 'liver' is (1, 1, 1) to (3, 4, 3), its mask (label 1) reaches"),
    (unknown_object, "names", "knows the class 'livver'; did you mean 'liver'?"),
    (unknown_box_name, "names", "knows the class 'purple unicorn'; this image has liver, spleen"),
    (asks_for_another, "names", "asks for 'spleen', but the target is 'liver'"),
    (one_name_for_two, "names", "labels 2, 3 are all called 'spleen'"),
    (misspelt_everywhere, "names", "'gallblader' names a label in 3 image(s); did you mean 'gallbladder'?"),
    (told_description, "answers", "the class name 'liver' stands in the question or description"),
    (told_box_description, "answers", "records.jsonl:1: the class name 'liver'"),
    (told_option, "answers", "the right option '2 organs' stands in the question"),
    (shared_patient, "patients", "patient 'patient-a' of Mini is in train (images.jsonl:1) and validation"),
    (split_image, "patients", "in train (images.jsonl:1) and test (records.jsonl:4)"),
    (copied_volume, "volumes", "the same stored voxels under 2 ids: mini/a (train), mini/b (validation)"),
    (copied_scan, "volumes", "the same scan under 2 ids"),
    (copied_report, "reports", "the text of mini/a (train) is the same text as that of mini/b (validation"),
    (nearly_copied_report, "reports", "% the same as that of"),
]


@pytest.mark.parametrize(("breach", "check", "message"), ERRORS, ids=[breach.__name__ for breach, _, _ in ERRORS])
def test_each_breach_is_found_and_nothing_else(store, breach, check, message):
    breach(store)
    small.seal(store)
    report = verify(store, settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("error", check)], report.findings
    assert message in str(report.findings[0])
    assert not report.ok


def test_a_label_beyond_the_index_has_no_name_and_no_voxel(store):
    label_without_name(store)
    small.seal(store)
    report = verify(store, settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("error", "labels"), ("error", "empty")]
    assert "label 3 ('liver') has no name in images.jsonl" in report.findings[0].message
