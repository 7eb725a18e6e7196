"""Masks by prompts of every kind, of a small random model: what is asked, on disk, scored, compared and refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from data_prep.boxes import Box
from m3d.bench import prompted
from m3d.bench.cases import find_cases
from m3d.bench.compare import compare
from m3d.bench.config import BenchConfig, TaskConfig
from m3d.bench.mask_files import read_mask
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.bench.predictions import DrawnMask, Prediction, gather
from m3d.bench.run import ask_cases
from m3d.bench.score import judge_samples, metrics_table
from m3d.bench.simulated import SIMULATION
from m3d.cli.main import main
from m3d.inference.load import M3D
from m3d.inference.scan import Scan
from m3d.inference.talking import Spoken
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.processing import add_m3d_tokens
from tests.fixtures import small_store
from tests.fixtures.small_words import words_tokenizer

KINDS = ("point", "points", "scribble", "slice_box", "box", "mask", "mask+box", "clicks", "mask+box+clicks")
LIVER, SPLEEN = (small_store.labels()[0] == value for value in (1, 2))


def small_model(*, mask_prompt: bool = True) -> M3D:
    torch.manual_seed(0)
    tokenizer = words_tokenizer(["Segment the liver.", "Here is the liver [SEG]."])
    ids = add_m3d_tokens(tokenizer)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = M3DConfig(
        vision_config=M3DVisionConfig(
            image_size=list(small_store.GRID), patch_size=[3, 4, 5], hidden_size=16, intermediate_size=16, **sizes
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, **sizes,
        ),
        seg_config=M3DSegConfig(
            decoder_heads=2, decoder_mlp_dim=16, iou_hidden_size=8, num_masks=1, coordinates="grid",
            upscale_norm="channel", mask_prompt=mask_prompt, projector_dropout=0.0,
        ),
        pool_size=1,
        **ids,
    )  # fmt: skip
    model = M3DForConditionalGeneration(config).eval()
    return M3D("small", model, M3DProcessor(tokenizer, small_store.PREPROCESS, config.num_image_tokens))


@pytest.fixture(scope="module")
def model() -> M3D:
    return small_model()


@pytest.fixture
def store(tmp_path) -> Path:
    return small_store.build(tmp_path / "store")


@pytest.fixture
def speaking(monkeypatch):
    """A model that says what it draws, the spleen first; how often it was asked."""
    asked = []

    def speak(scan, prompts, limit):
        asked.extend(prompts)
        vectors = torch.linspace(-1, 1, 32).view(2, 16)
        return [Spoken("Here is the spleen [SEG] and liver [SEG].", vectors) for _ in prompts]

    monkeypatch.setattr(prompted, "speak_all", speak)
    return asked


def config_of(*kinds: str, task: str = "seg.sem", **settings) -> BenchConfig:
    fields = {"split": "train", "likelihoods": False} | settings
    return BenchConfig(tasks={task: TaskConfig(prompts=kinds, max_new_tokens=4)}, **fields)


def asked(model, store, out, *kinds, **settings):
    """The cases, and what was answered."""
    config = config_of(*kinds, **settings)
    cases = find_cases(config, store, small_store.PREPROCESS)
    ask_cases(model, cases, config, out)
    return cases, gather(out)


def drawn(out: Path, found, cases, name: str, number: int = 0) -> np.ndarray:
    return read_mask(out, found[name, "seeing"].masks[number], cases[0].open().volume)


# -- asking ---------------------------------------------------------------------------------------------------------


def test_each_kind_is_an_answer_of_its_own(model, store, tmp_path):
    _, found = asked(model, store, tmp_path, *KINDS)
    names = {f"mini/{scan}/6 by {kind}" for scan in "ac" for kind in KINDS}
    assert set(found) == {(name, sight) for name in names for sight in ("seeing", "blind")}
    for (_, sight), one in found.items():
        assert one.failure is None and [mask.name for mask in one.masks] == ["liver", "spleen"] and one.sight == sight
    assert found["mini/a/6 by box", "seeing"].prompt == (
        "liver: box (1, 1, 1) to (4, 5, 4)\nspleen: box (2, 4, 6) to (5, 7, 9)"
    )
    alike = [found["mini/a/6 by points", sight].prompt for sight in ("seeing", "blind")]
    assert alike[0] == alike[1] != found["mini/c/6 by points", "seeing"].prompt


def test_what_is_pointed_at_reaches_the_head(model, store, tmp_path):
    """As a `Scan` draws it, and a `Session` of one click. The liver is 3 x 4 x 3 voxels, deepest at (2, 2, 2)."""
    cases, found = asked(model, store, tmp_path, "point", "box", "clicks", blind=None)
    scan = Scan.of_prepared(model.id, model.model, model.processor, cases[0].open().prepared(small_store.PREPROCESS))
    point, box = [((2, 2, 2), 1)], Box(small_store.LIVER[0], small_store.LIVER[1])
    masks = {"point": scan.segment(points=point).masks[0].array, "box": scan.segment(box=box).masks[0].array}
    for kind, mask in masks.items():
        assert (drawn(tmp_path, found, cases, f"mini/a/6 by {kind}") == mask).all()
    first = found["mini/a/6 by clicks", "seeing"].masks[0].steps[1]
    assert first == pytest.approx(Dice().value(MaskPair("", masks["point"], LIVER, (1, 1, 1))), abs=1e-6)


def test_steps_end_where_the_mask_is(model, store, tmp_path):
    cases, found = asked(model, store, tmp_path, "mask", "clicks", "mask+box+clicks", blind=None)
    for kind, length in (("mask", 2), ("clicks", 11), ("mask+box+clicks", 11)):
        for number, truth in enumerate((LIVER, SPLEEN)):
            steps = found[f"mini/a/6 by {kind}", "seeing"].masks[number].steps
            mask = drawn(tmp_path, found, cases, f"mini/a/6 by {kind}", number)
            assert len(steps) == length
            assert steps[-1] == pytest.approx(Dice().value(MaskPair("", mask, truth, (1, 1, 1))), abs=1e-6)
    assert found["mini/a/6 by clicks", "seeing"].masks[0].steps[0] == 0.0


def test_words_and_pointing_go_together_and_words_are_said_once(model, store, speaking, tmp_path):
    cases, found = asked(model, store, tmp_path, "text+point", "text+box", "text+clicks", blind=None)
    assert len(speaking) == 2 and "liver" in speaking[0]  # two scans
    one = found["mini/a/6 by text+point", "seeing"]
    assert one.text.startswith("Here is") and one.prompt.startswith(speaking[0])
    scan = Scan.of_prepared(model.id, model.model, model.processor, cases[0].open().prepared(small_store.PREPROCESS))
    liver = torch.linspace(-1, 1, 32).view(2, 16)[1:]  # it was said second
    geometry = prompted.as_prompts(scan.prepared, [((2.0, 2.0, 2.0), 1)], None)
    mask, _ = scan.draw_one("liver", text=liver, geometry=geometry)
    assert (drawn(tmp_path, found, cases, "mini/a/6 by text+point") == mask.array).all()


def test_a_model_that_would_not_draw_fails_but_for_clicks(model, store, monkeypatch, tmp_path):
    monkeypatch.setattr(prompted, "speak_all", lambda scan, prompts, limit: [Spoken("No.", None) for _ in prompts])
    _, found = asked(model, store, tmp_path, "text+point", "text+clicks", "clicks", blind=None)
    assert found["mini/a/6 by text+point", "seeing"].failure == "NoMask: the answer has no [SEG]"
    alone, beside = (found[f"mini/a/6 by {kind}", "seeing"] for kind in ("clicks", "text+clicks"))
    assert [mask.steps for mask in alone.masks] == [mask.steps for mask in beside.masks]


def test_a_run_goes_on_with_the_kinds_that_are_missing(model, store, tmp_path, monkeypatch):
    _, whole = asked(model, store, tmp_path / "whole", "point", "box", blind=None)
    asked(model, store, tmp_path / "out", "point", blind=None)
    config = config_of("point", "box", blind=None)
    cases = find_cases(config, store, None)
    assert ask_cases(model, cases, config, tmp_path / "out") == 2  # the boxes of two scans
    assert ask_cases(model, cases, config, tmp_path / "out") == 0
    timeless = [
        {key: dataclasses.replace(one, seconds=None) for key, one in some.items()}
        for some in (whole, gather(tmp_path / "out"))
    ]
    assert timeless[0] == timeless[1]


# -- what cannot be asked ---------------------------------------------------------------------------------------------


def test_what_has_no_voxel_is_told_by_name_and_not_judged(model, store, tmp_path):
    empty = small_store.labels()
    empty[empty == 2] = 0  # no spleen in a
    small_store.save_labels(store, "mini/a", empty)
    cases, found = asked(model, store, tmp_path, "point")
    assert found["mini/a/6 by point", "seeing"].failure == "CannotBePrompted: the truth of 'spleen' has no voxel"
    table = metrics_table(judge_samples(tmp_path, cases, found, "standard", workers=1), "standard", {})
    entry = table["tasks"]["seg.sem by point"]
    assert (entry["n"], entry["n_not_promptable"], entry["n_failed"]) == (1, 1, 0)
    assert entry["metrics"]["Dice"]["n"] == entry["metrics"]["HD95"]["n"] == entry["twin"]["n"] == 1


def test_a_record_of_what_is_absent_cannot_be_pointed_at(model, store, tmp_path):
    small_store.edit(store / "records.jsonl", lambda row: row["target"].update(masks=[]), id="mini/a/5")
    small_store.edit(
        store / "records.jsonl",
        lambda row: row["prompt"].update(slots={"description": small_store.LIVER_WORDS}),
        id="mini/a/5",
    )
    _, found = asked(model, store, tmp_path, "box", task="seg.ref", blind=None)
    assert found["mini/a/5 by box", "seeing"].failure == "CannotBePrompted: what is asked for is not there"
    assert found["mini/c/5 by box", "seeing"].failure is None


def test_a_model_without_mask_prompts_is_refused_before_anything_runs(store, tmp_path, capsys):
    folder, config, out = tmp_path / "small", tmp_path / "bench.yaml", tmp_path / "out"
    small = small_model(mask_prompt=False)
    small.model.save_pretrained(folder)
    small.processor.save_pretrained(folder)
    config.write_text(json.dumps({"split": "train", "tasks": {"seg.sem": {"prompts": ["point", "mask+clicks"]}}}))
    command = ["bench", "run", str(config), "--model", str(folder), "--data", str(store), "--out", str(out)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "tasks.seg.sem.prompts has 'mask+clicks', but the model has not learned to use an earlier mask" in said
    assert not out.exists()
    no_head = M3DConfig.from_pretrained(folder)
    no_head.seg_config = None
    with pytest.raises(ValueError, match=r"this checkpoint has no mask head.*or leave 'point' out"):
        prompted.check_model(config_of("text", "point"), no_head)
    prompted.check_model(config_of("text"), no_head)


# -- scoring --------------------------------------------------------------------------------------------------------


def test_kinds_are_rows_beside_their_twins_and_pair_with_themselves(model, store, tmp_path, capsys):
    """From the command to the comparison of two models."""
    config = tmp_path / "bench.yaml"
    config.write_text(json.dumps({"split": "train", "tasks": {"seg.sem": {"prompts": ["text", "box", "clicks"]}}}))
    for seed, name in enumerate(("one", "other")):
        folder, out = tmp_path / "models" / name, str(tmp_path / name)
        small = small_model()
        for weight in small.model.seg_head.parameters():
            weight.data += 0.1 * seed
        small.model.save_pretrained(folder)
        small.processor.save_pretrained(folder)
        given = ["--model", str(folder), "--data", str(store), "--device", "cpu", "tasks.seg.sem.max_new_tokens=3"]
        assert main(["bench", "run", str(config), *given, "--out", out]) == 0
        assert main(["bench", "score", out, "--workers", "1"]) == 0
        assert main(["bench", "score", out, "--protocol", "m3d"]) == 0
    assert json.loads((tmp_path / "one" / "run.json").read_text())["simulation"] == SIMULATION
    found = json.loads((tmp_path / "one" / "metrics.json").read_text())["tasks"]
    assert list(found) == ["seg.sem", "seg.sem by box", "seg.sem by clicks"]
    clicks = found["seg.sem by clicks"]["metrics"]
    assert list(clicks) == [
        "Dice", "NSD@3mm", "HD95", "Dice after 1 click", "Dice after 3 clicks", "Dice after 5 clicks",
        "Dice after 10 clicks", "NoC@80", "never Dice 0.8",
    ]  # fmt: skip
    assert clicks["Dice after 10 clicks"]["value"] == pytest.approx(clicks["Dice"]["value"], abs=1e-6)
    assert {"low", "high", "blind", "gain"} <= set(clicks["NoC@80"]) and clicks["NoC@80"]["unit"] == "clicks"
    assert list(json.loads((tmp_path / "one" / "metrics.m3d.json").read_text())["tasks"]) == ["seg.sem"]
    table = (tmp_path / "one" / "table.md").read_text()
    assert "| seg.sem by clicks | NoC@80 ↓ |" in table and "never counts as 10" in table
    page = (tmp_path / "one" / "page" / "index.html").read_text()
    assert "<h2>seg.sem by box</h2>" in page and "liver: box (1, 1, 1) to (4, 5, 4)" in page
    pairs = compare(tmp_path / "one", tmp_path / "other")
    assert {task: cover.both for task, cover in pairs.coverage.items()} == dict.fromkeys(found, 2)
    box = next(row for row in pairs.rows if (row.task, row.metric) == ("seg.sem by box", "Dice"))
    values = [
        json.loads((tmp_path / name / "metrics.json").read_text())["tasks"]["seg.sem by box"]["metrics"]["Dice"]
        for name in ("one", "other")
    ]
    assert (box.one, box.other) == pytest.approx(tuple(value["value"] for value in values)) and box.n == 2
    capsys.readouterr()


def test_another_systems_prompted_masks_are_scored(store, tmp_path):
    """One that says its steps, and one that says them not."""
    from data_prep.write import write_mask

    cases = find_cases(config_of("clicks", blind=None), store, None)
    for name, mask in (("liver", LIVER), ("spleen", SPLEEN)):
        write_mask(tmp_path / f"{name}.nii.gz", mask, like=cases[0].open().volume)
    steps = [0.0, 0.5, 0.9, *[1.0] * 8]
    lines = [
        {
            "id": f"mini/{scan}/6",
            "by": "clicks",
            "masks": [
                {"name": name, "file": f"{name}.nii.gz"} | ({"steps": steps} if scan == "a" else {})
                for name in ("liver", "spleen")
            ],
        }
        for scan in "ac"
    ]
    said = {(f"{line['id']} by clicks", "seeing"): Prediction.from_row(line, "here") for line in lines}
    assert all(one.key == key for key, one in said.items())
    found = metrics_table(judge_samples(tmp_path, cases, said, "standard", workers=1), "standard", {})
    metrics = found["tasks"]["seg.sem by clicks"]["metrics"]
    assert (metrics["Dice"]["value"], metrics["Dice"]["n"]) == (1.0, 2)
    assert (metrics["NoC@80"]["value"], metrics["NoC@80"]["n"]) == (2.0, 1)
    missing = metrics_table(judge_samples(tmp_path, cases, {}, "standard", workers=1), "standard", {})
    entry = missing["tasks"]["seg.sem by clicks"]
    assert entry["failures"] == {"Missing": 2} and entry["metrics"]["NoC@80"]["value"] == 10.0


def test_a_line_says_its_kind_only_where_it_has_one():
    plain, clicked = Prediction(id="a"), Prediction(id="a", by="clicks", masks=(DrawnMask(name="x", steps=(0.0, 1.0)),))
    assert "by" not in json.loads(plain.to_line()) and plain.key == ("a", "seeing")
    assert Prediction.from_row(json.loads(clicked.to_line()), "here") == clicked
    assert clicked.key == ("a by clicks", "seeing")
