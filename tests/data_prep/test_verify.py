"""A clean store has no finding, and each rule finds its own breach and nothing else."""

import importlib.util
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.record import NEEDS
from data_prep.terms import Terms
from data_prep.verify.facts import ReportText
from data_prep.verify.findings import CHECKS, Finding, Findings
from data_prep.verify.run import Settings, verify
from data_prep.verify.twins import check_reports, jaccard, shingles
from data_prep.verify.words import words_of

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


def found(store, **options):
    """Severity and check of every finding."""
    report = verify(store, settings=ONE, **options)
    return [(one.severity, one.check) for one in report.findings], report


def test_a_clean_store_has_no_finding(store):
    findings, report = found(store, render=lambda record: None)
    assert findings == []
    assert report.ok
    assert report.looked_at == {"records": 27, "images": 3}
    assert report.skipped == {}


def test_every_check_is_explained_and_written_out(store, tmp_path):
    edit(store, lambda row: row.update(task="raport"), id="mini/a/3")
    report = verify(store, settings=ONE)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(content["checks"]) == list(CHECKS)
    assert content["checks"]["tasks"]["errors"] == content["errors"] == 1
    assert content["checks"]["tasks"]["findings"][0]["where"] == "records.jsonl:4"
    page = report.to_markdown()
    assert all(f"| {check} |" in page for check in CHECKS)
    assert "unknown task 'raport'; did you mean 'report'?" in page


# --- one breach a rule: what is done to the store, what is found, and what the message says ---


def break_line(store):
    lines = records(store).read_text().splitlines()
    records(store).write_text("\n".join([lines[0][:-5], *lines[1:]]) + "\n")


def break_index_line(store):
    edit_index(store, lambda row: row["way"].pop("lattice"), "mini/c")
    lines = small.read_lines(records(store))
    small.write_lines(records(store), [row for row in lines if row["image_id"] != "mini/c"])
    for folder, ending in (("images", "npy"), ("masks", "npz"), ("parts", "json")):
        (store / folder / f"mini/c.{ending}").unlink()


def twice(store):
    rows = small.read_lines(records(store))
    rows[1]["id"] = rows[0]["id"]
    small.write_lines(records(store), rows)


def scatter(store):
    rows = small.read_lines(records(store))
    small.write_lines(records(store), [*rows[1:], rows[0]])


def other_patient(store):
    edit(store, lambda row: row.update(patient_id="patient-z"), id="mini/a/3")


def other_spacing(store):
    edit(store, lambda row: row["media"][0].update(spacing_mm=[1.0, 1.0, 1.0]), id="mini/a/3")


def forget_in_index(store):
    rows = small.read_lines(store / "images.jsonl")
    small.write_lines(store / "images.jsonl", rows[:2])
    (store / "parts/mini/c.json").unlink()


def forget_in_records(store):
    rows = small.read_lines(records(store))
    small.write_lines(records(store), [row for row in rows if row["image_id"] != "mini/c"])


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
    findings, report = found(store)
    assert findings == [("error", check)], [str(one) for one in report.findings]
    assert message in str(report.findings[0])
    assert not report.ok


def test_a_label_beyond_the_index_has_no_name_and_no_voxel(store):
    label_without_name(store)
    findings, report = found(store)
    assert findings == [("error", "labels"), ("error", "empty")]
    assert "label 3 ('liver') has no name in images.jsonl" in report.findings[0].message


def leave_temporary(store):
    (store / "images/mini/.0a1b2c3d.d.npy").write_bytes(b"half")


def leave_stray(store):
    (store / "parts/mini/d.json").write_text("{}")


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
    (leave_stray, "leftovers", "parts/mini/d.json: 1 file(s) under parts/"),
    (reject, "rejects", "2 refused, such as mini/7: x/7.nii: 7 slices"),
]


@pytest.mark.parametrize(("breach", "check", "message"), WARNINGS, ids=[breach.__name__ for breach, _, _ in WARNINGS])
def test_what_only_deserves_a_look_is_a_warning(store, breach, check, message):
    breach(store)
    findings, report = found(store)
    assert findings == [("warning", check)], [str(one) for one in report.findings]
    assert message in str(report.findings[0])
    assert report.ok


# --- the rules' finer points ---


def test_all_faults_of_a_line_are_told(store):
    def change(row):
        del row["patient_id"]
        row["split"] = "trian"
        row["extra"] = 1

    edit(store, change, id="mini/a/3")
    report = verify(store, settings=ONE)
    messages = [str(one) for one in report.findings]
    assert len(messages) == 3
    assert all(message.startswith("records.jsonl:4: ") for message in messages)
    assert any("patient_id: Field required" in message for message in messages)
    assert any("split: Input should be 'train'" in message for message in messages)
    assert any("extra: unknown key" in message for message in messages)


def test_lines_that_are_no_text_are_told_by_number(store):
    with records(store).open("ab") as file:
        file.write(b'\xff\xfe{"schema"\n\n[]\n')
    report = verify(store, settings=ONE)
    assert [one.where for one in report.findings] == ["records.jsonl:28", "records.jsonl:30"]
    assert {one.check for one in report.findings} == {"schema"}


def test_what_cannot_be_rendered_is_found_with_its_reason(store):
    findings, report = found(store, render=lambda record: "no slot 'object'" if record.id == "mini/b/1" else None)
    assert findings == [("error", "tasks")]
    assert str(report.findings[0]) == "records.jsonl:11: task rec.box3d cannot be rendered: no slot 'object'"
    assert "retrieval" in NEEDS


def test_every_finding_is_counted_and_some_are_kept():
    findings = Findings(limit=2, allowed=("boxes",))
    for number in range(5):
        findings.error("empty", f"image {number}", "x")
        findings.error("boxes", f"image {number}", "x")
    assert findings.counts == {("empty", "error"): 5, ("boxes", "warning"): 5}
    assert [one.where for one in findings.kept if one.check == "empty"] == ["image 0", "image 1"]
    assert Finding("warning", "boxes", "image 0", "x") in findings.kept


def test_an_allowed_check_only_warns(store):
    copied_volume(store)
    report = verify(store, settings=Settings(workers=1, allow=("volumes",)))
    assert report.ok
    assert report.count("warning", "volumes") == 1


@pytest.mark.parametrize("setting", [{"allow": ("volume",)}, {"limit": 0}, {"workers": 0}, {"similar": 0.0}])
def test_settings_that_mean_nothing_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Settings(**setting)


def test_fast_finds_what_headers_show_and_says_what_it_skips(store):
    fast = Settings(workers=1, fast=True)
    assert verify(store, settings=fast).findings == ()
    truncate_image(store)
    other_mask_shape(store)
    constant_b = np.full(small.GRID, 7, np.uint8)
    small.save_image(store, "mini/b", constant_b)
    report = verify(store, settings=fast)
    assert [one.check for one in report.findings] == ["files", "arrays"]
    assert "is cut short: 601 bytes of 608" in report.findings[0].message
    assert "--fast" in report.skipped["blank"]


def test_a_box_of_one_connected_part_is_no_error(store):
    array = small.labels()
    array[0, 5, 7, 9] = 1  # a second part, far off
    small.save_labels(store, "mini/a", array)
    assert verify(store, settings=ONE).findings == ()


def test_overlapping_layers_are_looked_at_together(store):
    flat, spread = small.labels(), np.zeros((2, *small.GRID), np.uint8)
    spread[0][flat[0] == 1] = 1
    spread[1][flat[0] == 2] = 2
    spread[1][2, 3, 3] = 0
    small.save_labels(store, "mini/a", spread)
    assert verify(store, settings=ONE).findings == ()


def test_a_question_may_name_all_of_its_options(store):
    def change(row):
        row["prompt"]["slots"]["question"] = "Is the liver or the spleen larger?"
        row["target"].update(options=["liver", "spleen"], choice=0)

    edit(store, change, id="mini/a/7")
    assert verify(store, settings=ONE).findings == ()


def test_a_paired_organ_is_given_away_only_with_its_side(store):
    def change(description):
        def set_it(row):
            row["prompt"]["slots"]["description"] = description
            row["target"]["masks"][0].update(label=3, name="left kidney")

        return set_it

    array = small.labels()
    array[0, 5, 7, 9] = 3
    small.save_labels(store, "mini/a", array)
    edit_index(store, lambda row: row["names"].update({"3": "left kidney"}))
    edit(store, change("the larger of the two kidneys"), id="mini/a/5")
    assert verify(store, settings=ONE).findings == ()
    edit(store, change("the kidney on the left"), id="mini/a/5")
    assert [one.check for one in verify(store, settings=ONE).findings] == ["answers"]


def test_one_number_of_a_patient_in_two_data_sets_is_a_warning(store):
    for number in range(9):
        change = {"patient_id": "patient-a", "source": {"dataset": "Other"}}
        edit(store, lambda row, change=change: row.update(change), id=f"mini/b/{number}")
    edit_index(store, lambda row: row.update(patient_id="patient-a", dataset="Other"), "mini/b")
    findings, report = found(store)
    assert findings == [("warning", "patients")]
    assert "if it is one patient, choose one split" in report.findings[0].message


def test_a_file_of_records_is_checked_against_its_root(store, tmp_path):
    alone = tmp_path / "elsewhere" / "mine.jsonl"
    alone.parent.mkdir()
    alone.write_bytes(records(store).read_bytes())
    assert {one.check for one in verify(alone, settings=ONE).findings} == {"files"}
    report = verify(alone, root=store, settings=ONE)
    assert report.findings == ()
    assert set(report.skipped) == {"tasks", "index", "leftovers", "rejects"}


def test_without_an_index_one_label_of_two_names_is_found(store):
    other_name(store)
    report = verify(records(store), settings=ONE)
    assert {one.check for one in report.findings} == {"labels", "names"}
    assert "label 1 is called 'liver' here and 'spleen' elsewhere" in str(report.findings[0])


def test_without_an_index_two_labels_of_one_name_are_found(store, tmp_path):
    def change(row):
        row["target"]["masks"][1]["name"] = "liver"

    edit(store, change, id="mini/a/6")
    report = verify(records(store), settings=ONE)
    assert "labels 1, 2 are all called 'liver'" in " ".join(map(str, report.findings))


def test_no_dictionary_and_no_index_means_no_opinion_on_names(store):
    unknown_box_name(store)
    assert verify(records(store), settings=ONE).findings != ()
    report = verify(records(store), settings=ONE, terms=Terms(()))
    assert report.findings == ()
    assert "no images.jsonl and no dictionary" in report.skipped["names"]


def test_processes_find_the_same_as_one(store):
    inclusive_box(store)
    copied_volume(store)
    alone, together = (verify(store, settings=Settings(workers=number)) for number in (1, 2))
    assert together.findings == alone.findings
    assert len(alone.findings) == 2


def test_a_missing_store_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="m3d data prepare"):
        verify(tmp_path)


# --- near-duplicates ---


def report_text(number, split, text, by_rule=False):
    return ReportText(f"records.jsonl:{number}", f"image-{number}", split, text, by_rule)


def sentence(rng, length=40):
    return " ".join(rng.choice(WORDS) for _ in range(length))


WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "or")]


def test_jaccard_of_shingles_by_hand():
    one, other = words_of("a b c d e f"), words_of("A b, c d e g.")
    assert shingles(one) == {("a", "b", "c", "d", "e"), ("b", "c", "d", "e", "f")}
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(1 / 3)
    assert jaccard(shingles(words_of("a b")), shingles(words_of("a b"))) == 1.0
    assert words_of("两肺纹理 clear, masses") == ("两", "肺", "纹", "理", "clear", "masse")


def test_the_threshold_is_exact():
    words = sentence(random.Random(0), 44).split()  # 40 shingles
    changed = [*words[:-4], "x", "x", "x", "x"]  # 4 shingles of each are the other's no more: 36 / 44 = 0.818
    texts = [report_text(1, "train", " ".join(words)), report_text(2, "test", " ".join(changed))]
    assert len(list(check_reports(texts, threshold=0.81))) == 1
    assert list(check_reports(texts, threshold=0.82)) == []


def test_planted_twins_among_many_reports_are_all_found_quickly():
    rng = random.Random(1)
    train = [sentence(rng) for _ in range(1500)]
    planted = [" ".join([*text.split()[:-1], "changed"]) for text in train[::50]]  # 35 of 37 shingles shared
    test = [*planted, *(sentence(rng) for _ in range(300))]
    texts = [report_text(n, "train", text) for n, text in enumerate(train)]
    texts += [report_text(10_000 + n, "test", text) for n, text in enumerate(test)]
    started = time.monotonic()
    findings = list(check_reports(texts))
    assert time.monotonic() - started < 20
    assert {one.where for one in findings} == {f"records.jsonl:{10_000 + n}" for n in range(len(planted))}
    assert {one.severity for one in findings} == {"error"}


def test_reports_made_by_rule_are_not_near_duplicates_of_each_other():
    text = sentence(random.Random(2))
    texts = [report_text(1, "train", f"{text} 12"), report_text(2, "test", f"{text} 13")]
    assert len(list(check_reports(texts))) == 1
    by_rule = [ReportText(one.where, one.image_id, one.split, one.text, True) for one in texts]
    assert list(check_reports(by_rule)) == []
