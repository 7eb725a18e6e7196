"""`m3d train`: what is wrong is told in seconds, a dry run says what is needed, and arguments reach the recipe."""

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from m3d.cli import train as command
from m3d.config import config_root, load_config
from m3d.recipes import registry
from m3d.recipes.dry_run import plan
from m3d.recipes.plan import Plan
from m3d.recipes.preflight import check, stores_of
from m3d.recipes.registry import STAGES, recipe, stage_of
from m3d.train import engines
from m3d.train.estimate import MACHINES
from tests.fixtures import small_store

SHIPPED = sorted(path for name in ("lamed", "tiny", "smol") for path in config_root().glob(f"{name}/*.yaml"))
MODELS = {  # parameters of the language models as their publishers give them, tied tables once
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
}
ROWS = {"llama-2-7b": 4 * 2 * 4096, "llama-3.1-8b": 4 * 2 * 4096}  # what our tokens add where the tables are full
INSTRUCT = {
    "llama-2-7b": "instruct", "llama-3.1-8b": "instruct-llama3.1-8b", "qwen2.5-7b": "instruct-qwen2.5-7b",
    "phi-3-mini": "instruct-phi-3-mini", "phi-4-mini": "instruct-phi-4-mini",
}  # fmt: skip


@lru_cache
def planned(name: str, *overrides: str, folder: str = "lamed") -> Plan:
    path = config_root() / folder / f"{name}.yaml"
    return plan(load_config(recipe(stage_of(path)).Config, path, overrides), path)


# -- shipped configs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_loads_and_plans(path):
    config, found = load_config(recipe(stage_of(path)).Config, path), planned(path.stem, folder=path.parent.name)
    assert found.stage == config.stage == stage_of(path)
    assert [verdict.machine for verdict in found.verdicts] in ([], list(MACHINES))
    assert all(number > 0 for verdict in found.verdicts for number in (verdict.memory.total, verdict.setup.gpus))


@pytest.mark.parametrize("name", MODELS)
def test_all_language_models_dry_run_with_their_published_size(name):
    found = planned(INSTRUCT[name])
    parts = {part.name: part for part in found.parts}
    assert parts["language_model"].total == MODELS[name] + ROWS.get(name, 0)
    assert parts["language_model"].how == "lora" and parts["language_model"].trainable == 0
    assert parts["vision_tower"].trainable == 87_389_184
    assert {verdict.machine for verdict in found.verdicts if verdict.fits} >= {"8xA100-80GB", "8xH200"}


@pytest.mark.parametrize(
    ("name", "values"),
    [  # rank 16 on every linear layer of a layer: 16 (in + out)
        ("llama-2-7b", 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
        ("llama-3.1-8b", 32 * 16 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))),
        ("qwen2.5-7b", 28 * 16 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))),
        ("phi-3-mini", 32 * 16 * ((3072 + 3 * 3072) + 2 * 3072 + (3072 + 2 * 8192) + (8192 + 3072))),
        ("phi-4-mini", 32 * 16 * ((3072 + 5120) + 2 * 3072 + (3072 + 2 * 8192) + (8192 + 3072))),
    ],
)
def test_lora_has_the_values_of_its_rank(name, values):
    parts = {part.name: part for part in planned(INSTRUCT[name]).parts}
    assert parts["lora"].trainable == values
    tables = 1 if name == "phi-4-mini" else 2  # tied tables share the rows of our tokens
    width = {"qwen2.5-7b": 3584, "phi-3-mini": 3072, "phi-4-mini": 3072}.get(name, 4096)
    assert parts["new_tokens"].trainable == 4 * tables * width


def test_the_published_clip_has_the_published_values():
    found = planned("pretrain_clip")
    pooler = 768 * 768 + 768  # BERT's, which nothing uses and we leave out
    assert found.total == found.trainable == 198_052_609 - pooler


def test_the_instruct_config_differs_from_the_release_by_what_is_named():
    parts = {part.name: part for part in planned("instruct").parts}
    release = 6_983_027_792
    norm = 2 * 192 * (16 * 32 * 32) - 2 * 192  # ours is over channels alone
    pens = 3 * (2 * (768 * 768 + 768) + 768 * 96 + 96)  # one mask of four
    tokens, quality = 3 * 768, 3 * (256 + 1)
    buffer, dead = 1_152, 13_388  # no parameter; 2-D convolutions that can never run
    added = parts["lora"].total + parts["new_tokens"].total
    total = sum(part.total for part in parts.values())
    mask_prompt = total - added - (release - norm - pens - tokens - quality - buffer - dead)
    small, large = 4, 16  # our mask prompt: three convolutions with norms, of 1 -> 4 -> 16 -> 768 channels
    assert mask_prompt == (8 * small + small) + 2 * small + (8 * small * large + large) + 2 * large + (
        large * 768 + 768
    )


def test_profiles_do_what_their_names_say():
    small = {verdict.machine: verdict for verdict in planned("instruct-1x24gb").verdicts}["1x24GB"]
    assert small.fits and small.setup.micro_batch == 1 and small.setup.checkpointing
    assert small.setup.accumulation * small.setup.micro_batch == planned("instruct").batch
    large = planned("instruct-8xh200")
    assert large.verdicts[1].fits and large.reading.tokens > planned("instruct").reading.tokens
    whole = planned("instruct", "parts.language_model=full", "saved=whole")
    small = {verdict.machine: verdict for verdict in whole.verdicts}["1x24GB"]
    assert not small.fits and whole.trainable > 6_900_000_000


@pytest.mark.parametrize("path", sorted(config_root().glob("engines/*.json")), ids=lambda path: path.stem)
def test_engine_files_are_what_the_engines_read(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    engine = engines.Engine(name=path.stem.partition("-")[0], deepspeed=f"engines/{path.name}")
    made = engines.deepspeed_config(engine, engines.OptimConfig(steps=1, batch=8, micro_batch=2, bf16=True), 4)
    assert made["zero_optimization"]["stage"] == engine.zero_stage
    assert "auto" not in json.dumps(values) and not {"train_batch_size", "optimizer", "scheduler"} & set(values)
    offloads = "offload_optimizer" in values["zero_optimization"]
    assert offloads == ("offload" in path.stem)
    assert values.get("zero_force_ds_cpu_optimizer", True) != offloads  # torch's AdamW, nothing to compile
    assert ("cpu" in path.stem) != values["zero_optimization"]["overlap_comm"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_tables(run):
    code, out, err = run("train", "configs/lamed/instruct.yaml", "--dry-run")
    assert code == 0 and err == ""
    for said in ("language_model", "6,738,448,384", "39,976,960", "8xA100-80GB", "fits", "not there yet", "gradients"):
        assert said in out


def test_a_dry_run_is_one_json_document(run):
    code, out, _ = run("train", "configs/lamed/align-qwen2.5-7b.yaml", "--dry-run", "--json", "optim.micro_batch=1")
    found = json.loads(out)
    assert code == 0 and found["stage"] == "align" and found["trainable"] < 25_000_000
    assert found["verdicts"][0]["setup"]["micro_batch"] == 1
    assert found["reading"]["volume_tokens"] == 256


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.warm=1"], "unknown key 'warm'; did you mean 'warmup'"),
        (["optim.lr=fast"], "optim.lr='fast'"),
        (["stage=instrukt"], "did you mean 'instruct'"),
        (["--set", "data.weight={}"], "did you mean 'weights'"),
        ([], "stores/m3d: no store there (store.json)"),
        (["--nproc", "0"], "--nproc 0 must be 1 or more"),
        (["--nproc", "3"], "optim.batch=16 must be a multiple"),
        (["--engine", "zero2", "engine.deepspeed=engines/zero9.json"], "engine.deepspeed=engines/zero9.json: no such"),
        (["--engine", "single", "--nproc", "2"], "engine=single is one process"),
        (["init.checkpoint=null", "init.language_model=nowhere", "--dry-run"], "nowhere: no such folder"),
        (["init.checkpoint=nowhere", "--dry-run"], "init.checkpoint=nowhere: no such folder"),
        (["saved=half"], "saved='half'"),
        (["data.max_tokens=260", "--dry-run"], "leave 3 tokens of text beside the 256 of a volume"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_a_model_is_built(run, monkeypatch, words, said):
    monkeypatch.setattr("m3d.models.modeling.M3DForConditionalGeneration.__init__", lambda *_: pytest.fail("built"))
    code, out, err = run("train", "configs/lamed/instruct.yaml", *words)
    assert (code, out) == (1, "") and said in err and err.count("\n") == 1


def test_a_file_without_a_stage_or_no_file_is_said(run, tmp_path):
    (tmp_path / "x.yaml").write_text("output: here")
    assert "has no `stage:`; add one of pretrain_clip" in run("train", tmp_path / "x.yaml")[2]
    assert "no such config" in run("train", tmp_path / "y.yaml")[2]


def store(folder: Path, grid: tuple[int, int, int] = (8, 16, 16)) -> Path:
    from data_prep.preprocess import Preprocess, Window

    folder.mkdir(parents=True)
    Preprocess(grid=grid, intensity=Window(0, 1)).write(folder)
    (folder / "store.json").write_text(json.dumps({"format": "m3d.store/1", "kept": "uint8"}))
    for name in ("images.jsonl", "records.jsonl"):
        (folder / name).write_text("")
    return folder


def language_model(folder: Path) -> Path:
    LlamaConfig(vocab_size=8).save_pretrained(folder)
    return folder


def test_folders_are_looked_into(tmp_path):
    path, one = config_root() / "lamed" / "align.yaml", store(tmp_path / "one")

    def look(*overrides: str) -> None:
        given = [f"data.stores=[{one}]", "engine.name=single", "init.segvol=null", *overrides]
        check(load_config(recipe("align").Config, path, given))

    with pytest.raises(ValueError, match=r"init\.language_model=language_models/llama-2-7b has sizes alone"):
        look()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it"):
        look(f"init.language_model={tmp_path}")
    folder = tmp_path / "lm"
    LlamaConfig(vocab_size=8).save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        look(f"init.language_model={folder}")
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"init\.vision_tower=runs/lamed/pretrain_clip: no such folder"):
        look(f"init.language_model={folder}")
    look(f"init.language_model={folder}", "init.vision_tower=null")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing \(1 of 2 files\)"):
        look(f"init.language_model={folder}")
    with pytest.raises(ValueError, match="were prepared differently"):
        look(f"data.stores=[{one}, {store(tmp_path / 'two', (8, 16, 32))}]")


def test_a_chain_needs_what_no_stage_before_makes(tmp_path):
    path, one = config_root() / "lamed" / "chain.yaml", store(tmp_path / "one")
    config = recipe("chain").Config

    def look(shared: str) -> None:
        given = f"shared={{data.stores: [{one}], {shared}}}"
        check(load_config(config, path, [f"root={tmp_path}", given]), 8)

    with pytest.raises(ValueError, match=r"text\.source=language_models/bert-base has sizes alone"):
        look("seed: 1")
    folder = tmp_path / "lm"
    LlamaConfig(vocab_size=8).save_pretrained(folder)
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"init\.language_model=.*llama-2-7b has sizes alone"):
        look(f"text.source: {folder}")
    look(f"text.source: {folder}, init.language_model: {folder}, language_model: {folder}")
    assert plan(load_config(config, path, [f"root={tmp_path}"]), path).stages[3].total == planned("instruct").total
    found = planned("chain")
    assert [stage.stage for stage in found.stages] == [
        "pretrain_clip", "pretrain_segvol", "align", "instruct", "merge"
    ]  # fmt: skip


def test_a_store_says_grid_mix_lengths_and_steps(tmp_path):
    path, root = config_root() / "lamed" / "align.yaml", small_store.build(tmp_path / "store")
    given = [f"data.stores=[{root}]", "init.vision_tower=null", "init.segvol=null", "optim.batch=2"]
    given += ["init.vision={width: 48, layers: 1, heads: 2, patch: [3, 4, 5]}", "optim.epochs=10", "init.pool=1"]
    given += ["optim.micro_batch=1"]
    found = plan(load_config(recipe("align").Config, path, given), path)
    shown = [line for line in (root / "records.jsonl").read_text().splitlines() if '"mini/b' not in line]
    by_task = {row.task: row for row in found.mix}
    assert sum(row.records for row in found.mix) == len(shown)
    assert (found.images, found.steps, found.epochs) == (2, 10, 10.0)  # two training images, two a step
    assert by_task["report"].records == by_task["report"].images == 2 and by_task["report"].weight == 1
    assert found.reading.volume_tokens == 2 * 2 * 2 and "estimated from" in found.reading.estimated_from
    assert 4 * 16 < found.reading.words < 512


def test_a_contrastive_step_is_not_accumulated(tmp_path):
    path = config_root() / "lamed" / "pretrain_clip.yaml"
    config = load_config(recipe("pretrain_clip").Config, path, [f"data.stores=[{store(tmp_path / 'one')}]"])
    with pytest.raises(ValueError, match=r"set optim\.micro_batch=12"):
        check(config, processes=4)
    assert stores_of(config) == [tmp_path / "one"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """A recipe that remembers how it was called, and a launcher that starts nothing."""
    made: list = []
    real = recipe("merge")
    fake = SimpleNamespace(Config=real.Config, main=lambda config, *, resume: made.append((config, resume)))
    monkeypatch.setattr(command, "recipe", lambda stage: fake if stage == "merge" else recipe(stage))
    monkeypatch.setattr("m3d.recipes.preflight.check", lambda config, processes: made.append(("checked", processes)))
    monkeypatch.setattr(engines, "launch", lambda *words, processes: made.append((words, processes)) or 7)
    return made


def test_arguments_reach_the_recipe(run, calls, tmp_path):
    code, _, err = run(
        "train", "configs/lamed/merge.yaml", "dtype=float16", "--resume", "--out", tmp_path, "--set", "notes={a: b}"
    )
    (checked, one), (config, resume) = calls
    assert (code, err, checked, one, resume) == (0, "", "checked", 1, True)
    assert (config.dtype, config.output, config.notes) == ("float16", str(tmp_path), {"a": "b"})


def test_many_processes_are_launched_with_the_same_words(run, calls):
    code, _, err = run(
        "train", "configs/lamed/instruct.yaml", "seed=1", "--nproc", "4", "--engine", "zero3", "--resume"
    )
    (checked, four), (words, processes) = calls
    assert (code, err, checked, four, processes) == (7, "", "checked", 4, 4)
    engine = ["engine.name=zero3", "engine.deepspeed=engines/zero3-8xa100.json"]
    assert words == ("m3d.cli", ["train", "configs/lamed/instruct.yaml", "seed=1", *engine, "--resume"])


def test_many_processes_without_an_engine_copy_the_model(run, calls):
    _, _, err = run("train", "configs/lamed/instruct-1x24gb.yaml", "--nproc", "2")
    assert "engine=ddp, a copy of the model in each process" in err
    assert "engine.name=ddp" in calls[-1][0][1]


def test_a_launcher_inside_a_launcher_is_refused(run, calls, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave --nproc out" in run("train", "configs/lamed/instruct.yaml", "--nproc", "2")[2]
    assert calls == []


def test_a_loss_that_explodes_is_one_line(run, calls, monkeypatch):
    def explode(config: object, *, resume: bool) -> None:
        raise FloatingPointError("loss is nan at step 3; ids: a, b")

    fake = SimpleNamespace(Config=recipe("merge").Config, main=explode)
    monkeypatch.setattr(command, "recipe", lambda stage: fake)
    assert run("train", "configs/lamed/merge.yaml")[::2] == (1, "m3d: error: loss is nan at step 3; ids: a, b\n")


def test_every_stage_has_a_recipe():
    for stage in STAGES:
        module = recipe(stage)
        assert module.Config.__dataclass_params__.frozen and callable(module.main)
    with pytest.raises(ValueError, match="did you mean 'align'"):
        registry.recipe("aling")
