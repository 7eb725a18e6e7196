"""Statistics of a store whose every entry was written by hand."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.stats import Spread, gather_statistics

spec = importlib.util.spec_from_file_location("small_store", Path(__file__).parents[1] / "fixtures" / "small_store.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)


@pytest.fixture
def store(tmp_path):
    return small.build(tmp_path / "store")


def test_a_spread_by_hand():
    one = Spread.of([1, 2, 3, 10])
    assert (one.n, one.mean, one.low, one.median, one.high) == (4, 4.0, 1, 2.5, 10)
    assert one.p10 == pytest.approx(1.3)


def test_counts_of_the_small_store(store):
    facts = gather_statistics(store, workers=1).to_dict()
    assert facts["splits"] == {
        "train": {"images": 2, "patients": 2, "records": 18},
        "validation": {"images": 1, "patients": 1, "records": 9},
    }
    assert facts["tasks"]["rec.box3d"] == {"train": 4, "validation": 2}
    assert facts["tasks"]["report"] == {"train": 2, "validation": 1}
    assert facts["density"]["entries_per_image"]["mean"] == 9
    assert facts["density"]["tasks_per_image"]["mean"] == 8


def test_words_that_are_asked_and_said(store):
    facts = gather_statistics(store, workers=1).to_dict()
    assert facts["words"]["asked"]["vqa.closed"]["median"] == 4  # how many are labelled
    assert facts["words"]["said"]["vqa.closed"]["median"] == 2  # 2 organs
    assert facts["words"]["asked"]["seg.ref"]["median"] == len(small.LIVER_WORDS.split())
    assert facts["words"]["said"]["report"]["n"] == 3
    assert facts["words"]["said"]["reg"]["median"] == 1  # liver
    assert "seg.sem" not in facts["words"]["asked"]


def test_voxels_and_millilitres_of_structures(store):
    """Liver 3 x 4 x 3 and spleen 3 x 3 x 3 voxels of 5 x 2 x 2 mm."""
    facts = gather_statistics(store, workers=1).to_dict()
    assert list(facts["structures"]) == ["liver", "spleen"]
    liver, spleen = facts["structures"]["liver"], facts["structures"]["spleen"]
    assert (liver["images"], liver["records"], spleen["records"]) == (3, 15, 3)
    assert (liver["voxels"]["median"], spleen["voxels"]["median"]) == (36, 27)
    assert (liver["ml"]["median"], spleen["ml"]["median"]) == (0.72, 0.54)


def test_overlapping_layers_are_both_counted(store):
    flat = small.labels()[0]
    layers = np.stack([np.where(flat == 1, 1, 0), np.where(flat == 2, 2, 0)]).astype(np.uint8)
    layers[1, 1:3, 1, 1] = 2  # in the liver
    small.save_labels(store, "mini/a", layers)
    found = gather_statistics(store, workers=1)
    assert sorted(found.voxels["liver"]) == [36, 36, 36]
    assert sorted(found.voxels["spleen"]) == [27, 27, 29]


def test_how_far_one_answer_gets(store):
    def answer(options, choice):
        return lambda row: row["target"].update(options=options, choice=choice)

    small.edit(store / "records.jsonl", answer(["9 organs", "2 organs"], 0), id="mini/c/7")
    found = gather_statistics(store, workers=1)
    assert found.majority("vqa.closed count") == ("2 organs", 2 / 3)
    facts = found.to_dict()["answers"]["vqa.closed count"]
    assert facts["positions"] == {"A": 1, "B": 2}
    assert facts["majority_rate"] == 0.6667


def test_answers_are_compared_without_case_and_told_as_they_are_written(store):
    for image_id, text in zip(small.SPLITS, ("40 HU", "40 hu.", "40 HU"), strict=True):
        small.edit(store / "records.jsonl", lambda row, text=text: row["target"].update(text=text), id=f"{image_id}/8")
    facts = gather_statistics(store, workers=1).to_dict()["answers"]["vqa.open modality"]
    assert (facts["majority"], facts["majority_rate"], facts["different_answers"]) == ("40 HU", 1.0, 1)


def test_with_and_without_options_is_one_question(store):
    """Three closed ones with "2 organs", three open ones with "2 Organs" once and "CT" twice: 4 of 6."""
    for image_id in small.SPLITS:
        small.edit(store / "records.jsonl", lambda row: row.update(subtask="count"), id=f"{image_id}/8")
    small.edit(store / "records.jsonl", lambda row: row["target"].update(text="2 Organs"), id="mini/a/8")
    found = gather_statistics(store, workers=1)
    assert found.questions == {"count": ["vqa.closed count", "vqa.open count"]}
    assert found.majority(*found.questions["count"]) == ("2 organs", 4 / 6)
    assert found.majority("vqa.open count") == ("CT", 2 / 3)


def test_absent_targets_and_media(store):
    small.edit(store / "records.jsonl", lambda row: row["target"].update(boxes=[]), id="mini/a/1")
    facts = gather_statistics(store, workers=1).to_dict()
    assert facts["absent_targets"] == 1
    assert facts["media"]["shapes"] == {"6 x 8 x 10": 3}
    assert facts["media"]["orientations"] == {"SPL": 3}
    assert facts["media"]["spacing_mm"]["D"]["median"] == 5.0
    assert facts["media"]["without_spacing"] == 0


def test_without_spacing_there_are_voxels_and_no_millilitres(store):
    for path, media in (("records.jsonl", lambda row: row["media"][0]), ("images.jsonl", lambda row: row["media"])):
        for image_id in small.SPLITS:
            small.edit(store / path, lambda row, media=media: media(row).pop("spacing_mm"), image_id=image_id)
    facts = gather_statistics(store, workers=1).to_dict()
    assert "ml" not in facts["structures"]["liver"]
    assert facts["structures"]["liver"]["voxels"]["median"] == 36
    assert facts["media"]["without_spacing"] == 3
    assert facts["media"]["spacing_mm"] == {}


def test_fast_opens_no_mask(store):
    (store / "masks/mini/a.npz").unlink()
    facts = gather_statistics(store, fast=True).to_dict()
    assert facts["structures"]["liver"] == {"records": 15, "images": 0}
    with pytest.raises(ValueError, match="m3d data verify"):
        gather_statistics(store, workers=1)


def test_tables_are_markdown_and_json_is_plain(store):
    found = gather_statistics(store, workers=1)
    json.dumps(found.to_dict(), allow_nan=False)
    page = found.to_markdown()
    assert "| train | 2 | 2 | 18 |" in page
    assert "| vqa.open modality | 3 | 1 | CT (100%) |" in page
    assert "| liver | 3 | 15 | 0.72 |" in page


def test_a_file_without_records_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no record"):
        gather_statistics(tmp_path)
