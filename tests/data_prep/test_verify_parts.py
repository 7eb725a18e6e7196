"""What was lost or altered after preparation, what says the same twice, and stores that preparation itself made."""

import dataclasses
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_prep.phantoms import head_neck
from data_prep.prepare import Job, prepare
from data_prep.preprocess import Preprocess, Window
from data_prep.sources.base import Entry
from data_prep.verify.run import Settings, verify
from data_prep.volume import BadScan

spec = importlib.util.spec_from_file_location("small_store", Path(__file__).parents[1] / "fixtures" / "small_store.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)

ONE = Settings(workers=1)


@pytest.fixture
def store(tmp_path):
    return small.build(tmp_path / "store")


def keep(path, wanted):
    small.write_lines(path, [row for row in small.read_lines(path) if wanted(row)])


def change_part(store, change):
    path = store / "parts/mini/a.json"
    part = json.loads(path.read_text())
    change(part)
    path.write_text(json.dumps(part))


# --- one loss or change a row; nothing is sealed after it ---


def lose_records(store):
    keep(store / "records.jsonl", lambda row: row["id"] not in ("mini/a/3", "mini/a/4"))


def lose_image(store):
    """Every line of an image and its files, not its part."""
    for name in ("records.jsonl", "images.jsonl"):
        keep(store / name, lambda row: row["image_id"] != "mini/c")
    (store / "images/mini/c.npy").unlink()
    (store / "masks/mini/c.npz").unlink()


def add_record(store):
    rows = small.read_lines(store / "records.jsonl")
    added = {**rows[3], "id": "mini/a/9", "target": {"text": "A second report, by nobody, of other content."}}
    small.write_lines(store / "records.jsonl", [*rows[:9], added, *rows[9:]])


def alter_record(store):
    small.edit(store / "records.jsonl", lambda row: row["target"].update(choice=2), id="mini/a/7")


def alter_image_line(store):
    small.edit(store / "images.jsonl", lambda row: row.update(complete=False, license="MIT"), image_id="mini/a")


def lose_part(store):
    (store / "parts/mini/b.json").unlink()


def cut_part(store):
    path = store / "parts/mini/a.json"
    path.write_bytes(path.read_bytes()[:-9])


def empty_part(store):
    (store / "parts/mini/a.json").write_text("{}")


def alter_part(store):
    change_part(store, lambda part: part["records"].pop())


def mirror_image(store):
    array = np.load(store / "images/mini/a.npy")
    small.save_image(store, "mini/a", array[..., ::-1])


def exchange_layers(store):
    """The same voxels by another compression: nothing but the bytes tells."""
    np.savez(store / "masks/mini/a.npz", labels=small.labels())


def lose_all(store):
    for name in ("records.jsonl", "images.jsonl"):
        (store / name).write_text("")
    for name in ("images", "masks", "parts"):
        shutil.rmtree(store / name)


LOSSES = [
    (lose_records, "parts", "parts/mini/a.json: 2 of its 9 records are not in records.jsonl, such as 'mini/a/3'"),
    (lose_image, "parts", "parts/mini/c.json: images.jsonl has no such image"),
    (add_record, "parts", "records.jsonl:10: 1 records of image 'mini/a' are not in parts/mini/a.json"),
    (alter_record, "parts", "records.jsonl:8: 1 records of image 'mini/a' differ from parts/mini/a.json"),
    (alter_image_line, "parts", "images.jsonl says something else in license, complete;"),
    (lose_part, "parts", "images.jsonl: image 'mini/b' has no part parts/mini/b.json"),
    (cut_part, "parts", "parts/mini/a.json: cannot be used"),
    (empty_part, "parts", "parts/mini/a.json: cannot be used ('image')"),
    (alter_part, "parts", "records.jsonl:9: 1 records of image 'mini/a' are not in parts/mini/a.json"),
    (mirror_image, "checksums", "images/mini/a.npy: is not as preparation wrote it"),
    (exchange_layers, "checksums", "masks/mini/a.npz: is not as preparation wrote it"),
    (lose_all, "content", "records.jsonl: holds no record"),
]


@pytest.mark.parametrize(("loss", "check", "message"), LOSSES, ids=[loss.__name__ for loss, _, _ in LOSSES])
def test_each_loss_is_found_and_nothing_else(store, loss, check, message):
    loss(store)
    report = verify(store, settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("error", check)], report.findings
    assert message in str(report.findings[0])


def test_the_order_of_keys_is_no_change(store):
    rows = small.read_lines(store / "records.jsonl")
    small.write_lines(store / "records.jsonl", [dict(reversed(row.items())) for row in rows])
    assert verify(store, settings=ONE).findings == ()


def test_fast_compares_parts_and_leaves_checksums(store):
    mirror_image(store)
    report = verify(store, settings=Settings(workers=1, fast=True))
    assert report.findings == ()
    assert "--fast" in report.skipped["checksums"]
    lose_records(store)
    assert [one.check for one in verify(store, settings=Settings(workers=1, fast=True)).findings] == ["parts"]


def test_a_store_without_checksums_or_parts_says_what_it_skips(store):
    small.edit(store / "images.jsonl", lambda row: row.pop("files"))
    mirror_image(store)
    shutil.rmtree(store / "parts")
    report = verify(store, settings=ONE)
    assert report.findings == ()
    assert report.skipped["checksums"] == "images.jsonl has none"
    assert "parts/" in report.skipped["parts"]


@pytest.mark.parametrize("files", [["images/mini/a.npy"], {"images/mini/a.npy": 7}])
def test_checksums_that_are_none_are_a_fault_of_the_line(store, files):
    small.edit(store / "images.jsonl", lambda row: row.update(files=files), image_id="mini/a")
    findings = verify(store, settings=ONE).findings
    assert "images.jsonl:1: files must be" in str(next(one for one in findings if one.check == "schema"))


def test_a_file_without_records_is_an_error(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n")
    report = verify(tmp_path / "mine.jsonl", settings=ONE)
    assert [(one.severity, one.check) for one in report.findings] == [("error", "content")]


# --- equal records ---


def add_twin(store, **changes):
    """The answered question of the first image once more under another id."""
    rows = small.read_lines(store / "records.jsonl")
    small.write_lines(store / "records.jsonl", [*rows[:9], {**rows[8], "id": "mini/a/9", **changes}, *rows[9:]])
    small.seal(store)
    return [(one.severity, one.check, str(one)) for one in verify(store, settings=ONE).findings]


def test_a_record_under_two_ids_is_an_error(store):
    [(severity, check, told)] = add_twin(store)
    assert (severity, check) == ("error", "repeats")
    assert told == "records.jsonl:10: record 'mini/a/9' says what line 9 says under another id; drop one"


def test_one_prompt_and_target_of_two_origins_is_a_warning(store):
    [(severity, check, told)] = add_twin(store, meta={"derivation": "x/1"})
    assert (severity, check) == ("warning", "repeats")
    assert "has prompt and target of line 9" in told


@pytest.mark.parametrize("changes", [{"target": {"text": "MR"}}, {"lang": "zh"}], ids=["answer", "language"])
def test_another_answer_or_language_is_no_repeat(store, changes):
    assert [one for one in add_twin(store, **changes) if one[1] == "repeats"] == []


def test_one_sentence_of_two_images_is_no_repeat(store):
    """All three images of the small store are asked for their modality."""
    modality = [row for row in small.read_lines(store / "records.jsonl") if row["id"].endswith("/8")]
    assert len({json.dumps([row["prompt"], row["target"]]) for row in modality}) == 1
    assert len(modality) == 3
    assert verify(store, settings=ONE).findings == ()


# --- stores that preparation made ---

PREPROCESS = Preprocess(grid=(24, 32, 32), spacing=(10, 8, 8), intensity=Window(-200, 400))
JOB = Job(preprocess=PREPROCESS, derive=("rec", "seg"))


def phantom(seed):
    return head_neck(seed, shape=(32, 32, 24), spacing=(12, 12, 12))


def broken(path):
    raise BadScan(f"{path}: the file ends early; copy it again")


def entry(dataset, number, *, patient="p7", split="train", read=None):
    return Entry(
        dataset=dataset, license="CC0-1.0", image_id=f"case {number}", patient_id=patient, split=split, files=(),
        read=read or partial(phantom, number),
    )  # fmt: skip


def test_a_prepared_store_is_clean_until_a_byte_changes(tmp_path):
    prepare([entry("One", 1)], JOB, tmp_path / "store")
    report = verify(tmp_path / "store", settings=ONE)
    assert report.findings == ()
    assert set(report.skipped) == {"tasks"}
    array = np.load(tmp_path / "store/images/one/case_1.npy")
    np.save(tmp_path / "store/images/one/case_1.npy", array[:, :, ::-1])
    assert [one.check for one in verify(tmp_path / "store", settings=ONE).findings] == ["checksums"]


def test_one_number_in_two_prepared_data_sets_is_a_warning(tmp_path):
    """Preparation puts the data set before the number: one/p7, two/p7."""
    second = entry("Two", 2, split="test")
    entries = [entry("One", 1), second, entry("One", 3, patient="p8"), entry("Two", 4, patient="p9", split="test")]
    prepare(entries, JOB, tmp_path / "store")
    (finding,) = verify(tmp_path / "store", settings=ONE).findings
    assert (finding.severity, finding.check) == ("warning", "patients")
    assert "patient id 'p7' is in train (images.jsonl:1, One) and test (images.jsonl:3, Two)" in finding.message
    prepare([entry("One", 1), dataclasses.replace(second, split="train")], JOB, tmp_path / "together")
    assert verify(tmp_path / "together", settings=ONE).findings == ()


def test_many_shared_numbers_of_two_data_sets_are_one_warning(tmp_path):
    pairs = [
        entry(name, seed, patient=f"p{n}", split=split)
        for name, split, first in (("One", "train", 0), ("Two", "test", 5))
        for n, seed in enumerate(range(first, first + 2))
    ]
    prepare(pairs, JOB, tmp_path / "store")
    (finding,) = verify(tmp_path / "store", settings=ONE).findings
    assert "(and 1 more of One and Two); if it is one patient" in finding.message


def test_a_store_of_refused_scans_only_is_an_error(tmp_path):
    refused = [entry("One", number, read=partial(broken, Path(f"{number}.nii"))) for number in (1, 2)]
    prepare(refused, JOB, tmp_path / "store")
    findings = verify(tmp_path / "store", settings=ONE).findings
    assert [(one.severity, one.check) for one in findings] == [("error", "content"), ("warning", "rejects")]
    assert "all 2 scans were refused (rejects.jsonl)" in findings[0].message
