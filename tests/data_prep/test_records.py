"""Files of records: sorted by image, errors by line, and every image found again."""

import json
from pathlib import Path

import pytest

from data_prep.record import Record, RecordError
from data_prep.records import RecordFile, read_records, write_records

EXAMPLES = Path(__file__).parents[1] / "fixtures" / "records" / "examples.jsonl"


def rows() -> list[dict]:
    return [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]


def write(path: Path, changed: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    return path


def test_the_examples_are_read_in_order():
    assert [record.id for record in read_records(EXAMPLES)] == [row["id"] for row in rows()]


def test_an_error_names_file_and_line(tmp_path):
    changed = rows()
    changed[3]["split"] = "val"
    path = write(tmp_path / "some.jsonl", changed)
    with pytest.raises(RecordError, match=r"some\.jsonl:4: split: "):
        list(read_records(path))


def test_an_id_given_twice_names_both_lines(tmp_path):
    changed = rows()
    changed[8]["id"] = changed[2]["id"]
    with pytest.raises(RecordError, match=r":9: id 'slake/xmlab102/q3' is that of line 3"):
        list(read_records(write(tmp_path / "some.jsonl", changed)))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"split": "test"}, "split"), ({"patient_id": "other"}, "patient_id"), ({"media": "shape"}, "media")],
    ids=["split", "patient", "media"],
)
def test_lines_that_disagree_about_an_image_are_refused(tmp_path, change, says):
    changed = rows()
    if "media" in change:
        changed[1]["media"][0]["spacing_mm"] = [5.0, 1.5, 1.5]
    else:
        changed[1] |= change
    with pytest.raises(RecordError, match=f":2: {says} of image '000123' differs from line 1"):
        list(read_records(write(tmp_path / "some.jsonl", changed)))


def test_writing_sorts_by_image_and_reading_gives_the_same(tmp_path):
    records = list(read_records(EXAMPLES))
    assert write_records(tmp_path / "sorted.jsonl", reversed(records)) == 15
    again = list(read_records(tmp_path / "sorted.jsonl"))
    assert [(r.image_id, r.id) for r in again] == sorted((r.image_id, r.id) for r in records)
    assert {r.id: r for r in again} == {r.id: r for r in records}


def test_a_refused_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text("old", encoding="utf-8")
    record = next(read_records(EXAMPLES))
    with pytest.raises(RecordError, match="is that of line 1"):
        write_records(path, [record, record])
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.jsonl"]


def test_the_image_centric_view_gives_what_a_scan_of_the_file_gives(tmp_path):
    for path in (EXAMPLES, tmp_path / "sorted.jsonl"):
        if path != EXAMPLES:
            write_records(path, read_records(EXAMPLES))
        view, by_image = RecordFile(path), dict[str, list[Record]]()
        for record in read_records(path):
            by_image.setdefault(record.image_id, []).append(record)
        assert list(view.images) == list(by_image)
        assert {name: view.of(name) for name in view.images} == by_image
        assert view.images["s5001"].tasks == {"calc": 1, "cls.multi": 1, "polygon": 1}
    with pytest.raises(KeyError, match="no image 'nobody'"):
        view.of("nobody")


def test_a_file_that_is_not_there_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="m3d data prepare"):
        list(read_records(tmp_path / "none.jsonl"))
