"""A clean store has no finding; settings, reports and the rules' finer points."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.record import NEEDS
from data_prep.terms import Terms
from data_prep.verify.findings import CHECKS, Finding, Findings
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


def sealed(store, settings=ONE, **options):
    """The report where the store had been prepared as it is."""
    small.seal(store)
    return verify(store, settings=settings, **options)


def found(store, **options):
    """Severity and check of every finding of a sealed store."""
    report = sealed(store, **options)
    return [(one.severity, one.check) for one in report.findings], report


def test_a_clean_store_has_no_finding(store):
    findings, report = found(store, render=lambda record: None)
    assert findings == []
    assert report.ok
    assert report.looked_at == {"records": 27, "images": 3}
    assert report.skipped == {}


def test_every_check_is_explained_and_written_out(store, tmp_path):
    edit(store, lambda row: row.update(task="raport"), id="mini/a/3")
    report = sealed(store)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(content["checks"]) == list(CHECKS)
    assert content["checks"]["tasks"]["errors"] == content["errors"] == 1
    assert content["checks"]["tasks"]["findings"][0]["where"] == "records.jsonl:4"
    page = report.to_markdown()
    assert all(f"| {check} |" in page for check in CHECKS)
    assert "unknown task 'raport'; did you mean 'report'?" in page


def truncate_image(store):
    path = store / "images/mini/a.npy"
    path.write_bytes(path.read_bytes()[:-7])


def other_mask_shape(store):
    small.save_labels(store, "mini/a", small.labels()[..., :-1])


def other_name(store):
    def change(row):
        row["target"]["masks"][0]["name"] = "spleen"

    edit(store, change, id="mini/a/5")


def inclusive_box(store):
    def change(row):
        row["target"]["boxes"][0]["hi"] = [side - 1 for side in small.LIVER[1]]

    edit(store, change, id="mini/a/1")


def unknown_box_name(store):
    def change(row):
        row["target"]["boxes"][0]["name"] = "purple unicorn"

    edit(store, change, id="mini/a/2")


def copied_volume(store):
    (store / "images/mini/b.npy").write_bytes((store / "images/mini/a.npy").read_bytes())


def test_all_faults_of_a_line_are_told(store):
    def change(row):
        del row["patient_id"]
        row["split"] = "trian"
        row["extra"] = 1

    edit(store, change, id="mini/a/3")
    report = sealed(store)
    messages = [str(one) for one in report.findings]
    assert len(messages) == 3
    assert all(message.startswith("records.jsonl:4: ") for message in messages)
    assert any("patient_id: Field required" in message for message in messages)
    assert any("split: Input should be 'train'" in message for message in messages)
    assert any("extra: unknown key" in message for message in messages)


def test_lines_that_are_no_text_are_told_by_number(store):
    with records(store).open("ab") as file:
        file.write(b'\xff\xfe{"schema"\n\n[]\n')
    report = sealed(store)
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
    report = sealed(store, settings=Settings(workers=1, allow=("volumes",)))
    assert report.ok
    assert report.count("warning", "volumes") == 1


@pytest.mark.parametrize("setting", [{"allow": ("volume",)}, {"limit": 0}, {"workers": 0}, {"similar": 0.0}])
def test_settings_that_mean_nothing_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Settings(**setting)


def test_fast_finds_what_headers_show_and_says_what_it_skips(store):
    fast = Settings(workers=1, fast=True)
    assert sealed(store, settings=fast).findings == ()
    truncate_image(store)
    other_mask_shape(store)
    constant_b = np.full(small.GRID, 7, np.uint8)
    small.save_image(store, "mini/b", constant_b)
    report = sealed(store, settings=fast)
    assert [one.check for one in report.findings] == ["files", "arrays"]
    assert "is cut short: 601 bytes of 608" in report.findings[0].message
    assert "--fast" in report.skipped["blank"]


def test_a_box_of_one_connected_part_is_no_error(store):
    array = small.labels()
    array[0, 5, 7, 9] = 1  # a second part, far off
    small.save_labels(store, "mini/a", array)
    assert sealed(store).findings == ()


def test_overlapping_layers_are_looked_at_together(store):
    flat, spread = small.labels(), np.zeros((2, *small.GRID), np.uint8)
    spread[0][flat[0] == 1] = 1
    spread[1][flat[0] == 2] = 2
    spread[1][2, 3, 3] = 0
    small.save_labels(store, "mini/a", spread)
    assert sealed(store).findings == ()


def test_a_question_may_name_all_of_its_options(store):
    def change(row):
        row["prompt"]["slots"]["question"] = "Is the liver or the spleen larger?"
        row["target"].update(options=["liver", "spleen"], choice=0)

    edit(store, change, id="mini/a/7")
    assert sealed(store).findings == ()


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
    assert sealed(store).findings == ()
    edit(store, change("the kidney on the left"), id="mini/a/5")
    assert [one.check for one in sealed(store).findings] == ["answers"]


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
    assert set(report.skipped) == {"tasks", "index", "parts", "checksums", "leftovers", "rejects"}


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
    alone, together = (sealed(store, settings=Settings(workers=number)) for number in (1, 2))
    assert together.findings == alone.findings
    assert len(alone.findings) == 2


def test_a_missing_store_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="m3d data prepare"):
        verify(tmp_path)
