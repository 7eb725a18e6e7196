"""Stages one after the other on five phantoms: each learns, is saved, is taken up by the next, goes on if stopped."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import m3d
from m3d.config import load_config
from m3d.models.clip import vision_tower_of
from m3d.models.weights import read_weights
from m3d.recipes import align, build, chain, checkpoints, instruct, merge, pretrain_segvol, pretrain_words
from m3d.recipes.checkpoints import model_folder, read_manifest, state_of
from m3d.recipes.handover import load_model
from m3d.recipes.pretrain_segvol import load_segvol
from m3d.recipes.talk import Judge
from m3d.train.data import VolumeDataset
from m3d.train.views import Masks
from tests.fixtures.tiny_stages import optim, stages

pytestmark = pytest.mark.integration

RECIPES = {
    "words": pretrain_words,
    "segvol": pretrain_segvol,
    "align": align,
    "instruct": instruct,
    "merge": merge,
}


def config_of(name: str, store: Path, folder: Path, **changed: Any) -> Any:
    values = stages(store, f"{folder}/")[name] | changed
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(RECIPES[name].Config, path)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chain_of(store: Path, folder: Path, **changed: Any) -> chain.Config:
    """All stages in order, their folders below ``folder``."""
    for name, values in stages(store).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    steps = [{"config": str(folder / f"{name}.yaml")} for name in RECIPES]
    values = {"stage": "chain", "root": str(folder), "stages": steps, "shared": {"seed": 1}} | changed
    (folder / "chain.yaml").write_text(yaml.safe_dump(values))
    return load_config(chain.Config, folder / "chain.yaml")


@pytest.fixture(scope="module")
def runs(phantom_store, tmp_path_factory) -> Path:
    """Words, segvol, align, instruct and merge in a chain, each begun from what the one before left."""
    folder = tmp_path_factory.mktemp("runs")
    ran = chain.main(chain_of(phantom_store, folder))
    assert [row["before"] for row in ran] == ["to do"] * 5
    return folder


def test_a_chain_skips_what_is_done(runs, phantom_store):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    again = chain.main(chain_of(phantom_store, runs))
    assert [row["before"] for row in again] == ["done"] * 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_chain_knows_what_has_changed(runs, phantom_store, tmp_path):
    """Another seed makes another stage; a moved folder does not, and other weights to begin from do."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs, moved)

    def states(**changed: Any) -> list[str]:
        links = chain.load(chain_of(phantom_store, moved, **changed))
        return [state_of(Path(link.output), chain._facts(link)) for _, link in links]

    assert states() == ["done"] * 5
    other = "a run of another configuration"
    assert states(shared={"seed": 2}) == [other] * 4 + ["done"]
    assert states(shared={"init.pool": 2}) == ["done", "done", other, "done", "done"]
    manifest = moved / "instruct" / "model" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"final": False}))
    assert states() == ["done", "done", "done", "to do", "done"]
    weights = moved / "segvol" / "model" / "model.safetensors"
    state = load_file(weights)
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, weights)
    assert states()[2] == "a run that began from other weights"
    with pytest.raises(ValueError, match=r"shared\.parts\.nose: no stage knows it"):
        states(shared={"parts.nose": "full"})
    chain._move_away(moved / "align", "a test", {})
    assert (moved / "align.old1" / "model" / "manifest.json").is_file() and not (moved / "align").exists()


def test_a_setting_that_is_newer_than_a_run_has_its_default(runs, phantom_store, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs, moved)
    folder = moved / "align" / "model"

    def state(recipe: dict[str, Any]) -> str:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        stage, link = list(chain.load(chain_of(phantom_store, moved)))[2]
        assert stage == "align"
        return state_of(Path(link.output), chain._facts(link))

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    manifest = read_manifest(folder) | {"config_sha256": "that of an earlier program"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    older = recipe | {"loss": {name: value for name, value in recipe["loss"].items() if name != "boxes"}}
    assert state(older) == "done"
    assert state(recipe | {"loss": recipe["loss"] | {"boxes": 1.0}}) == "a run of another configuration"
    assert state(recipe | {"no_more": 1}) == "a run of another configuration"


@pytest.mark.parametrize("name", ["words", "segvol", "align", "instruct"])
def test_a_stage_leaves_a_whole_folder_with_its_facts(runs, name, phantom_store):
    folder, found = runs / name / "model", read_manifest(runs / name)
    assert found["final"] and found["steps"] == 2
    assert found["data"][0]["store"] == "phantoms" and len(found["data"][0]["sha256"]) == 64
    assert found["metrics"]["loss"] > 0 and "eval_loss" in found["metrics"] and found["wall_seconds"] >= 0
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["stage"] == RECIPES[name].Config.stage and recipe["data"]["stores"] == ["phantoms"]
    for path in (folder / "recipe.yaml", folder / "manifest.json"):
        assert str(runs) not in path.read_text() and str(phantom_store.parent) not in path.read_text()
    assert not [path.name for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    assert len(rows(runs / name / "losses.jsonl")) == 2


def test_losses_are_named_and_the_spread_of_tokens_is_watched(runs):
    assert {"words"} <= set(rows(runs / "words" / "losses.jsonl")[0])
    assert {"dice", "bce", "prompted"} <= set(rows(runs / "segvol" / "losses.jsonl")[0])
    assert "dice" not in rows(runs / "align" / "losses.jsonl")[0]
    assert {"text", "dice", "bce"} <= set().union(*rows(runs / "instruct" / "losses.jsonl"))
    for name in ("segvol", "align", "instruct"):
        spread = [row["eval_token_spread"] for row in rows(runs / name / "evaluations.jsonl")]
        assert all(0 < one < 1 for one in spread)


def test_what_a_stage_left_is_where_the_next_begins(runs):
    """Frozen parts of the alignment are those of the stages before, to the bit."""
    aligned = read_weights(runs / "align" / "model")
    segvol = load_file(runs / "segvol" / "model" / "model.safetensors")
    handed = {name for name in segvol if name.split(".")[0] in ("vision_tower", "seg_head", "seg_projector")}
    assert handed == set(segvol)
    assert all(torch.equal(aligned[name], segvol[name]) for name in handed)
    words = load_file(runs / "words" / "model" / "model.safetensors")
    own = set(words) - {"lm_head.weight"}
    assert all(torch.equal(aligned[f"language_model.{name}"], words[name]) for name in own)
    same = (aligned["language_model.lm_head.weight"] == words["lm_head.weight"]).all(dim=1)
    assert int((~same).sum()) == 4  # our four tokens; neither reports nor answers show their inputs
    parents = read_manifest(runs / "align")["parents"]
    assert {role: one["name"] for role, one in parents.items()} == {"language_model": "words", "segvol": "segvol"}


def test_the_tower_of_segvol_is_a_tower_for_anyone(runs):
    config, state = vision_tower_of(model_folder(runs / "segvol"))
    assert config.hidden_size == 16 and state
    assert load_segvol(runs / "segvol" / "model").vision_tower is not None


def test_the_merged_model_is_one_that_m3d_loads(runs, phantom_store):
    folder = runs / "m3d-micro"
    loaded = m3d.load(folder, device="cpu")
    assert loaded.id == "m3d-micro"
    names = {name for row in rows(phantom_store / "images.jsonl") for name in row["names"].values()}
    assert loaded.model.config.seg.vocabulary == sorted(names), "a phantom has both sides of what has sides"
    learned, processor = load_model(runs / "instruct" / "model")
    ids = processor.tokenizer(processor.write("Draw it. Mandible [SEG]"), return_tensors="pt")["input_ids"]
    pixels = torch.rand(1, 1, 16, 16, 24)
    with torch.no_grad():
        one = learned.eval()(input_ids=ids, pixel_values=pixels, draw_masks=True)
        other = loaded.model(input_ids=ids, pixel_values=pixels, draw_masks=True)
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.mask_logits, one.mask_logits, atol=1e-4, rtol=1e-4)
    found = read_manifest(folder)
    assert found["final"] and found["learned_from"][0]["store"] == "phantoms"
    assert found["parents"]["checkpoint"]["name"] == "instruct"


def test_names_keep_their_places_where_more_are_learned(runs, phantom_store, tmp_path):
    names = load_model(runs / "instruct" / "model")[0].config.seg.vocabulary
    begun = tmp_path / "begun"
    shutil.copytree(runs / "instruct" / "model", begun)
    config = json.loads((begun / "config.json").read_text())
    config["seg_config"]["vocabulary"] = ["spleen", names[-1]]
    (begun / "config.json").write_text(json.dumps(config))
    instruct.main(config_of("instruct", phantom_store, tmp_path, init={"checkpoint": str(begun)}, optim=optim(1)))
    model, _ = load_model(tmp_path / "instruct" / "model")
    assert model.config.seg.vocabulary == ["spleen", names[-1], *names[:-1]]


def test_a_stopped_stage_goes_on_as_if_nothing_had_happened(runs, phantom_store, tmp_path):
    """Three steps at once, and two and then one: the same losses to the bit, the same weights."""
    finals = []
    for name, parts in (("once", (3,)), ("twice", (2, 3))):
        for steps in parts:
            values = optim(steps) | {"schedule": "constant"}
            config = config_of("align", phantom_store, runs, output=str(tmp_path / name), optim=values)
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=3))
            if steps == 2:
                _stop_after(config, 2)
            else:
                align.main(config, resume=len(parts) > 1)
        finals.append((rows(tmp_path / name / "losses.jsonl"), read_weights(tmp_path / name / "model")))
    (one, weights), (other, again) = finals
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def _stop_after(config: Any, steps: int) -> None:
    """Run a stage and let it fall over after some steps, as a killed process does."""
    from m3d.train import trainer as module

    class Killed(Exception):
        pass

    save = module.M3DTrainer._save_checkpoint

    def save_and_die(self: Any, *given: Any, **more: Any) -> None:
        save(self, *given, **more)
        if self.state.global_step == steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.M3DTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            align.main(config)
    assert not read_manifest(config.output)["final"]


def test_a_box_head_learns_and_is_handed_on(runs, phantom_store, tmp_path):
    """From alignment, which makes it, through instruction to the folder that is loaded."""
    given = stages(phantom_store, f"{runs}/")["align"]
    boxed = {"data": given["data"] | {"weights": {"rec.box3d": 1}}, "init": given["init"] | {"box_head": True}}
    boxed["loss"] = {"dice": 0, "bce": 0, "prompted": 0, "boxes": 5}
    config = config_of("align", phantom_store, runs, output=str(tmp_path / "align"), **boxed)
    align.main(config)
    assert all(row["boxes"] > 0 for row in rows(tmp_path / "align" / "losses.jsonl"))
    torch.manual_seed(config.seed)
    begun = build.build(config.init, config.data.preprocess()).model.state_dict()
    learned = read_weights(tmp_path / "align" / "model")
    names = [name for name in learned if name.startswith("box_head.")]
    assert len(names) == 4 and not any(torch.equal(learned[name], begun[name]) for name in names)
    counted = read_manifest(tmp_path / "align")["parts"]["box_head"]
    assert counted["learned"] == counted["total"] > 0
    config = config_of(
        "instruct", phantom_store, runs, output=str(tmp_path / "instruct"), init={"checkpoint": str(tmp_path / "align")}
    )
    instruct.main(config)  # no loss of boxes: the head stands still
    merge.main(merge.Config(checkpoint=str(tmp_path / "instruct"), output=str(tmp_path / "merged"), dtype="float32"))
    handed = m3d.load(tmp_path / "merged", device="cpu").model.state_dict()
    assert all(torch.equal(handed[name], learned[name]) for name in names)


def test_sample_predictions_show_what_the_head_draws(runs, phantom_store, tmp_path):
    config = config_of("segvol", phantom_store, runs, output=str(tmp_path / "segvol"), samples_every=1)
    pretrain_segvol.main(config)
    folders = sorted(path.name for path in (tmp_path / "segvol" / "samples").iterdir())
    assert folders == ["step-000001", "step-000002"]
    folder = tmp_path / "segvol" / "samples" / "step-000002"
    said = json.loads((folder / "samples.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "samples.json",
        *(f"{one['image_id'].replace('/', '-')}.png" for one in said),
    }
    assert len(said) == 2
    objective = pretrain_segvol.DrawByPrompts(
        load_segvol(tmp_path / "segvol" / "model"),
        pretrain_segvol.read_names(config, None, pretrain_segvol.names_in(config.data.judged_groups())),
        config.loss,
    )
    case = config.data.judged_groups()[0].cases[0]
    pixels, labels = case.tensors()
    with torch.no_grad():
        features = objective.model.look(pixels[None, None])
        for name, dice in said[0]["dice"].items():
            drawn = (
                objective.model.draw(features, torch.zeros(1, dtype=torch.long), names=objective.names([name], 0)) > 0
            )
            drawn, truth = drawn[0, 0], case.mask(labels, name)
            assert dice == pytest.approx(
                2 * (drawn & truth).sum().item() / (drawn.sum() + truth.sum()).item(), abs=1e-6
            )


@pytest.mark.slow
def test_two_processes_of_a_chain_learn_what_one_does(runs, phantom_store, tmp_path):
    """Words and masks, all kinds of prompts, epochs that end within a step; then one of the two merges."""
    values = stages(phantom_store, f"{runs}/")["instruct"] | {"output": str(tmp_path / "alone")}
    values |= {"optim": optim(None, epochs=5, batch=4, micro_batch=1, save_every=4), "best": None}
    path = tmp_path / "instruct.yaml"
    path.write_text(yaml.safe_dump(values))
    instruct.main(load_config(instruct.Config, path))
    merging = {"stage": "merge", "output": str(tmp_path / "merged"), "checkpoint": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values | {"output": str(tmp_path / "two")}))
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merging))
    steps = [{"config": str(tmp_path / "two.yaml")}, {"config": str(tmp_path / "merge.yaml")}]
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"stage": "chain", "stages": steps}))
    command = [
        sys.executable,
        "-m",
        "m3d.cli",
        "train",
        str(tmp_path / "chain.yaml"),
        "--nproc",
        "2",
        "--engine",
        "ddp",
    ]
    for before in ("to do", "done"):  # and again, when there is nothing to do
        done = subprocess.run(
            [*command, "--device", "cpu"], capture_output=True, text=True, timeout=240, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert (f"instruct: done ({tmp_path / 'two'})" in done.stderr) == (before == "done")
    one, two = rows(tmp_path / "alone" / "losses.jsonl"), rows(tmp_path / "two" / "losses.jsonl")
    assert [row["step"] for row in two] == [1, 2, 3, 4]  # 5 epochs of 3 volumes, 4 a step
    for alone, both in zip(one, two, strict=True):
        for name in ("loss", "text", "dice", "bce", "prompted", "grad_norm"):
            assert both[name] == pytest.approx(alone[name], rel=1e-3), (alone["step"], name)
    (one,), (two,) = (rows(tmp_path / name / "evaluations.jsonl") for name in ("alone", "two"))  # a volume each
    assert two == pytest.approx(one, rel=1e-3)
    assert read_manifest(tmp_path / "merged")["final"]


def test_a_stopped_stage_goes_on_with_what_is_free_to_change(runs, phantom_store, tmp_path):
    """As the message of a loss that exploded advises; another batch is another run."""
    config = config_of("align", phantom_store, runs, output=str(tmp_path / "align"), optim=optim(3))
    _stop_after(config, 2)
    lower = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=config.optim.lr / 10, explode=5.0))
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup=1))

    def state(one: Any) -> str:
        return state_of(Path(one.output), chain._facts(one))

    assert (state(config), state(lower), state(other)) == ("to do", "to do", "a run of another configuration")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        align.main(other, resume=True)
    align.main(lower, resume=True)
    assert [row["step"] for row in rows(tmp_path / "align" / "losses.jsonl")] == [1, 2, 3]
    assert (state(lower), state(config)) == ("done", "a run of another configuration")


def test_what_could_only_fail_later_is_refused_now(runs, phantom_store, tmp_path):
    config = config_of("align", phantom_store, runs, output=str(tmp_path / "align"))
    with pytest.raises(ValueError, match=r"data.weights: reprot is no task"):
        dataclasses.replace(config.data, weights={"reprot": 1.0})
    with pytest.raises(ValueError, match=r"samples_every=5 needs volumes to show"):
        dataclasses.replace(config, samples_every=5, data=dataclasses.replace(config.data, judged=None))
    with pytest.raises(ValueError, match=r"samples_every=0 must be 1 or more; null writes none"):
        dataclasses.replace(config, samples_every=0)
    half = dataclasses.replace(config.init, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"small steps would be rounded away; take init.dtype=float32"):
        dataclasses.replace(config, init=half, parts=dataclasses.replace(config.parts, language_model="full"))
    with pytest.raises(ValueError, match=r"init.checkpoint brings it along, whatever it is; leave out init.pool"):
        build.Init(checkpoint="somewhere", pool=1)
    with pytest.raises(
        ValueError, match=r"best='dcie' is none of what the evaluation measures: loss, text, token_spread"
    ):
        align.main(dataclasses.replace(config, best="dcie"))
    assert not (tmp_path / "align" / "losses.jsonl").exists()
    few = VolumeDataset(config.data.judged_groups()[0].cases[:1], Masks())
    with pytest.raises(ValueError, match=r"data.judged: 1 volume to measure on"):
        Judge(torch.nn.Identity(), few, list, torch.nn.Identity(), config.optim)


def test_where_there_is_no_git_nothing_is_said_of_a_commit(monkeypatch, tmp_path):
    assert checkpoints.code_version() is None or len(checkpoints.code_version().rstrip("+")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkpoints.code_version() is None


def test_a_chain_changes_what_is_given_of_its_stages_engines():
    links = dict(chain.load(load_config(chain.Config, "configs/lamed/chain.yaml", ["engine.name=zero3"])))
    assert {link.engine.name for link in links.values() if hasattr(link, "engine")} == {"zero3"}
    assert links["instruct"].engine.deepspeed == "engines/zero3-8xa100.json"
    assert links["pretrain_clip"].engine.deepspeed is None
    links = dict(chain.load(load_config(chain.Config, "configs/lamed/chain.yaml", ["engine.device=cpu"])))
    assert (links["instruct"].engine.name, links["instruct"].engine.device) == ("zero2", "cpu")
    assert links["instruct"].engine.deepspeed == "engines/zero2-8xa100.json"
    with pytest.raises(ValueError, match=r"engine.nmae: no engine has it; .*name"):
        load_config(chain.Config, "configs/lamed/chain.yaml", ["engine.nmae=zero3"])


def test_others_wait_for_the_first_process(monkeypatch):
    asked = []
    monkeypatch.setattr(chain.time, "sleep", lambda _: asked.append(1))
    chain._wait(lambda: False)  # the first waits for nobody
    monkeypatch.setenv("RANK", "3")
    chain._wait(lambda: len(asked) == 2)
    assert len(asked) == 2


def test_another_configuration_does_not_go_on_in_the_same_folder(runs, phantom_store):
    config = config_of("align", phantom_store, runs, seed=2)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        align.main(config, resume=True)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_pictures_are_not_kept_where_parts_are_fetched_by_all_at_once(runs, phantom_store, engine):
    config = config_of("align", phantom_store, runs)
    with pytest.raises(ValueError, match=rf"data.looks with engine={engine}"):
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, looks=4),
            engine=dataclasses.replace(config.engine, name=engine),
        )


def test_wrong_beginnings_are_refused(runs, phantom_store):
    config = config_of("align", phantom_store, runs, output=str(runs / "other"))
    broken = runs / "broken"
    broken.mkdir()
    for path in (runs / "segvol" / "model").iterdir():
        if path.name != "model.safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    state = load_file(runs / "segvol" / "model" / "model.safetensors")
    first = next(name for name in state if name.startswith("seg_head."))
    save_file({name: value for name, value in state.items() if name != first}, broken / "model.safetensors")
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, segvol=str(broken)))
    with pytest.raises(ValueError, match=rf"seg_head: the weights do not fit \(1 missing, such as {first[9:]}\)"):
        align.main(config)
    with pytest.raises(ValueError, match="brings all parts"):
        dataclasses.replace(config.init, checkpoint="somewhere")
    with pytest.raises(FileNotFoundError, match="run the stage that makes it first"):
        align.main(dataclasses.replace(config, init=dataclasses.replace(config.init, segvol=str(runs / "nowhere"))))
