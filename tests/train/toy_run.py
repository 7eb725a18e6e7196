"""A training run of seconds that a test starts in processes of its own: two losses, counted differently.

``python -m tests.train.toy_run OUTPUT key=value ...``; an item's length and whether it has a mask follow from its
index, so that processes and micro-batches get unequal counts.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import m3d  # noqa: F401  # the torchvision remedy, before transformers
from m3d.train.engines import Engine, at_hand, gather, leave, prepare, rank, running, whole_weights, world
from m3d.train.normalised import Normalised
from m3d.train.objective import Loss
from m3d.train.optim import OptimConfig, parameter_groups
from m3d.train.slices import Slices
from m3d.train.trainer import M3DTrainer

VOCABULARY, WIDTH = 11, 8


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.0, lora: bool = False) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "vision_tower": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
                "language_model": nn.ModuleDict(
                    {"embed": nn.Embedding(VOCABULARY, WIDTH), "head": nn.Linear(WIDTH, VOCABULARY)}
                ),
                "seg_head": nn.Linear(WIDTH, 1),
            }
        )
        self.dropout = nn.Dropout(dropout)
        if lora:
            from peft import LoraConfig, inject_adapter_in_model

            self.model["language_model"].requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=2, lora_dropout=dropout, target_modules=["head"]), self.model)
            for part in ("vision_tower", "seg_head"):
                self.model[part].requires_grad_(True)

    def forward(self, batch: dict) -> dict[str, Loss]:
        language = self.model["language_model"]
        seen = self.dropout(self.model["vision_tower"](language["embed"](batch["input_ids"])))
        logits, learned = language["head"](seen), batch["labels"]
        text = nn.functional.cross_entropy(logits.flatten(0, 1), learned.flatten(), ignore_index=-100, reduction="sum")
        real = (learned != -100)[..., None]
        pooled = (seen * real).sum(dim=1) / real.sum(dim=1)  # padding differs between micro-batches
        drawn = self.model["seg_head"](pooled)[batch["has_mask"], 0]
        masks = ((drawn - batch["truth"]) ** 2).sum() * batch["scale"]  # of no masks: 0, the head still in the graph
        return {"text": Loss(text, "text"), "dice": Loss(masks, "masks", 0.5)}


class Items(torch.utils.data.Dataset):
    def __init__(self, length: int, wait: float = 0.0, scales: dict[int, float] | None = None) -> None:
        self.length, self.wait, self.scales = length, wait, scales or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        time.sleep(self.wait)
        drawn = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCABULARY, (2 + index * 7 % 6,), generator=drawn)
        return {"index": index, "ids": ids, "mask": index % 3 == 0, "scale": self.scales.get(index, 1.0)}


def collate(items: list[dict]) -> dict:
    longest = max(len(item["ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), -100)
    for row, item in enumerate(items):
        ids[row, : len(item["ids"])] = item["ids"]
        labels[row, : len(item["ids"])] = (item["ids"] * 3 + 1) % VOCABULARY
    has_mask = torch.tensor([item["mask"] for item in items])
    return {
        "input_ids": ids,
        "labels": labels,
        "has_mask": has_mask,
        "truth": torch.tensor([float(item["index"] % 5) for item in items])[has_mask],
        "scale": torch.tensor(max(item["scale"] for item in items)),
        "ids": [f"case/{item['index']:02d}" for item in items],
        "counts": {
            "text": int((labels != -100).sum()),
            "tokens": int((labels != -100).sum()),
            "masks": int(has_mask.sum()),
            "volumes": len(items),
        },
    }


def build(output: Path, **given: str) -> M3DTrainer:
    engine = Engine(name=given.get("engine", "single"), device="cpu", deepspeed=given.get("deepspeed"))
    prepare(engine)
    torch.manual_seed(0)
    objective = Toy(float(given.get("dropout", 0)), lora=given.get("lora") == "true")
    config = OptimConfig(
        lr=float(given.get("lr", 0.05)),
        lr_by_part={"vision_tower": 0.01},
        steps=int(given.get("steps", 6)),
        warmup=2,
        batch=int(given.get("batch", 8)),
        micro_batch=int(given.get("micro_batch", 2)),
        save_every=int(given.get("save_every", 2)),
        bf16=given.get("bf16") == "true",
        workers=int(given.get("workers", 0)),
        keep=2,
    )
    scales = {int(given["broken"]): float(given.get("scale", "nan"))} if "broken" in given else None

    def save(folder: Path) -> None:
        torch.save({name: value.clone() for name, value in objective.state_dict().items()}, folder / "weights.pt")

    data = Items(int(given.get("length", 21)), float(given.get("wait", 0)), scales)
    if given.get("model") == "m3d":
        from tests.train.toy_talk import small_talk

        objective, *fed = small_talk()
        return M3DTrainer(objective, *fed, config, output, engine, save=save)
    return M3DTrainer(objective, data, collate, config, output, engine, save=save)


def shard_natively(output: Path) -> None:
    """The same steps under torch's own fully_shard: accelerate's FSDP refuses the CPU."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    objective, config = Toy(), OptimConfig(lr=0.05, lr_by_part={"vision_tower": 0.01}, steps=6, warmup=2, micro_batch=2)
    wrapped = Normalised(objective)
    language = objective.model["language_model"]
    for part in (objective.model["vision_tower"], language["embed"], language["head"]):  # the seg head is the root's
        fully_shard(part)
    fully_shard(wrapped)
    optimizer = torch.optim.AdamW(parameter_groups(objective, config), betas=config.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.rate(step, 6))
    data, losses = Items(21), []
    slices = iter(Slices(21, steps=6, batch=8, micro_batch=2, rank=rank(), world=world()))
    for _ in range(6):
        batches = [collate([data[index] for index in next(slices)]) for _ in range(config.accumulate(world()))]
        counts = Counter()
        for row in gather([batch["counts"] for batch in batches]):
            for one in row:
                counts.update(one)
        lost = 0.0
        for batch in batches:
            loss = wrapped(batch, counts, world())["loss"]
            loss.backward()
            lost += loss.item() / world()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0).full_tensor().item()
        losses.append({"loss": sum(gather(lost)), "grad_norm": norm})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad(), at_hand(wrapped):  # a part of no layer of its own, called by itself as evaluation does
        assert torch.isfinite(objective(batches[0])["text"].total)
    with whole_weights(objective, Engine(name="fsdp")):
        if rank() == 0:
            torch.save({name: value.clone() for name, value in objective.state_dict().items()}, output / "weights.pt")
    (output / f"rank{rank()}.json").write_text(json.dumps({"engine": running(wrapped), "losses": losses}))
    leave()


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[2:] == ["natively"]:
        return shard_natively(Path(sys.argv[1]))
    given = dict(pair.split("=") for pair in sys.argv[2:])
    trainer = build(Path(sys.argv[1]), **given)
    trainer.fit(resume=given.get("resume") == "true")
    if given.get("engine") == "zero3":  # proof that weights are shared out
        assert any(one.ds_tensor.ds_numel < one.ds_numel for one in trainer.objective.parameters())
        assert any(one.numel() == 0 for one in trainer.objective.parameters())
    if rank() == 0:
        (Path(sys.argv[1]) / "engine.txt").write_text(running(trainer.model_wrapped))
    leave()


if __name__ == "__main__":
    main()
