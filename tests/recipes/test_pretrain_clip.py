"""The CLIP stage on a store of three images: it learns them by heart, and its folder is what later stages read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m3d.config import load_config
from m3d.models.clip import load_pair, vision_tower_of
from m3d.models.modeling import build_vision_tower
from m3d.recipes import pretrain_clip
from m3d.recipes.pretrain_clip import Config, judge, main, summary
from m3d.train.cases import stored
from tests.fixtures import small_store

YAML = """\
stage: pretrain_clip
seed: 1
data: {judged: train, tasks: [report], text: null}
augment: null
vision: {width: 16, layers: 1, heads: 2, patch: [2, 4, 5]}
text: {source: small, max_length: 64, small: {vocabulary: 300, width: 16, layers: 1, heads: 2, dropout: 0.0}}
shared_width: 8
volume_pooling: mean
optim: {lr: 0.003, steps: 24, batch: 2, micro_batch: 2, warmup: 2, eval_every: 12, save_every: 24}
engine: {device: cpu}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two scans to learn from that anyone can tell apart: grey noise, and a dark one."""
    root = small_store.build(tmp_path_factory.mktemp("clip") / "store")
    small_store.save_image(root, "mini/c", np.full(small_store.GRID, 20, np.uint8))
    return root


def config_of(folder, store, *overrides: str) -> Config:
    (folder / "clip.yaml").write_text(YAML)
    given = [f"data.stores=[{store}]", f"output={folder / 'run'}", *overrides]
    return load_config(Config, folder / "clip.yaml", given)


@pytest.fixture(scope="module", params=["infonce", "siglip"])
def trained(request, tmp_path_factory, store):
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(folder, store, f"loss.kind={request.param}")
    return config, folder / "run", main(config)


@pytest.mark.integration
def test_two_scans_are_learned_by_heart(trained):
    _, output, scores = trained
    assert scores["report"]["volume_to_text/R@1"] == scores["report"]["text_to_volume/R@1"] == 1.0
    losses = [json.loads(line)["contrastive"] for line in (output / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 24
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.integration
def test_the_folder_is_whole(trained, store):
    config, output, scores = trained
    folder = output / "model"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "preprocess.json", "recipe.yaml", "manifest.json"}
    assert wanted | {"metrics.json"} <= {path.name for path in folder.iterdir()}
    written = json.loads((folder / "metrics.json").read_text())
    assert written["tasks"] == scores
    assert (written["split"], written["tasks"]["report"]["n"]) == ("train", 2)
    assert written["tasks"]["report"]["chance/R@1"] == 0.5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["final"], manifest["stage"], manifest["seed"]) == (True, "pretrain_clip", 1)
    assert manifest["text_tower"] == "small BERT, from nothing"
    assert str(store.parent) not in (folder / "recipe.yaml").read_text() + json.dumps(manifest)

    pair = load_pair(folder)
    assert (pair.model.logit_bias is not None) == (config.loss.kind == "siglip")
    assert judge(pair, stored(store, "train"), ("report",)) == scores


@pytest.mark.integration
def test_tasks_of_the_same_scans_share_one_look(trained, store, monkeypatch):
    _, output, _ = trained
    pair, looked = load_pair(output / "model"), []
    cases, look = stored(store, "train"), pretrain_clip.look
    told = {task: [case.id for case in pretrain_clip.telling(cases, task)] for task in ("report", "retrieval")}
    monkeypatch.setattr(pretrain_clip, "look", lambda model, some: looked.append(some) or look(model, some))
    scores = judge(pair, cases, ("report", "retrieval"))
    assert told["report"] == told["retrieval"] and [[case.id for case in some] for some in looked] == [told["report"]]
    for task in told:  # as each would have been judged by itself
        assert judge(pair, cases, (task,)) == {task: scores[task]}


@pytest.mark.integration
def test_later_stages_find_the_vision_tower(trained):
    _, output, _ = trained
    saved = load_file(output / "model" / "model.safetensors")
    config, state = vision_tower_of(output / "model")
    tower = build_vision_tower(config)
    tower.load_state_dict(state)
    assert {f"vision_tower.{name}" for name in tower.state_dict()} <= saved.keys()
    assert config.image_size == list(small_store.GRID)


@pytest.mark.integration
def test_it_begins_from_an_earlier_vision_tower(trained, tmp_path, store):
    _, output, _ = trained
    config = config_of(tmp_path, store, f"init={output}", "vision=null")
    vision, state = pretrain_clip.vision_of(config, small_store.GRID)
    pair, _ = pretrain_clip.build(config, iter(["A text."]), small_store.PREPROCESS)
    assert vision.hidden_size == 16
    for name, weight in pair.model.vision_tower.state_dict().items():
        assert torch.equal(weight, state[name])
    with pytest.raises(ValueError, match=r"sees \[6, 8, 10\] voxels, the stores hold \[6, 8, 20\]"):
        pretrain_clip.vision_of(config, (6, 8, 20))
    with pytest.raises(ValueError, match="give init or vision, not both"):
        config_of(tmp_path, store, f"init={output}")


@pytest.mark.integration
def test_another_configuration_does_not_go_on_in_the_same_folder(trained, store):
    _, output, _ = trained
    other = config_of(output.parent, store, "data.text={drop: 0.5}")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        main(other, resume=True)


@pytest.mark.integration
def test_a_frozen_tower_lends_its_eyes(trained, tmp_path, store):
    _, output, _ = trained
    frozen = (f"init={output}", "vision=null", "learn_vision=frozen", "data.looks=2", "volume_hidden=16")
    scores = main(config_of(tmp_path, store, *frozen, "optim.weight_decay=0.1", "loss.chunk=1"))
    assert scores["report"]["volume_to_text/R@1"] == 1.0
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (output, tmp_path / "run"))
    tower = [name for name in before if name.startswith("vision_tower.")]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    pair = load_pair(tmp_path / "run" / "model")
    assert pair.model.volume_reader[0].weight.shape == (16, 16)


def test_looks_are_for_a_tower_that_stands_still(tmp_path, store):
    with pytest.raises(ValueError, match="needs a tower that has learned; give init"):
        config_of(tmp_path, store, "learn_vision=frozen")
    with pytest.raises(ValueError, match=r"data.looks=4 is for a tower that stands still"):
        config_of(tmp_path, store, "data.looks=4")
    given = ("init=elsewhere", "vision=null", "learn_vision=frozen", "data.looks=4")
    for engine in ("zero3", "fsdp"):
        with pytest.raises(ValueError, match=rf"data.looks with engine={engine}"):
            config_of(tmp_path, store, *given, f"engine.name={engine}")


def test_what_cannot_be_is_refused_before_anything_is_built(tmp_path, store):
    with pytest.raises(ValueError, match=r"2 micro-batches of 1 on 1 processes, .* loss.chunk"):
        main(config_of(tmp_path, store, "optim.micro_batch=1"))
    with pytest.raises(ValueError, match=r"data.stores is empty"):
        load_config(Config, tmp_path / "clip.yaml", ["data.stores=[]"])
    with pytest.raises(ValueError, match=r"unknown key 'temperature'"):
        config_of(tmp_path, store, "loss.temperature=1")
    with pytest.raises(ValueError, match=r"data.tasks: reprot is no task; the tasks are retrieval, report"):
        config_of(tmp_path, store, "data.tasks=[report, reprot]")
    with pytest.raises(ValueError, match=r"best='MMR' is none of what the evaluation measures: MRR, R@1"):
        main(config_of(tmp_path, store, "best=MMR"))
    with pytest.raises(ValueError, match=r"optim.seed=3 would be passed over: set seed=3"):
        config_of(tmp_path, store, "optim.seed=3")
    with pytest.raises(ValueError, match="fewer than two of its images"):
        main(config_of(tmp_path, store, "data.judged=validation"))


def test_stores_prepared_otherwise_are_refused(tmp_path, store):
    other = small_store.build(tmp_path / "other")
    path = other / "preprocess.json"
    path.write_text(path.read_text().replace("255", "300"))
    with pytest.raises(ValueError, match="were prepared differently"):
        main(config_of(tmp_path, store, f"data.stores=[{store}, {other}]"))


def test_the_summary_is_the_mean_of_tasks_and_directions():
    half = {"R@1": 0.5, "R@5": 1.0, "MRR": 0.75, "mean_rank": 2.0}
    none = {"R@1": 0.0, "R@5": 0.5, "MRR": 0.25, "mean_rank": 4.0}
    task = {f"volume_to_text/{k}": v for k, v in half.items()} | {f"text_to_volume/{k}": v for k, v in none.items()}
    task |= {"chance/R@5": 0.25, "token_spread": 0.7}
    assert summary({"report": task, "retrieval": task}) == {
        "R@1": 0.25, "R@5": 0.75, "MRR": 0.5, "mean_rank": 3.0, "chance_R@5": 0.25, "token_spread": 0.7,
    }  # fmt: skip


def test_the_published_sizes_are_the_defaults(store):
    config = Config(data=pretrain_clip.PairsConfig(stores=(str(store),)))
    vision = pretrain_clip.VisionSizes().config((32, 256, 256))
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (768, 12, [4, 16, 16])
    assert (config.optim.lr, config.optim.batch, config.optim.epochs) == (1e-4, 48, 100)
    assert (config.text.max_length, config.loss.kind) == (128, "infonce")
