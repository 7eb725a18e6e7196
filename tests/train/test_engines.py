"""Engines: what each needs and refuses, and that N processes do what one does, to the last losses after a kill."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from m3d.train import engines
from m3d.train.checkpoints import held
from m3d.train.engines import Engine, check, deepspeed_config, launch, prepare, running
from m3d.train.optim import OptimConfig
from tests.train.toy_run import Toy, build

ROOT = Path(__file__).parents[2]
CONFIG = OptimConfig(steps=6, batch=8, micro_batch=2)
COMPARED = ("step", "loss", "text", "dice", "grad_norm", "lr", "lr/vision_tower")
needs_deepspeed = pytest.mark.skipif(
    engines.importlib.util.find_spec("deepspeed") is None, reason="deepspeed comes with the extra [train]"
)


@pytest.fixture
def environment(monkeypatch):
    """None of the variables of a launcher."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def rows(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in COMPARED} for row in read]


def start(output: Path, *given: str, processes: int) -> subprocess.Popen:
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    own = {"TORCH_EXTENSIONS_DIR": str(output.parent / "extensions"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *many, "-m", "tests.train.toy_run", str(output), *given]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stderr=subprocess.PIPE, text=True)


def run(output: Path, *given: str, processes: int = 2) -> None:
    process = start(output, *given, processes=processes)
    try:
        _, said = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, said[-3000:]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL it and all that it started: torchrun's processes are in sessions of their own and would live on."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()
    psutil.wait_procs(family[:-1], timeout=10)


def kill_after(output: Path, lines: int, *given: str, processes: int) -> None:
    """SIGKILL all processes of a run once it has logged so many steps."""
    process, log = start(output, *given, processes=processes), output / "losses.jsonl"
    until = time.monotonic() + 240
    try:
        while not log.is_file() or len(log.read_text().splitlines()) < lines:
            assert process.poll() is None and time.monotonic() < until, "it ended, or never got there"
            time.sleep(0.01)
    finally:
        kill(process)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process over the same global batches."""
    output = tmp_path_factory.mktemp("single") / "run"
    build(output).fit()
    return output


def same_weights(one: Path, other: Path, atol: float = 1e-5) -> None:
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=atol, msg=name)


def matches(alone: Path, output: Path, engine: str) -> None:
    """Losses, norms and rates of every step, the engine that ran, and the weights that were saved."""
    assert (output / "engine.txt").read_text() == engine
    assert len(rows(alone)) == 6
    for one, other in zip(rows(alone), rows(output), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    same_weights(alone / "model" / "weights.pt", output / "model" / "weights.pt")


@pytest.mark.slow
def test_two_ddp_processes_do_what_one_does(alone, tmp_path):
    run(tmp_path / "run", "engine=ddp")
    matches(alone, tmp_path / "run", "ddp")


def settings(folder: Path, stage: int, *, keep: int) -> Path:
    """DeepSpeed's, where parameters above ``keep`` numbers are in pieces, however small."""
    path = folder / "deepspeed.json"
    own = {"stage3_param_persistence_threshold": keep} if stage == 3 else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 20, **own}}))
    return path


@pytest.mark.slow
@needs_deepspeed
def test_the_whole_model_does_under_zero3_what_it_does_alone(tmp_path):
    given = ("model=m3d", "steps=3", "lr=0.003")
    run(tmp_path / "alone", *given, processes=1)
    run(tmp_path / "zero3", *given, "engine=zero3", f"deepspeed={settings(tmp_path, 3, keep=100)}")
    assert (tmp_path / "zero3" / "engine.txt").read_text() == "zero3"
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "zero3"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    # A few weights of its convolutions have gradients as small as Adam's epsilon, 1e-8, so that rounding shows there;
    # the others move by 5e-3 in the first step.
    same_weights(tmp_path / "alone" / "model" / "weights.pt", tmp_path / "zero3" / "model" / "weights.pt", atol=2e-4)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_zero_processes_do_what_one_does_and_survive_a_kill(alone, tmp_path, engine):
    given = (f"engine={engine}", f"deepspeed={settings(tmp_path, int(engine[-1]), keep=0)}")
    run(tmp_path / "whole", *given)
    matches(alone, tmp_path / "whole", engine)
    kill_after(tmp_path / "cut", 3, *given, "wait=0.05", processes=2)
    assert not (tmp_path / "cut" / "checkpoint-6").exists()
    run(tmp_path / "cut", *given, "resume=true")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_with_lora_dropout_and_workers_goes_on_bit_by_bit(tmp_path):
    given = ("dropout=0.3", "lora=true", "workers=1", "steps=9", "save_every=3")
    run(tmp_path / "whole", *given, processes=1)
    kill_after(tmp_path / "cut", 5, *given, "wait=0.05", processes=1)
    (tmp_path / "cut" / "losses.jsonl").open("a").write(
        '{"step": 6, "lo'
    )  # as a kill in the middle of a line leaves it
    run(tmp_path / "cut", *given, "resume=true", processes=1)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 10))
    one, other = (torch.load(tmp_path / run / "model" / "weights.pt") for run in ("whole", "cut"))
    assert any("lora_A" in name for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_native_sharding_does_what_one_process_does(alone, tmp_path):
    run(tmp_path, "natively")
    for number in (0, 1):
        found = json.loads((tmp_path / f"rank{number}.json").read_text())
        assert found["engine"] == "fsdp"
        for one, other in zip(rows(alone), found["losses"], strict=True):
            assert other == pytest.approx({name: one[name] for name in other}, rel=1e-5)
    same_weights(alone / "model" / "weights.pt", tmp_path / "weights.pt")


def test_an_output_belongs_to_one_run_at_a_time(tmp_path):
    holder = "import sys, time; from m3d.train.checkpoints import held; from pathlib import Path\n"
    holder += "with held(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    try:
        with pytest.raises(ValueError, match="another process is training into it"):
            build(tmp_path).fit()
    finally:
        process.kill()
        process.communicate()
    with held(tmp_path):
        pass  # a process that was killed holds nothing


def test_what_cannot_run_here_is_said_in_a_line(environment, tmp_path):
    with pytest.raises(ValueError, match=r"fsdp needs GPUs.*zero3 or ddp"):
        prepare(Engine(name="fsdp", device="cpu"))
    with pytest.raises(ValueError, match="ddp needs processes: start it with --nproc"):
        prepare(Engine(name="ddp", device="cpu"))
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="single is one process, but 2 were started"):
        prepare(Engine(device="cpu"))
    environment.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        prepare(Engine(device="cuda"))


def test_zero_without_deepspeed_names_the_extra(environment):
    environment.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"m3d-lamed\[train\]"):
        prepare(Engine(name="zero2", device="cpu"))


@needs_deepspeed
def test_bf16_under_zero_on_the_cpu_is_refused(environment, tmp_path):
    config = OptimConfig(steps=1, batch=1, bf16=True)
    environment.setenv("RANK", "0")
    with pytest.raises(ValueError, match="bf16 with engine=zero2 needs a GPU"):
        engines.arguments(Engine(name="zero2", device="cpu"), config, tmp_path, nn.Linear(1, 1))


def test_a_silent_fall_back_is_an_error():
    with pytest.raises(RuntimeError, match="engine=zero3 was asked for, but Trainer made single of it"):
        check(Engine(name="zero3"), nn.Linear(1, 1))
    check(Engine(), nn.Linear(1, 1))
    assert running(nn.DataParallel(nn.Linear(1, 1))) == "DataParallel"


def test_deepspeed_settings_take_batch_clip_and_precision_from_the_recipe(tmp_path):
    path = tmp_path / "zero2.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
            }
        )
    )
    made = deepspeed_config(Engine(name="zero2", deepspeed=str(path)), CONFIG, 4)
    assert "train_batch_size" not in made
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"] == {"enabled": False}
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}


def test_deepspeed_files_that_contradict_the_recipe_are_refused(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match="is of ZeRO stage 2, but engine=zero3"):
        deepspeed_config(Engine(name="zero3", deepspeed=str(path)), CONFIG, 1)
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Lamb"}}))
    with pytest.raises(ValueError, match="sets 'optimizer', which is the recipe's"):
        deepspeed_config(Engine(name="zero3", deepspeed=str(path)), CONFIG, 1)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        deepspeed_config(Engine(name="zero3", deepspeed=str(path)), CONFIG, 1)


def test_fsdp_shards_the_layers_that_models_name():
    class Layer(nn.Module):
        pass

    class Model(nn.Module):
        _no_split_modules = ("Layer", "NotHere")

        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

    made = engines._fsdp_config(nn.ModuleList([Model()]))
    assert made["transformer_layer_cls_to_wrap"] == ["Layer"]
    assert engines._fsdp_config(Toy())["auto_wrap_policy"] == "NO_WRAP"


@pytest.mark.slow
def test_launch_runs_a_module_in_processes_and_gives_its_status(capfd):
    code = launch("timeit", ["-n1", "-r1", "-s", "import os", "print('I am ' + os.environ['RANK'])"], processes=2)
    said = capfd.readouterr().out
    assert code == 0 and "I am 0" in said and "I am 1" in said
    assert launch("timeit", ["-n1", "-r1", "raise SystemExit(3)"], processes=1) == 1
