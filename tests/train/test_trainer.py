"""The trainer in one process: its losses against a loop written by hand, its checkpoints, and how it stops."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch import nn

from m3d.train import checkpoints, trainer
from m3d.train.normalised import Normalised
from m3d.train.objective import Loss
from m3d.train.optim import OptimConfig, parameter_groups, part_of
from m3d.train.slices import Slices, seed_step
from m3d.train.trainer import M3DTrainer
from tests.train.toy_run import Items, Toy, build, collate
from tests.train.toy_talk import small_talk

LOSSES = ("step", "loss", "text", "dice", "bce", "prompted", "grad_norm")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def make(output, objective=None, *, data=None, **given):
    settings = {"steps": 4, "batch": 4, "micro_batch": 2, "save_every": 2, "lr": 0.05, "warmup": 0}
    more = {name: given.pop(name) for name in ("save", "evaluate", "best", "measures") if name in given}
    torch.manual_seed(0)
    return M3DTrainer(objective or Toy(), data or Items(21), collate, OptimConfig(**settings | given), output, **more)


def test_losses_and_norms_are_those_of_a_loop_by_hand(tmp_path):
    build(tmp_path / "run").fit()
    torch.manual_seed(0)
    model, data = Toy(), Items(21)
    slow = [*model.model["vision_tower"].parameters()]
    embedding = model.model["language_model"]["embed"].weight
    others = [model.model["language_model"]["head"], model.model["seg_head"]]
    groups = [
        {"params": [slow[0]], "lr": 0.01},
        {"params": slow[1:], "lr": 0.01, "weight_decay": 0.0},  # bias and norm
        {"params": [embedding, *(part.bias for part in others)], "weight_decay": 0.0},
        {"params": [part.weight for part in others]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    factors = [0.5, 1.0, 1.0, *((1 + math.cos(math.pi * left)) / 2 for left in (0.25, 0.5, 0.75))]
    for step, row in enumerate(rows(tmp_path / "run")):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factors[step]
        losses = model(collate([data[(8 * step + k) % 21] for k in range(8)]))  # all eight at once
        text = losses["text"].total / sum(2 + (8 * step + k) % 21 * 7 % 6 for k in range(8))
        dice = losses["dice"].total / sum((8 * step + k) % 21 % 3 == 0 for k in range(8))
        loss = text + 0.5 * dice
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert row["step"] == step + 1
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["text"] == pytest.approx(text.item(), rel=1e-5)
        assert row["dice"] == pytest.approx(dice.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["lr/vision_tower"] == pytest.approx(0.01 * factors[step])
        assert row["lr"] == row["lr/seg_head"] == pytest.approx(0.05 * factors[step])


def test_accumulation_changes_nothing(tmp_path):
    build(tmp_path / "many", micro_batch="1").fit()
    build(tmp_path / "one", micro_batch="8").fit()
    for one, many in zip(rows(tmp_path / "one"), rows(tmp_path / "many"), strict=True):
        assert [many[k] for k in ("loss", "text", "dice")] == pytest.approx([one[k] for k in ("loss", "text", "dice")])


def test_a_loss_of_nothing_is_no_loss():
    class Nothing(nn.Module):
        def forward(self, batch):
            return {"text": Loss(torch.tensor(6.0), "text"), "dice": Loss(torch.tensor(0.0), "masks", 2.0)}

    out = Normalised(Nothing())({}, {"text": 3, "masks": 0}, 2)
    assert out["loss"] == 4.0 and out["text"] == 2.0 and "dice" not in out
    with pytest.raises(ValueError, match="loss 'dice' is per 'masks', which batch"):
        Normalised(Nothing())({}, {"text": 3}, 1)


def test_ranks_share_out_every_step_in_order():
    shares = [list(Slices(10, steps=2, batch=8, micro_batch=2, rank=rank, world=2)) for rank in (0, 1)]
    assert shares[0] == [[0, 1], [2, 3], [8, 9], [0, 1]]  # 8 and 9 are the last: then it begins again
    assert shares[1] == [[4, 5], [6, 7], [2, 3], [4, 5]]
    assert len(Slices(10, steps=2, batch=8, micro_batch=2, rank=0, world=2)) == 4


def test_every_step_and_process_draws_its_own_numbers():
    drawn = []
    for place in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0), (0, 1, 0)]:
        seed_step(*place)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[-1] and len(set(drawn)) == 4


def test_parts_by_name_and_what_never_decays():
    assert part_of("objective.model.base_model.vision_tower.blocks.0.norm.weight") == "vision_tower"
    assert part_of("model.language_model.model.embed_tokens.learned") == "new_tokens"
    assert part_of("model.seg_head.vision_tower.weight") == "vision_tower"
    assert part_of("log_scale") == "other"
    config = OptimConfig(lr=1.0, lr_by_part={"vision_tower": 0.5}, weight_decay=0.1, steps=1)
    groups = {(g["part"], g["weight_decay"]): (g["lr"], len(g["params"])) for g in parameter_groups(Toy(), config)}
    assert groups == {
        ("language_model", 0.0): (1.0, 2),  # embedding, bias
        ("language_model", 0.1): (1.0, 1),
        ("seg_head", 0.0): (1.0, 1),
        ("seg_head", 0.1): (1.0, 1),
        ("vision_tower", 0.0): (0.5, 3),  # bias, norm's weight and bias
        ("vision_tower", 0.1): (0.5, 1),
    }


def test_a_rate_is_that_of_a_part_which_may_stand_still():
    toy = Toy()
    toy.model["vision_tower"].requires_grad_(False)
    groups = parameter_groups(toy, OptimConfig(lr=1.0, lr_by_part={"vision_tower": 0.5}, steps=1))
    assert groups and not any(group["part"] == "vision_tower" for group in groups)


def test_a_rate_of_no_part_is_refused():
    config = OptimConfig(lr_by_part={"vision_towre": 1e-5}, steps=1)
    with pytest.raises(ValueError, match="vision_towre: there is no such part; there is vision_tower"):
        parameter_groups(Toy(), config)
    with pytest.raises(ValueError, match="nothing would learn"):
        parameter_groups(Toy().requires_grad_(False), config)


def test_schedules():
    cosine = OptimConfig(steps=10, warmup=0.2, floor=0.1)
    assert [cosine.rate(step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    linear = OptimConfig(steps=10, warmup=2, schedule="linear")
    assert [linear.rate(step, 10) for step in (0, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert OptimConfig(steps=10, warmup=0, schedule="constant").rate(9, 10) == 1.0


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"optim.steps or optim.epochs"):
        OptimConfig()
    with pytest.raises(ValueError, match="micro_batch=3 must divide"):
        OptimConfig(steps=1, batch=8, micro_batch=3)
    with pytest.raises(ValueError, match="micro_batch=2 times 3 processes; the nearest is 6"):
        OptimConfig(steps=1, batch=8, micro_batch=2).accumulate(3)
    assert OptimConfig(epochs=2, batch=8).num_steps(21) == 3


def test_what_compares_a_whole_batch_does_not_accumulate(tmp_path):
    objective = Toy()
    objective.whole_batch = True
    with pytest.raises(ValueError, match=r"compares all items of a batch.*micro_batch to 4"):
        make(tmp_path, objective)


@pytest.mark.parametrize(("scale", "why"), [("nan", "not finite"), ("1e9", "times the usual")])
def test_a_bad_loss_stops_before_anything_moves(tmp_path, monkeypatch, scale, why):
    monkeypatch.setattr(trainer, "SETTLED", 2)
    bad = make(tmp_path, data=Items(40, scales={12: float(scale)}), save_every=3, steps=9)
    with pytest.raises(FloatingPointError, match=rf"step 4: .*{why}.*stopped\.json"):
        bad.fit()
    facts = json.loads((tmp_path / "stopped.json").read_text())
    assert facts["step"] == 4 and why in facts["why"]
    culprit = next(batch for batch in facts["batches"] if not batch["losses"]["dice"] < 1e6)
    assert culprit["ids"] == ["case/12", "case/13"]
    assert len(rows(tmp_path)) == 3
    assert [found.name for found in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    stored = checkpoints.load_file(tmp_path / "checkpoint-3" / "learned.safetensors")
    assert all(torch.equal(value, bad.objective.state_dict()[name]) for name, value in stored.items())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Root(Toy):
        def forward(self, batch):
            nothing = self.model["seg_head"].weight.sum() * 0
            return {"text": Loss(nothing.sqrt(), "text")}  # 0, of infinite slope

    root = make(tmp_path, Root())
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        root.fit()
    assert all(value.isfinite().all() for value in root.objective.state_dict().values())


def test_the_best_and_the_newest_are_kept(tmp_path):
    measured = iter([0.1, 0.7, 0.3, 0.2])
    saved = []

    def save(folder):
        saved.append(folder)
        (folder / "weights.txt").write_text(str(len(saved)))

    make(
        tmp_path,
        steps=4,
        save_every=1,
        keep=1,
        evaluate=lambda: {"dice": next(measured)},
        best="dice",
        save=save,
        measures={"dice": True},
    ).fit()
    assert sorted(found.name for found in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "model" / "weights.txt").read_text() == "2"  # of the best, the second
    assert len(saved) == 2
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [(json.loads(line)["step"], json.loads(line)["eval_dice"]) for line in lines] == [
        (1, 0.1),
        (2, 0.7),
        (3, 0.3),
        (4, 0.2),
    ]
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_a_new_best_between_checkpoints_is_saved(tmp_path):
    measured = iter([0.5, 0.9, 0.1, 0.1])
    make(
        tmp_path,
        save_every=4,
        eval_every=1,
        evaluate=lambda: {"text": next(measured)},  # a loss by another name: the lowest is the best
        best="text",
        keep=1,
        measures={"text": False},
    ).fit()
    assert sorted(found.name for found in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_measure_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match="best='dice' is none of what the evaluation measures: iou"):
        make(tmp_path, evaluate=lambda: {"iou": 1.0}, best="dice", measures={"iou": True})
    with pytest.raises(ValueError, match="needs an evaluation"):
        make(tmp_path, best="dice")


def test_runs_are_not_mixed_up(tmp_path):
    make(tmp_path).fit()
    with pytest.raises(ValueError, match="has checkpoints up to step 4: --resume, or another output"):
        make(tmp_path).fit()
    with pytest.raises(ValueError, match=r"optim.batch was 4, now 8; keep it"):
        make(tmp_path, batch=8).fit(resume=True)
    with pytest.raises(ValueError, match="of another model or of other trainable parts"):
        make(tmp_path, Toy(lora=True), steps=6).fit(resume=True)
    before = rows(tmp_path)
    make(tmp_path).fit(resume=True)  # it had come to its end
    assert rows(tmp_path) == before
    make(tmp_path, steps=6).fit(resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_pieces_are_put_together_as_they_were_cut(tmp_path):
    config = OptimConfig(steps=4)
    facts = {"engine": "zero3", "world": 4, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
    (tmp_path / checkpoints.MARKER).write_text(json.dumps(facts))
    last = checkpoints.Checkpoint(tmp_path, 2)
    checkpoints.check_same(last, "zero3", 4, config)
    with pytest.raises(ValueError, match="in 4 pieces; resume with --nproc 4"):
        checkpoints.check_same(last, "zero3", 2, config)
    with pytest.raises(ValueError, match="written by engine=zero3; resume with it, not with ddp"):
        checkpoints.check_same(last, "ddp", 4, config)
    (tmp_path / checkpoints.MARKER).write_text(json.dumps(facts | {"engine": "ddp"}))
    checkpoints.check_same(last, "single", 1, config)


def test_only_whole_checkpoints_count(tmp_path):
    make(tmp_path, keep=9, save_every=1, steps=3).fit()
    (tmp_path / "checkpoint-3" / "complete.json").unlink()
    (tmp_path / ".checkpoint-4.partial").mkdir()
    (tmp_path / "checkpoint-best").mkdir()  # not ours
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 2
    make(tmp_path, keep=9, save_every=1, steps=3).fit(resume=True)
    assert checkpoints.newest(tmp_path).step == 3
    assert not (tmp_path / ".checkpoint-4.partial").exists()
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.integration
@pytest.mark.slow
def test_the_model_with_lora_and_learned_rows_goes_on_bit_by_bit(tmp_path):
    def run(**more):
        objective, volumes, gather = small_talk(projector_dropout=0.5)
        config = OptimConfig(steps=2, batch=2, micro_batch=1, save_every=1, lr=1e-3)
        M3DTrainer(objective, volumes, gather, config, tmp_path).fit(**more)
        return checkpoints.load_file(tmp_path / "checkpoint-2" / "learned.safetensors")

    weights, losses = run(), rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = run(resume=True)
    assert any("lora_A" in name for name in weights) and any(name.endswith(".learned") for name in weights)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    for one, other in zip(losses, rows(tmp_path), strict=True):
        assert {name: one[name] for name in one if name in LOSSES} == {n: other[n] for n in other if n in LOSSES}


def test_checkpoints_hold_what_learns_and_no_frozen_weights(tmp_path):
    make(tmp_path, Toy(lora=True)).fit()
    stored = checkpoints.load_file(tmp_path / "checkpoint-4" / "learned.safetensors")
    assert any("lora_A" in name for name in stored)
    assert not any("base_layer" in name or "embed" in name for name in stored)


def test_bfloat16_on_the_cpu(tmp_path):
    seen = []

    class Seeing(Toy):
        def forward(self, batch):
            seen.append(self.model["seg_head"](torch.ones(1, 8)).dtype)
            return super().forward(batch)

    make(tmp_path, Seeing(), bf16=True, steps=1).fit()
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in checkpoints.learned(Toy()).values()} == {torch.float32}


def test_a_folder_takes_the_place_of_the_old_one_whole_or_not_at_all(tmp_path):
    with checkpoints.replacing(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(OSError, match="full"), checkpoints.replacing(tmp_path / "model") as folder:
        (folder / "a").write_text("2")
        raise OSError("disk full")
    assert (tmp_path / "model" / "a").read_text() == "1"
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two names
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
