"""A run from records to answers to numbers: with scans that are stood in for, then with the bundled model."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from data_prep.prepare import Job, prepare
from data_prep.sources.phantoms import Phantoms
from data_prep.store import Store
from data_prep.volume import BadScan
from m3d.bench import run as running
from m3d.bench.cases import chosen, find_cases, group_of
from m3d.bench.config import BenchConfig, TaskConfig
from m3d.bench.predictions import Part, Prediction, gather, gathered
from m3d.bench.run import ask_cases, begin, read_run
from m3d.bench.score import judge_samples, metrics_table
from m3d.cli.main import main
from m3d.config import load_config
from m3d.inference.results import FoundBox, FoundMask, Result
from tests.fixtures import small_store

TASKS = ("report", "vqa.closed", "vqa.open", "rec.box3d", "reg", "seg.sem", "seg.ref")


@pytest.fixture
def store(tmp_path) -> Path:
    return small_store.build(tmp_path / "store")


def config_of(*tasks: str, **settings) -> BenchConfig:
    fields = {"split": "train", "likelihoods": False} | settings
    return BenchConfig(tasks={task: TaskConfig() for task in tasks or TASKS}, **fields)


class StandIn:
    """A scan that answers by rule: the liver's true mask and box, the second choice, and what it was shown."""

    asked: ClassVar[list[list[str]]] = []
    processor = SimpleNamespace(preprocess=small_store.PREPROCESS)

    def __init__(self, prepared, sight="seeing"):
        self.prepared, self.sight = prepared, sight

    @classmethod
    def of_prepared(cls, name, model, processor, prepared):
        return cls(prepared)

    def blinded(self):
        return StandIn(self.prepared, "blind")

    def shown(self, array):
        return StandIn(dataclasses.replace(self.prepared, array=array), "blind")

    def ask_many(self, prompts, *, max_new_tokens, keep_logits):
        self.asked.append(list(prompts))
        return tuple(self._answer(prompt) for prompt in prompts)

    def _answer(self, prompt):
        volume, text, boxes, masks = self.prepared.source, f"{self.sight}: {prompt}", (), ()
        if "Choices" in prompt:
            text = "B. 2 organs" if self.sight == "seeing" else "A. 5 organs"
        elif self.sight == "seeing" and "diaphragm" in prompt and "?" in prompt:
            box = SimpleNamespace(lo=small_store.LIVER[0], hi=small_store.LIVER[1])
            boxes = (FoundBox("liver", box, box),)
        if self.sight == "seeing" and "liver" in prompt and "spleen" in prompt:
            liver = small_store.labels()[0] == 1
            masks = (FoundMask("liver", liver, 0.9, 1.0, np.where(liver, 30.0, -30.0).astype(np.float32)),)
        return Result("ask", prompt, text, boxes, masks, volume, None, "stand-in", {}, (), 0.0)


@pytest.fixture
def stand_in(monkeypatch):
    StandIn.asked = []
    monkeypatch.setattr(running, "Scan", StandIn)
    processor = SimpleNamespace(preprocess=small_store.PREPROCESS)
    return SimpleNamespace(id="stand-in", model=None, processor=processor)


# -- what is asked --------------------------------------------------------------------------------------------------


def test_a_task_asks_what_its_choice_has(store):
    def asked(**task):
        config = BenchConfig(tasks={"rec.box3d": TaskConfig(**task)}, split="train")
        return [record.id for case in find_cases(config, store, None) for record in case.records]

    assert asked() == ["mini/a/0", "mini/a/1", "mini/c/0", "mini/c/1"]
    assert asked(subtasks=("name",)) == ["mini/a/1", "mini/c/1"]
    assert asked(names=("liver",), most=9) == asked(datasets=("Mini",)) == asked()
    assert len(asked(most=3)) == 3 and asked(most=3) == asked(most=3)
    for nothing in ({"names": ("spleen",)}, {"datasets": ("Other",)}):
        with pytest.raises(ValueError, match=r"no record of 'train' is asked for; `m3d data stats"):
            asked(**nothing)


def test_a_smaller_draw_does_not_depend_on_other_tasks(store):
    one = config_of("reg", "report")
    cases = find_cases(one, store, None)
    records = [record for case in cases for record in case.records]
    drawn = BenchConfig(tasks={"reg": TaskConfig(most=1), "report": TaskConfig()}, split="train")
    alone = BenchConfig(tasks={"reg": TaskConfig(most=1)}, split="train")
    regs = [record.id for some in chosen(drawn, records).values() for record in some if record.task == "reg"]
    only = chosen(alone, [record for record in records if record.task == "reg"])
    assert regs == [record.id for some in only.values() for record in some] and len(regs) == 1


def test_records_are_counted_with_their_structure_or_family(store):
    records = {record.id: record for case in find_cases(config_of(), store, None) for record in case.records}
    groups = {key.removeprefix("mini/a/"): group_of(record) for key, record in records.items() if "/a/" in key}
    assert groups == {
        "0": "liver", "1": "liver", "2": "liver", "3": "", "5": "liver", "6": "several", "7": "count", "8": "modality",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"vqa.close": {}}}, "vqa.close is no task"),
        ({"tasks": {"reg": {}}, "batch": 0}, "batch=0 must be 1 or more"),
        ({"tasks": {"reg": {"most": 0}}}, "most=0 must be 1 or more"),
        ({"tasks": {"reg": {"mots": 1}}}, "unknown key 'mots'; did you mean 'most'"),
        ({"tasks": {"reg": {}}, "blind": "dark"}, "blind"),
    ],
)
def test_nonsense_is_refused_before_anything_is_asked(tmp_path, fields, fault):
    path = tmp_path / "bench.yaml"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=fault):
        load_config(BenchConfig, path)


# -- asking ---------------------------------------------------------------------------------------------------------


def test_every_record_is_asked_once_seeing_and_blind(store, stand_in, tmp_path):
    config = config_of()
    cases = find_cases(config, store, small_store.PREPROCESS)
    assert ask_cases(stand_in, cases, config, tmp_path / "out") == 2 * 2 * 8
    found = gather(tmp_path / "out")
    assert len(found) == 32 and {key[1] for key in found} == {"seeing", "blind"}
    box = found["mini/a/0", "seeing"].boxes[0]
    assert box == pytest.approx([1 / 6, 1 / 8, 1 / 10, 4 / 6, 5 / 8, 4 / 10], abs=1e-5)
    (mask,) = found["mini/a/6", "seeing"].masks
    assert mask.name == "liver" and mask.soft == pytest.approx((36.0, 36.0, 36.0))  # 3 x 4 x 3 voxels, all sure
    assert (tmp_path / "out" / mask.file).is_file()
    assert found["mini/a/6", "blind"].failure == "NoMask: the answer has no [SEG]"
    assert found["mini/a/1", "seeing"].failure == "NoBox: the answer has no box"
    StandIn.asked = []
    assert ask_cases(stand_in, cases, config, tmp_path / "out") == 0 and StandIn.asked == []


def test_a_run_goes_on_where_it_was_and_asks_nothing_twice(store, stand_in, tmp_path):
    config, out = config_of(), tmp_path / "out"
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path / "whole")
    whole = gather(tmp_path / "whole")
    part = Part(out, 0)
    part.add([whole["mini/a/3", "seeing"], whole["mini/c/3", "blind"]])
    part.close()
    with next((out / "parts").iterdir()).open("a") as file:
        file.write('{"id": "mini/a/7", "sight": "se')  # killed while it wrote
    assert ask_cases(stand_in, cases, config, out) == 30
    timeless = [
        {key: dataclasses.replace(one, seconds=None) for key, one in some.items()} for some in (whole, gather(out))
    ]
    assert timeless[0] == timeless[1]


def test_processes_share_the_scans_whatever_has_been_answered(store, stand_in, tmp_path):
    config = config_of("report")
    cases = find_cases(config, store, None)
    assert ask_cases(stand_in, cases, config, tmp_path, rank=1, world=2) == 2
    assert {prediction.image_id for prediction in gathered(tmp_path).values()} == {"mini/c"}
    assert ask_cases(stand_in, cases, config, tmp_path, rank=0, world=2) == 2
    assert len(gather(tmp_path)) == 4


def test_a_scan_that_cannot_be_read_fails_by_name_and_the_others_go_on(store, stand_in, tmp_path, caplog):
    (store / "images" / "mini" / "a.npy").write_bytes(b"no array")
    config = config_of("report", "seg.sem", blind=None)
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)
    found = gather(tmp_path)
    assert found["mini/a/3", "seeing"].failure.startswith("BadScan: ")
    assert str(store) not in found["mini/a/3", "seeing"].failure and "a.npy" in caplog.text  # paths are for the log
    assert found["mini/c/3", "seeing"].failure is None


def test_a_shuffled_twin_sees_another_patient(store, stand_in, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(StandIn, "shown", lambda self, array: shown.append(array) or StandIn(self.prepared, "blind"))
    config = config_of("report", blind="shuffled")
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)
    others = [np.load(store / "images" / "mini" / f"{name}.npy") / np.float32(255) for name in ("c", "a")]
    assert all(np.allclose(one, other) for one, other in zip(shown, others, strict=True))
    with pytest.raises(ValueError, match="needs scans of two patients"):
        find_cases(dataclasses.replace(config, most_scans=1), store, None)


def test_a_folder_holds_one_run(tmp_path):
    about = {"model": {"id": "a"}, "config": {"batch": 1}, "machine": {"gpu": None}}
    begin(tmp_path, about)
    begin(tmp_path, {**about, "machine": {"gpu": "another"}})
    assert read_run(tmp_path) == about
    with pytest.raises(ValueError, match="a run of another model; give another --out"):
        begin(tmp_path, {**about, "model": {"id": "b"}})
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "predictions.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"no run\.json that says whose"):
        begin(strange, about)
    with pytest.raises(FileNotFoundError, match="this is no run"):
        read_run(tmp_path / "nowhere")


# -- scoring --------------------------------------------------------------------------------------------------------


def scored(store, stand_in, tmp_path, protocol="standard", **settings):
    config = config_of(**settings)
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path / "out")
    judged = judge_samples(tmp_path / "out", cases, gather(tmp_path / "out"), protocol, workers=1)
    return judged, metrics_table(judged, protocol, {"grid": "store"})


def test_numbers_of_known_answers_are_known(store, stand_in, tmp_path):
    _, found = scored(store, stand_in, tmp_path)
    tasks = found["tasks"]
    assert found["protocol"] == "standard" and found["schema"] == "m3d.bench/1"
    closed = tasks["vqa.closed"]["metrics"]["accuracy"]
    assert (closed["value"], closed["blind"], closed["gain"], closed["chance"]) == (1.0, 0.0, 1.0, 0.25)
    boxes = tasks["rec.box3d"]["metrics"]
    assert boxes["IoU"]["value"] == pytest.approx(0.5) and boxes["IoU"]["blind"] == 0.0  # by description, not by name
    assert tasks["rec.box3d"]["failures"] == {"NoBox": 2} and tasks["rec.box3d"]["n_failed"] == 2
    dice = tasks["seg.sem"]["metrics"]["Dice"]
    assert dice["value"] == pytest.approx(0.5) and dice["n"] == 2  # the liver drawn wholly, the spleen not at all
    assert tasks["seg.ref"]["metrics"]["Dice"]["value"] == 0.0 and tasks["seg.ref"]["failures"] == {"NoMask": 2}
    assert tasks["report"]["patients"] == 2
    json.dumps(found, allow_nan=False)


def test_the_released_protocol_counts_as_released(store, stand_in, tmp_path):
    _, found = scored(store, stand_in, tmp_path, "m3d")
    tasks = found["tasks"]
    soft = tasks["seg.sem"]["metrics"]
    (name,) = soft
    assert soft[name]["value"] == pytest.approx((2 * 36 / 73 + 0) / 2)  # 2 sum(pt) / (sum p + sum t + 1); no spleen
    boxes = tasks["rec.box3d"]["metrics"]["enclosing-box IoU"]
    assert boxes["value"] == -1.0  # the text itself has no box
    assert tasks["vqa.closed"]["metrics"]["letter-dot accuracy"]["value"] == 1.0


def test_what_was_not_answered_counts_as_worst(store, stand_in, tmp_path):
    config = config_of(blind=None)
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)
    some = {key: one for key, one in gather(tmp_path).items() if one.image_id == "mini/a"}
    judged = judge_samples(tmp_path, cases, some, "standard", workers=1)
    found = metrics_table(judged, "standard", {})["tasks"]
    assert found["vqa.closed"]["metrics"]["accuracy"]["value"] == 0.5
    assert found["vqa.closed"]["failures"] == {"Missing": 1}
    assert found["seg.sem"]["metrics"]["Dice"]["value"] == pytest.approx(0.25)
    assert "blind" not in found["vqa.closed"]["metrics"]["accuracy"]


def test_several_processes_judge_alike(store, stand_in, tmp_path):
    judged, _ = scored(store, stand_in, tmp_path)
    cases = find_cases(config_of(), store, None)
    again = judge_samples(tmp_path / "out", cases, gather(tmp_path / "out"), "standard", workers=2)
    assert [one.to_row() for one in judged] == [one.to_row() for one in again]


def test_a_mask_on_another_grid_is_refused_by_its_file(store, tmp_path):
    import nibabel as nib

    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "m.nii.gz")
    line = {"id": "mini/a/6", "text": "liver [SEG]", "masks": [{"name": "liver", "file": "m.nii.gz"}]}
    cases = find_cases(config_of("seg.sem"), store, None)
    said = {("mini/a/6", "seeing"): Prediction.from_row(line, "here")}
    with pytest.raises(ValueError, match=r"m.nii.gz: the mask lies on \(2, 2, 2\) voxels"):
        judge_samples(tmp_path, cases, said, "standard", workers=1)


def test_a_twin_that_was_not_asked_everything_is_compared_where_it_was(store, stand_in, tmp_path):
    config = config_of("vqa.closed")
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)
    said = gather(tmp_path)
    right = dataclasses.replace(said["mini/a/7", "blind"], text="B. 2 organs")  # as good as the model that sees
    some = {key: one for key, one in said.items() if key[1] == "seeing"} | {right.key: right}
    found = metrics_table(judge_samples(tmp_path, cases, some, "standard", workers=1), "standard", {})
    entry = found["tasks"]["vqa.closed"]
    accuracy = entry["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["blind"], accuracy["gain"]) == (1.0, 1.0, 0.0)
    assert entry["n"] == 2 and entry["twin"] == {"n": 1, "n_failed": 0, "failures": {}}


def test_a_failure_counts_as_worst_whatever_it_says(store, tmp_path):
    config = config_of("report", "vqa.closed", blind=None)
    cases = find_cases(config, store, None)
    right = {"mini/a/3": small_store.REPORTS["mini/a"], "mini/c/3": small_store.REPORTS["mini/c"]}
    right |= {"mini/a/7": "B. 2 organs", "mini/c/7": "B. 2 organs"}
    said = {(key, "seeing"): Prediction(id=key, text=text, failure="Timeout: cut") for key, text in right.items()}
    judged = judge_samples(tmp_path, cases, said, "standard", workers=1)
    found = metrics_table(judged, "standard", {})["tasks"]
    report = {name: entry["value"] for name, entry in found["report"]["metrics"].items()}
    assert set(report.values()) == {0.0} and len(report) >= 10
    assert found["vqa.closed"]["metrics"]["accuracy"]["value"] == 0.0
    assert judged[0].to_row()["text"] in right.values()  # what was said is still shown


def test_masks_that_were_not_kept_are_not_scored_as_if_none_were_drawn(store, stand_in, tmp_path):
    config = config_of("seg.sem", keep_masks=False, blind=None)
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)
    with pytest.raises(ValueError, match="was drawn but not kept, so only --protocol m3d can be scored"):
        judge_samples(tmp_path, cases, gather(tmp_path), "standard", workers=1)
    found = metrics_table(judge_samples(tmp_path, cases, gather(tmp_path), "m3d", workers=1), "m3d", {})
    assert found["tasks"]["seg.sem"]["metrics"]["soft Dice"]["value"] == pytest.approx(36 / 73)


def test_a_scan_that_was_asked_about_and_is_gone_is_not_judged_on_another_grid(store, stand_in, tmp_path):
    config = config_of("rec.box3d", blind=None)
    cases = find_cases(config, store, None)
    ask_cases(stand_in, cases, config, tmp_path)

    def gone():
        raise OSError("no such file")

    entry = SimpleNamespace(read=gone)
    moved = [dataclasses.replace(case, entry=entry) for case in cases]
    with pytest.raises(BadScan, match="mini/a: the scan cannot be read"):
        judge_samples(tmp_path, moved, gather(tmp_path), "standard", workers=1)
    unread = {key: dataclasses.replace(one, failure=running.UNREAD, boxes=()) for key, one in gather(tmp_path).items()}
    found = metrics_table(judge_samples(tmp_path, moved, unread, "standard", workers=1), "standard", {})
    assert found["tasks"]["rec.box3d"]["metrics"]["IoU"]["value"] == 0.0


def test_records_of_a_subset_are_asked(store):
    for line in (0, 3):
        small_store.edit(
            store / "records.jsonl", lambda row: row.update(meta={"subsets": ["test1k"]}), id=f"mini/a/{line}"
        )
    config = BenchConfig(
        tasks={task: TaskConfig(subsets=("test1k", "test500")) for task in ("report", "rec.box3d")}, split="train"
    )
    assert [record.id for case in find_cases(config, store, None) for record in case.records] == [
        "mini/a/0",
        "mini/a/3",
    ]


# -- the command ----------------------------------------------------------------------------------------------------


def test_another_systems_answers_are_scored(store, tmp_path, capsys):
    out = tmp_path / "other"
    out.mkdir()
    config = tmp_path / "bench.yaml"
    config.write_text(json.dumps({"split": "train", "tasks": {"vqa.closed": {}, "report": {}}}))
    lines = [{"id": f"mini/{name}/7", "text": said} for name, said in (("a", "B. 2 organs"), ("c", "I do not know"))]
    lines += [{"id": f"mini/{name}/3", "text": small_store.REPORTS[f"mini/{name}"]} for name in "ac"]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["bench", "score", str(out), "--workers", "1"]) == 1
    assert "say what was asked: --config CONFIG --data STORE" in capsys.readouterr().err
    given = ["--config", str(config), "--data", str(store), "--workers", "1"]
    assert main(["bench", "score", str(out), *given]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["tasks"]["vqa.closed"]["metrics"]["accuracy"]["value"] == 0.5
    assert found["tasks"]["vqa.closed"]["metrics"]["unparsed"]["value"] == 0.5
    assert found["tasks"]["report"]["metrics"]["BLEU-4"]["value"] == pytest.approx(1.0)
    assert (out / "page" / "index.html").is_file() and "| vqa.closed |" in (out / "table.md").read_text()
    (out / "predictions.jsonl").write_text('{"id": "mini/z/1", "text": "x"}\n')
    assert main(["bench", "score", str(out), *given]) == 1
    assert "answers are to records that were not asked, such as 'mini/z/1'" in capsys.readouterr().err


def test_scoring_makes_one_file_of_what_processes_of_torchrun_left(store, stand_in, tmp_path):
    config, out = config_of("report", blind=None), tmp_path / "out"
    cases = find_cases(config, store, None)
    for rank in (1, 0):
        ask_cases(stand_in, cases, config, out, rank=rank, world=2)
    (tmp_path / "bench.yaml").write_text(json.dumps({"split": "train", "blind": None, "tasks": {"report": {}}}))
    assert not (out / "predictions.jsonl").exists() and len(list((out / "parts").iterdir())) == 2
    given = ["--config", str(tmp_path / "bench.yaml"), "--data", str(store), "--workers", "1", "--no-page"]
    assert main(["bench", "score", str(out), *given]) == 0
    whole = [json.loads(line)["id"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert whole == ["mini/a/3", "mini/c/3"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Two phantoms as the bundled model sees them."""
    import m3d
    from data_prep.preprocess import Preprocess

    root = tmp_path_factory.mktemp("phantoms") / "store"
    folder = Path(m3d.__file__).parent / "bundled" / "m3d-tiny"
    source = Phantoms(seeds={"test": (7000, 7002)})
    prepare(list(source.entries()), Job(preprocess=Preprocess.read(folder)), root)
    assert len(Store(root).images) == 2
    return root


@pytest.mark.integration
@pytest.mark.slow
def test_the_bundled_model_is_asked_by_two_processes_killed_and_scored(phantoms, tmp_path):
    """Ends as a run that nobody killed; and it sees: its masks are not the blind twin's."""
    few = [
        "tasks.vqa.closed.most=4",
        "tasks.seg.sem.most=4",
        "tasks.rec.box3d.most=3",
        "tasks.report.max_new_tokens=40",
    ]
    few += ["tasks.vqa.open.most=2", "tasks.reg.most=2", "tasks.seg.ref.most=2", "batch=4"]
    few += ["scans={kind: phantoms, seeds: {test: [7000, 7002]}}"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m3d.cli", "bench", "run", "configs/bench/derived.yaml", *few]
    command += ["--data", str(phantoms), "--out", str(out), "--device", "cpu"]
    alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    killed = subprocess.Popen(command, env=alone, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while killed.poll() is None and not any(part.stat().st_size for part in (out / "parts").glob("*.jsonl")):
        time.sleep(0.05)
    killed.kill()
    _, said = killed.communicate()
    before = gathered(out)
    assert before, said
    done = subprocess.run([*command, "--nproc", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = gathered(out)
    assert all(found[key] == one for key, one in before.items())  # nothing was asked again
    assert main(["bench", "score", str(out), "--workers", "1"]) == 0
    tasks = json.loads((out / "metrics.json").read_text())["tasks"]
    assert tasks["seg.sem"]["metrics"]["Dice"]["gain"] > 0.2
    assert {task: entry["n"] for task, entry in tasks.items()} == {
        "report": 2, "vqa.closed": 4, "vqa.open": 2, "rec.box3d": 3, "reg": 2, "seg.sem": 4, "seg.ref": 2,
    }  # fmt: skip
    page = (out / "page" / "index.html").read_text()
    assert page.count("<img ") >= 6
