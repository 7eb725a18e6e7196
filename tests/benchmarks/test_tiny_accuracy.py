"""Asking a scan that knows the truth, one that knows nothing, and going on after a stop."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_accuracy
from scoring import score
from tiny_accuracy import Answers, answered, asks, draw, examine, key_of, locate

import m3d
import m3d.inference.results
from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.preprocess import MinMax, Preprocess
from data_prep.volume import Volume, spl_affine

ABOUT = {"fingerprint": "f" * 64}
ALL = [task for tasks in tiny_accuracy.TASKS.values() for task in tasks]


@pytest.fixture(scope="module")
def case() -> Case:
    """A mandible and a brainstem; nobody contoured the larynx."""
    array = np.random.default_rng(0).random((16, 24, 24), np.float32)
    labels = np.zeros(array.shape, np.uint8)
    labels[4:8, 4:12, 6:16], labels[10:13, 14:18, 8:14] = 7, 1
    volume = Volume(array, spl_affine((5.0, 4.0, 4.0)))
    names = {1: "brainstem", 6: "larynx", 7: "mandible"}
    return Case(id="pt_1", patient_id="pt_1", volume=volume, labels=labels, names=names)


class Knowing:
    """A scan that answers from the truth, and counts what it was asked."""

    def __init__(self, case: Case) -> None:
        self.case, self.asked, self.measured = case, [], ()
        self.prepared = Preprocess(grid=(8, 16, 16), intensity=MinMax()).apply(case.volume)

    def segment(self, name, *, points=None, box=None):
        self.asked.append((name, points, box))
        found = name or next(n for n in self.case.present if box == box_of_mask(self.case.mask(n)) or (
            points and self.case.mask(n)[points[0][0]]))  # fmt: skip
        return SimpleNamespace(masks=[SimpleNamespace(name=found, array=self.case.mask(found))])

    def locate(self, name):
        return SimpleNamespace(boxes=[SimpleNamespace(voxel=box_of_mask(self.case.mask(name)))], text="There.")

    def ask(self, prompt, *, max_new_tokens):
        self.asked.append(prompt)
        return SimpleNamespace(text="A.", measured=self.measured)

    def blinded(self):
        return Blind(self.case)


class Blind(Knowing):
    """One that draws nothing, finds nothing and says nothing."""

    def segment(self, name, *, points=None, box=None):
        raise m3d.NoMask("nothing to be seen")

    def locate(self, name):
        return SimpleNamespace(boxes=[], text="")


def loader(case: Case):
    scans: list[Knowing] = []

    def load():
        return SimpleNamespace(look=lambda volume: scans.append(Knowing(case)) or scans[-1])

    return load, scans


def test_what_is_not_contoured_is_not_asked_for(case):
    wanted = list(asks(case))
    assert {ask.item for ask in wanted if ask.task in ("dice", "click", "iou", "reg")} == {"brainstem", "mandible"}
    closed = [ask.item for ask in wanted if ask.task == "vqa.closed"]
    assert len(set(closed)) == len(closed) == len([ask for ask in wanted if ask.task == "vqa.open"]) > 3
    assert {item.partition("/")[0] for item in closed} >= {"volume", "length"}  # all families, not a chosen few
    assert len({(ask.task, ask.item) for ask in wanted}) == len(wanted)


@pytest.mark.parametrize(
    ("kind", "named", "clicks", "boxed"),
    [("", True, 0, False), ("click", False, 1, False), ("box", False, 0, True), ("name+click", True, 1, False),
     ("name+box", True, 0, True)],
)  # fmt: skip
def test_each_way_of_asking_for_a_mask(case, kind, named, clicks, boxed):
    scan = Knowing(case)
    row = draw(case, "mandible", kind, scan)
    assert row == {"dice": 1.0, "nsd": 1.0, "drawn": True}
    name, points, box = scan.asked[0]
    assert (name is not None, len(points or ()), box is not None) == (named, clicks, boxed)
    assert all(case.mask("mandible")[at] and label == 1 for at, label in points or ())


def test_no_mask_and_no_box_count_0(case):
    assert draw(case, "mandible", "", Blind(case)) == {"dice": 0.0, "nsd": 0.0, "drawn": False}
    assert locate(case, "mandible", Blind(case))["iou"] == 0.0
    assert locate(case, "mandible", Knowing(case))["iou"] == 1.0


def test_a_whole_patient_and_its_table(case, tmp_path, monkeypatch):
    load, scans = loader(case)
    answers = Answers(tmp_path / "a.jsonl", ABOUT)
    examine(load, case, ALL, answers)
    monkeypatch.setattr(tiny_accuracy, "read_case", lambda folder: case)
    table = score(answered(answers.rows, [tmp_path / "pt_1"]))
    assert (table["dice/five"]["value"], table["dice/five"]["blind"], table["dice/five"]["gain"]) == (1.0, 0.0, 1.0)
    assert (table["iou/mean"]["value"], table["iou/mean"]["blind"]) == (1.0, 0.0)
    assert table["vqa/mean"]["gain"] == 0.0  # both always say A
    prompts = [prompt for prompt in scans[0].asked if isinstance(prompt, str)]
    assert len(prompts) == sum(ask.task in ("vqa.closed", "vqa.open", "reg", "report") for ask in asks(case))


def test_a_stopped_run_goes_on_where_it_was(case, tmp_path):
    path = tmp_path / "a.jsonl"
    load, scans = loader(case)
    examine(load, case, ALL, Answers(path, ABOUT))
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(whole[:-5]) + whole[-5][:20], encoding="utf-8")  # killed while it wrote
    again = Answers(path, ABOUT)
    assert len(again.rows) == len(whole) - 6
    examine(load, case, ALL, again)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ABOUT
    keys = [key_of(row) for row in rows[1:] if row["task"] != "look"]
    assert len(keys) == len(set(keys)) == 2 * len(list(asks(case)))
    examine(load, case, ALL, Answers(path, ABOUT))
    assert len(scans) == 2  # nothing was left to ask: the scan was not even looked at


def test_an_answer_is_kept_with_what_it_rests_on(case):
    scan, measure = Knowing(case), m3d.inference.results.FoundMeasure("volume", ("mandible",), 24.0, "mL")
    row = tiny_accuracy.reply("How large?", 8, {"truth": "24 mL"}, scan)
    assert row == {"truth": "24 mL", "prompt": "How large?", "text": "A."}
    scan.measured = (measure,)
    assert tiny_accuracy.reply("How large?", 8, {}, scan)["measured"] == [measure.to_dict()]


def test_answers_of_another_model_are_refused(tmp_path):
    Answers(tmp_path / "a.jsonl", ABOUT)
    with pytest.raises(ValueError, match="another model"):
        Answers(tmp_path / "a.jsonl", {"fingerprint": "0" * 64})


def test_a_task_that_some_patient_was_not_asked_is_not_in_the_table(case, tmp_path, monkeypatch):
    load, _ = loader(case)
    answers = Answers(tmp_path / "a.jsonl", ABOUT)
    examine(load, case, ["iou", "dice"], answers)
    answers.rows.pop(("pt_1", "blind", "dice", "mandible"))
    monkeypatch.setattr(tiny_accuracy, "read_case", lambda folder: case)
    assert {row["task"] for row in answered(answers.rows, [tmp_path / "pt_1"])} == {"iou", "look"}
