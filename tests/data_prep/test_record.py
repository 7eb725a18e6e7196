"""Every rule of m3d.record/1: the fifteen examples keep them all, and each has a twin that breaks it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from data_prep.record import NEEDS, Record, RecordError, parse

HOME = Path(__file__).parents[2]
LINES = (HOME / "tests" / "fixtures" / "records" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
EXAMPLES = {json.loads(line)["id"]: json.loads(line) for line in LINES}
BOX, VQA, CALC = "m3dseg/0001/0042/liver/rec", "m3dvqa/000123/q7", "imax/s5001/ctr"
PAIR, POLYGON, POINT = "pmcoa/pair/77", "chexmask/s5001/heart/poly", "isbi2015/151/Orbitale"
LABELS, VIDEO, REPORT = "imax/s5001/mlc", "polypdiag/v003/polyp", "m3dcap/000123/rep"


def broken(example: str, change: Callable[[dict], object]) -> str:
    """The message about an example after one change."""
    row = copy.deepcopy(EXAMPLES[example])
    change(row)
    with pytest.raises(RecordError) as error:
        parse(json.dumps(row), "some.jsonl:7")
    assert str(error.value).startswith("some.jsonl:7: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def put(path: str, value: object) -> Callable[[dict], object]:
    """A change: the value at a dotted path."""

    def change(row: dict) -> None:
        *steps, last = path.split(".")
        place = row
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        place[int(last) if isinstance(place, list) else last] = value

    return change


def cut(path: str) -> Callable[[dict], object]:
    """A change: the dotted path is gone."""

    def change(row: dict) -> None:
        *steps, last = path.split(".")
        place = row
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place[step]
        del place[last]

    return change


@pytest.mark.parametrize("line", LINES, ids=list(EXAMPLES))
def test_an_example_is_valid_and_survives_writing(line):
    record = parse(line, "examples.jsonl:1")
    assert parse(record.to_line(), "again:1") == record
    assert record.to_line().startswith('{"schema":"m3d.record/1","id":')


def test_there_are_fifteen_examples():
    assert len(LINES) == len(EXAMPLES) == 15


TWINS = [
    ("unknown key", BOX, put("target.boxs", []), "target.boxs: unknown key; did you mean 'boxes'?"),
    ("unknown key at the top", BOX, put("medium", 1), "medium: unknown key; did you mean 'media'?"),
    ("unknown key, deep", BOX, put("media.0.intensity.unitt", "HU"), "did you mean 'unit'?"),
    ("another schema", BOX, put("schema", "m3d.record/2"), "m3d.record/1"),
    ("no id", BOX, cut("id"), "id: Field required"),
    ("id with a space", BOX, put("id", "a b"), "id: "),
    ("number for a text", BOX, put("id", 7), "id: "),
    ("unknown split", BOX, put("split", "val"), "'train', 'validation' or 'test'"),
    ("no language", BOX, put("lang", "English"), "lang: "),
    ("no media", BOX, put("media", []), "media: "),
    ("image that is no media", BOX, put("image_id", "0043"), "must be one of the media"),
    ("media named twice", PAIR, put("media.1.image_id", "PMC1_f1"), "each of them named once"),
    ("absolute path", BOX, put("media.0.path", "/data/0042.npy"), "inside the data root"),
    ("path that leaves the root", BOX, put("media.0.path", "a/../../0042.npy"), "inside the data root"),
    ("path of another system", BOX, put("media.0.path", "C:/0042.npy"), "inside the data root"),
    ("backslashes", BOX, put("media.0.path", "a\\0042.npy"), "inside the data root"),
    ("mask path that leaves the root", BOX, put("target.masks.0.path", "../m.npz"), "inside the data root"),
    ("axes and shape differ", BOX, put("media.0.axes", "DHWC"), "must name each of the 3 sides"),
    ("axis twice", BOX, put("media.0.axes", "DHH"), "must name each of the 3 sides"),
    ("axes of another kind", BOX, put("media.0.kind", "image"), "kind 'image' has the axes HW"),
    ("zero side", BOX, put("media.0.shape", [0, 256, 256]), "shape"),
    ("spacing of one axis less", BOX, put("media.0.spacing_mm", [1.5, 1.5]), "spacing_mm needs 3 numbers"),
    ("spacing below zero", BOX, put("media.0.spacing_mm", [8.0, -1.5, 1.5]), "spacing_mm"),
    ("orient of one axis twice", BOX, put("media.0.orient", "SPP"), "where it grows to"),
    ("orient too short", BOX, put("media.0.orient", "SP"), "where it grows to"),
    ("half an intensity window", BOX, put("media.0.intensity.lo", -200.0), "lo and hi are given together"),
    ("window upside down", BOX, put("media.0.intensity", {"unit": "norm01", "lo": 4.0, "hi": -2.0}), "must lie below"),
    ("unknown intensity", BOX, put("media.0.intensity.unit", "grey"), "media.0.intensity.unit"),
    ("frames of a volume", BOX, put("media.0.frames", {"sample": "uniform", "n": 4}), "frames are for videos"),
    ("no frames of a video", VIDEO, put("media.0.frames.n", 0), "media.0.frames.n"),
    ("task with a capital", BOX, put("task", "Rec"), "task: "),
    ("template and text", BOX, put("prompt.text", "Where?"), "give exactly one"),
    ("neither template nor text", BOX, put("prompt", {}), "give exactly one"),
    ("text with slots", BOX, put("prompt", {"text": "Where?", "slots": {"a": 1}}), "a text takes none"),
    ("one placeholder, two media", PAIR, put("prompt", {"text": "<image> Compare."}), "1 <image> for 2 media"),
    ("three placeholders in a slot", PAIR, put("prompt.slots.q", "<image><image><image>"), "3 <image> for 2 media"),
    ("empty target", BOX, put("target", {}), "at least one key"),
    ("target of another task", BOX, put("target", {"text": "left"}), "needs target.boxes"),
    ("blank text", REPORT, put("target.text", "  "), "target.text"),
    ("choice out of range", VQA, put("target.choice", 4), "none of the 4 options"),
    ("choice below zero", VQA, put("target.choice", -1), "none of the 4 options"),
    ("options without choice", VQA, cut("target.choice"), "given together"),
    ("one option", VQA, put("target.options", ["Liver"]), "target.options"),
    ("same option twice", VQA, put("target.options", ["a", "b", "a", "c"]), "two options are the same"),
    ("label out of range", LABELS, put("target.labels.positive", [0, 10]), "points outside the 10 words"),
    ("label twice", LABELS, put("target.labels.positive", [0, 0]), "given twice"),
    ("value without unit", CALC, cut("target.unit"), "needs its quantity and its unit"),
    ("value that is not finite", CALC, put("target.value", float("nan")), "target.value"),
    (
        "box outside the volume",
        BOX,
        put("target.boxes.0.hi", [33, 212, 210]),
        "lies outside the image of [32, 256, 256]",
    ),
    ("box below zero", BOX, put("target.boxes.0.lo", [-1, 84, 99]), "lies outside"),
    ("norm box beyond 1", BOX, put("target.boxes.0.frame", "norm"), "norm frame"),
    ("flat box", BOX, put("target.boxes.0.lo", [30, 84, 99]), "must lie below"),
    ("2D box in a volume", BOX, put("target.boxes.0.lo", [84, 99]), "2 coordinates, the image 3 axes"),
    ("box of no media", BOX, put("target.boxes.0.media", 1), "media=1, but there are 1"),
    ("unknown frame", BOX, put("target.boxes.0.frame", "pixel"), "target.boxes.0.frame"),
    ("mask with neither path nor rle", BOX, put("target.masks.0", {"name": "liver"}), "give exactly one"),
    ("mask with a path and no label", BOX, cut("target.masks.0.label"), "give exactly one"),
    ("mask of the background", BOX, put("target.masks.0.label", 0), "target.masks.0.label"),
    ("point outside the image", POINT, put("target.points.0.at", [1305.0, 1936.0]), "lies outside"),
    ("runs beyond the image", POLYGON, put("target.masks.0.rle.runs", "7774460 10"), "voxels"),
    ("runs that overlap", POLYGON, put("target.masks.0.rle.runs", "10 5 12 3"), "overlaps"),
    ("half a run", POLYGON, put("target.masks.0.rle.runs", "10 5 12"), "pairs of whole numbers"),
    ("rle of another size", POLYGON, put("target.masks.0.rle.size", [3056, 2544]), "rle.size"),
]


@pytest.mark.parametrize(("example", "change", "says"), [twin[1:] for twin in TWINS], ids=[twin[0] for twin in TWINS])
def test_a_broken_twin_is_refused(example, change, says):
    assert says in broken(example, change)


@pytest.mark.parametrize("text", ['{"schema": ', "[1, 2]", "", '{"schema": "m3d.record/1", "id": NaN}'])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(RecordError, match=r"^f\.jsonl:3: "):
        parse(text, "f.jsonl:3")


def test_an_empty_list_of_masks_is_a_truth_and_not_a_missing_target():
    row = EXAMPLES[BOX] | {"task": "seg.sem", "target": {"masks": []}}
    record = parse(json.dumps(row), "x:1")
    assert record.target.masks == ()
    assert '"masks":[]' in record.to_line()


def test_every_task_that_needs_something_needs_keys_that_exist():
    keys = set(Record.model_fields["target"].annotation.model_fields)
    assert {key for needed in NEEDS.values() for key in needed} <= keys


def test_the_published_schema_is_ours_and_takes_the_examples():
    published = json.loads((HOME / "docs" / "record.schema.json").read_text(encoding="utf-8"))
    assert published == Record.model_json_schema(by_alias=True)
    validator = jsonschema.Draft202012Validator(published)
    validator.check_schema(published)
    for row in EXAMPLES.values():
        validator.validate(row)
    given = json.loads(parse(LINES[0], "x:1").model_dump_json())
    assert None in given["target"].values()
    validator.validate(given)  # null is as good as not given
    assert all(task in published["properties"]["task"]["description"] for task in NEEDS)
    validator.validate(EXAMPLES[BOX] | {"task": "det3d"})


UNSAYABLE = {  # what compares one value with another, or counts, is beyond a JSON Schema
    "image that is no media", "media named twice", "axes and shape differ", "axes of another kind",
    "spacing of one axis less", "orient too short", "window upside down", "one placeholder, two media",
    "three placeholders in a slot", "choice out of range", "label out of range", "value that is not finite",
    "box outside the volume", "flat box", "2D box in a volume", "box of no media", "point outside the image",
    "runs beyond the image", "runs that overlap", "rle of another size",
}  # fmt: skip


def test_the_published_schema_refuses_the_twins_that_it_can():
    validator = jsonschema.Draft202012Validator(Record.model_json_schema(by_alias=True))
    passed = set()
    for name, example, change, _ in TWINS:
        row = copy.deepcopy(EXAMPLES[example])
        change(row)
        if validator.is_valid(row):
            passed.add(name)
    assert passed == UNSAYABLE


@pytest.mark.parametrize("path", ["a/b.npy", "a..b/c", "..a/b", "a/b:c", "a/...", "a b/c d.npy", "./a", "a/.b"])
def test_paths_inside_the_root_pass_both_the_schema_and_the_reader(path):
    row = copy.deepcopy(EXAMPLES[BOX])
    row["media"][0]["path"] = path
    jsonschema.Draft202012Validator(Record.model_json_schema(by_alias=True)).validate(row)
    assert parse(json.dumps(row), "x:1").media[0].path == path


@pytest.mark.parametrize("path", ["a/..", "../a", "a/../b", "/a", "~a", "C:/a", "./C:/a", "a\\b", " "])
def test_paths_that_leave_the_root_pass_neither(path):
    row = copy.deepcopy(EXAMPLES[BOX])
    row["media"][0]["path"] = path
    assert not jsonschema.Draft202012Validator(Record.model_json_schema(by_alias=True)).is_valid(row)
    with pytest.raises(RecordError, match="media"):
        parse(json.dumps(row), "x:1")
