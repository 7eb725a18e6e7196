"""M3D-CLIP: a 3D ViT and a text tower agree on which report belongs to which scan (M3D-LaMed, section 4.1).

``m3d train configs/tiny/pretrain_clip.yaml``. The result, ``OUTPUT/model``, is an M3D-CLIP folder (`m3d.models.clip`);
later stages take their vision tower from it. ``metrics.json`` in it says how well it finds the validation scans' texts
among each other, and the other way round.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_prep.atomic import atomic_path
from data_prep.preprocess import Preprocess
from encoders import VolumeTextCLIP
from encoders.clip import Pooling
from m3d.models.clip import M3DCLIPConfig, Pair, build_pair, load_pair, save_pair, vision_tower_of
from m3d.models.config import M3DVisionConfig
from m3d.models.weights import put
from m3d.recipes.build import VisionSizes
from m3d.recipes.checkpoints import begin_manifest, begun, finish_manifest, model_folder, write_manifest, write_recipe
from m3d.recipes.preflight import check_stores
from m3d.tasks import check_tasks
from m3d.train import engines
from m3d.train.augment import Augment
from m3d.train.cases import TrainingCase, stored
from m3d.train.contrastive import START, ContrastiveConfig, ContrastivePair, refuse_accumulation, retrieval_scores
from m3d.train.engines import Engine
from m3d.train.kept_tokens import refuse_large
from m3d.train.optim import OptimConfig
from m3d.train.pairs import CaptionPairs, PairCollator, TextAugment, judged_text, judged_volume, paired
from m3d.train.spread import Moments
from m3d.train.text_towers import TextTower, TextTowerConfig, build_text_tower
from m3d.train.trainer import M3DTrainer

log = logging.getLogger(__name__)

METRICS = "metrics.json"
WATCHED = (1, 5, 10)
MEASURES = {"R@1": True, "R@5": True, "MRR": True, "mean_rank": False, "chance_R@5": True, "token_spread": True}
"""What the evaluation measures, and whether more of it is better."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which pairs: stores of ``m3d data prepare``, all prepared alike, and what is taken of them.

    Attributes:
        stores: Their folders.
        split: Learned from.
        judged: Measured on, every so often and at the end.
        tasks: Whose texts are paired; one is drawn a visit, and each is measured on its own.
        most_judged: Images measured on, the first of each store's split [512 in the released code].
        text: How a text is told; None for as it stands.
        looks: In how many ways each volume is varied; 0 for anew at every visit. A vision tower that stands still looks
            at each such picture once and its tokens stay in memory, 2 bytes a number.
    """

    stores: tuple[str, ...] = ()
    split: str = "train"
    judged: str = "validation"
    tasks: tuple[str, ...] = ("retrieval", "report")
    most_judged: int = 512
    text: TextAugment | None = field(default_factory=TextAugment)
    looks: int = 0

    def __post_init__(self) -> None:
        """Refuse what names nothing."""
        check_tasks(self.tasks, "data.tasks")
        for name in ("stores", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty; name at least one")
        if self.most_judged < 2:
            raise ValueError(f"data.most_judged={self.most_judged} must be 2 or more: one text is found by anyone")


def published_optim() -> OptimConfig:
    """Section 4.1: batch 6 x 8 [32 x 8 in the script], lr 1e-4, 100 epochs; the rest as in train_CLIP.sh."""
    return OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, epochs=100, batch=48, micro_batch=6, bf16=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told.

    Attributes:
        data: The pairs.
        init: A checkpoint folder whose vision tower is the beginning, or None for one from nothing of ``vision`` sizes.
        vision: Sizes of the vision tower; with ``init`` they are those of its folder.
        learn_vision: "full", or "frozen": the tower of ``init`` stands still (LiT, Zhai et al. 2022).
        volume_pooling: What stands for a volume: its class token ("cls", published) or the mean of its patches.
        volume_hidden: Width of a layer through which each token is read before that; 0 for none, as published.
        text: The text tower.
        shared_width: Width of the space that both are projected into.
        loss: InfoNCE or SigLIP.
        best: The measure of the evaluation by which the best model is kept (MRR hears of all ranks, so that even a
            small split tells models apart); None keeps the last.
    """

    stage: Literal["pretrain_clip"] = "pretrain_clip"
    output: str = "runs/pretrain_clip"
    seed: int = 0
    data: PairsConfig
    init: str | None = None
    vision: VisionSizes | None = None
    learn_vision: Literal["full", "frozen"] = "full"
    volume_pooling: Pooling = "cls"
    volume_hidden: int = 0
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    shared_width: int = 768
    loss: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    augment: Augment | None = field(default_factory=Augment)
    optim: OptimConfig = field(default_factory=published_optim)
    best: str | None = "MRR"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        """Refuse two answers to one question."""
        self.optim.refuse_seed()
        if self.init is not None and self.vision is not None:
            raise ValueError("init brings the vision tower's sizes along: give init or vision, not both")
        if self.init is None and self.learn_vision == "frozen":
            raise ValueError("learn_vision=frozen needs a tower that has learned; give init, its checkpoint")
        if self.data.looks and self.learn_vision != "frozen":
            raise ValueError(f"data.looks={self.data.looks} is for a tower that stands still; set learn_vision=frozen")
        if self.data.looks and self.engine.in_pieces:
            raise ValueError(f"data.looks with engine={self.engine.name}: its parts are fetched by all at once; take 0")

    def parents(self) -> dict[str, str | None]:
        """The folders that it begins from."""
        named = self.text.source in ("auto", "minilm", "small")
        return {"vision_tower": self.init, "text.source": None if named else self.text.source}


# -- the parts --------------------------------------------------------------------------------------------------------


def read_cases(data: PairsConfig, split: str) -> list[TrainingCase]:
    """The images of a split that have a text."""
    cases = [case for root in data.stores for case in stored(root, split)]
    return paired(cases, data.tasks, f"{', '.join(data.stores)}, split {split}")


def texts_of(cases: Sequence[TrainingCase], tasks: Sequence[str]) -> Iterator[str]:
    """All that is said in these tasks, to learn a tokenizer from."""
    for case in cases:
        numbers = [number for number, entry in enumerate(case.entries) if entry.task in tasks]
        yield from (str(record.target.text) for record in case.records_at(numbers))


def vision_of(config: Config, grid: tuple[int, int, int]) -> tuple[M3DVisionConfig, dict[str, Tensor] | None]:
    """The vision tower's sizes and, where it begins from a checkpoint, its weights.

    Raises:
        ValueError: The checkpoint is of another grid.
    """
    if config.init is None:
        return (config.vision or VisionSizes()).config(grid), None
    found, state = vision_tower_of(model_folder(config.init))
    if tuple(found.image_size or ()) != grid:
        raise ValueError(f"{config.init} sees {found.image_size} voxels, the stores hold {list(grid)}; prepare them so")
    return found, state


def build(config: Config, texts: Iterator[str], preprocess: Preprocess) -> tuple[Pair, TextTower]:
    """The pair as training begins, and its text tower."""
    vision, state = vision_of(config, preprocess.grid)
    torch.manual_seed(config.seed)
    tower = build_text_tower(config.text, texts)
    described = M3DCLIPConfig(
        vision_config=vision,
        text_config=tower.config,
        shared_width=config.shared_width,
        volume_pooling=config.volume_pooling,
        volume_hidden=config.volume_hidden,
        text_pooling=config.text.pooling,
        learned_bias=START[config.loss.kind][1] is not None,
    )
    scale, bias = START[config.loss.kind]
    model = build_pair(described, tower.model, scale=scale, bias=bias or 0.0)
    if state is not None:
        put(model.vision_tower, state, str(config.init))
    model.vision_tower.requires_grad_(config.learn_vision == "full")
    return Pair(model, described, tower.tokenizer, preprocess), tower


# -- judgement --------------------------------------------------------------------------------------------------------


def embed(
    model: VolumeTextCLIP, collate: PairCollator, cases: Sequence[TrainingCase], task: str
) -> tuple[Tensor, Tensor, Moments]:
    """Volumes and texts of a task as unit vectors ``(n, E)``, and the moments of what the vision tower saw.

    Cases without a text of the task are passed over.
    """
    told = telling(cases, task)
    volumes, moments = look(model, told)
    return volumes, read(model, collate, told, task), moments


def telling(cases: Sequence[TrainingCase], task: str) -> list[TrainingCase]:
    """Those that have a text of the task."""
    return [case for case in cases if any(entry.task == task for entry in case.entries)]


@torch.no_grad()
def look(model: VolumeTextCLIP, cases: Sequence[TrainingCase], batch: int = 8) -> tuple[Tensor, Moments]:
    """The volumes, unchanged, as unit vectors ``(n, E)``, and the moments of what the vision tower saw."""
    volumes, moments = [torch.zeros(0, model.vision_projection.out_features)], Moments()
    for some in batches(cases, batch):
        seen = model.vision_tower(torch.stack([judged_volume(case) for case in some]).to(model.log_scale.device))
        moments.add(seen)
        volumes.append(model.embed_tokens(seen).float().cpu())
    return torch.cat(volumes), moments


@torch.no_grad()
def read(
    model: VolumeTextCLIP, collate: PairCollator, cases: Sequence[TrainingCase], task: str, batch: int = 8
) -> Tensor:
    """Each case's first text of a task as a unit vector ``(n, E)``."""
    texts = [torch.zeros(0, model.vision_projection.out_features)]
    for some in batches(cases, batch):
        words = collate.words([judged_text(case, task) for case in some])
        words = {name: one.to(model.log_scale.device) for name, one in words.items()}
        texts.append(model.embed_texts(words["input_ids"], words["attention_mask"]).float().cpu())
    return torch.cat(texts)


def judge(
    pair: Pair, cases: Sequence[TrainingCase], tasks: Sequence[str], *, together: bool = True
) -> dict[str, dict[str, float]]:
    """Retrieval scores of each task that at least two of the cases have a text of.

    Unless all processes must look ``together``, they deal the cases out among them; all have the scores. Tasks that the
    same cases have texts of share one look at them.
    """
    collate, found = PairCollator(pair.tokenizer), {}
    looked: dict[tuple[str, ...], tuple[Tensor, Moments]] = {}
    for task in measurable(cases, tasks):
        told = telling(cases, task)
        share = told if together else told[engines.rank() :: engines.world()]
        names = tuple(case.id for case in told)
        if names not in looked:
            looked[names] = look(pair.model, share)
        row = (looked[names][0], read(pair.model, collate, share, task), looked[names][1])
        rows = [row] if together else engines.gather(row)
        volumes, texts = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
        spread = Moments.of(row[2] for row in rows).spread()
        found[task] = retrieval_scores(volumes @ texts.T, WATCHED) | {"token_spread": spread}
    return found


def batches(cases: Sequence[TrainingCase], size: int) -> Iterator[Sequence[TrainingCase]]:
    """The cases in order, so many at a time."""
    return (cases[start : start + size] for start in range(0, len(cases), size))


def measurable(cases: Sequence[TrainingCase], tasks: Sequence[str]) -> list[str]:
    """The tasks that at least two of the cases have a text of: of one text, anyone finds the volume.

    Raises:
        ValueError: There is none.
    """
    found = [task for task in tasks if sum(any(e.task == task for e in case.entries) for case in cases) > 1]
    if not found:
        raise ValueError(f"data.judged: fewer than two of its images have a text of {' or '.join(tasks)}")
    return found


def summary(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What is watched: the mean over tasks and both directions, chance, and the tokens' spread."""
    watched = {}
    for name in ("R@1", "R@5", "MRR", "mean_rank"):
        rows = [task[f"{way}/{name}"] for task in scores.values() for way in ("volume_to_text", "text_to_volume")]
        watched[name] = sum(rows) / len(rows)
    first = next(iter(scores.values()))
    return watched | {"chance_R@5": first["chance/R@5"], "token_spread": first["token_spread"]}


def write_metrics(folder: Path, config: Config, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Write ``metrics.json``: by task, each with its n and chance level."""
    facts = {
        "split": config.data.judged,
        "selected_on_this_split_by": config.best,
        "ranks": "from 1; ties count against the model",
        "tasks": {task: dict(of) for task, of in scores.items()},
    }
    with atomic_path(folder / METRICS) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


# -- the stage --------------------------------------------------------------------------------------------------------


def main(config: Config, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Read, build, train, save, measure; the scores of the model that was kept."""
    engines.prepare(config.engine)
    refuse_accumulation(config.optim.batch, config.optim.micro_batch, int(os.environ.get("WORLD_SIZE", "1")))
    preprocess = check_stores([Path(root) for root in config.data.stores])
    assert preprocess is not None  # there is a store: PairsConfig has seen to it
    cases = read_cases(config.data, config.data.split)
    judged = read_cases(config.data, config.data.judged)[: config.data.most_judged]
    measurable(judged, config.data.tasks)
    pair, tower = build(config, texts_of(cases, config.data.tasks), preprocess)
    vision = pair.config.vision
    refuse_large(len(cases), config.data.looks, math.prod(vision.grid), vision.hidden_size)
    optim = replace(config.optim, seed=config.seed)
    steps = optim.steps or (optim.epochs or 1) * (len(cases) // optim.batch)
    dataset = CaptionPairs(
        cases,
        tasks=config.data.tasks,
        batch=optim.batch,
        steps=steps,
        augment=config.augment,
        text_augment=config.data.text,
        looks=config.data.looks,
        seed=config.seed,
    )
    output = Path(config.output)
    facts = begin_manifest(
        config, stores=config.data.stores, parents=config.parents(), text_tower=tower.origin, **_sizes(pair.model)
    )
    if engines.rank() == 0:
        begun(output, config, facts)
    trainer = M3DTrainer(
        ContrastivePair(pair.model, config.loss),
        dataset,
        PairCollator(pair.tokenizer),
        optim,
        output,
        config.engine,
        save=lambda folder: _save(folder, pair, config, facts),
        evaluate=lambda: summary(judge(pair, judged, config.data.tasks, together=config.engine.in_pieces)),
        best=config.best,
        measures=MEASURES,
    )
    log.info("%d images to learn from, %d to measure on, %d steps", len(cases), len(judged), steps)
    trainer.fit(resume=resume)
    scores: dict[str, dict[str, float]] = {}
    if engines.rank() == 0:
        scores = _finish(output, config, judged)
    engines.barrier()
    return scores


def _sizes(model: VolumeTextCLIP) -> dict[str, Any]:
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {"parameters": sum(p.numel() for p in model.parameters()), "parameters_by_part": count}


def _save(folder: Path, pair: Pair, config: Config, facts: Mapping[str, Any]) -> None:
    save_pair(folder, pair)
    write_recipe(folder, config)
    write_manifest(folder, facts)


def _finish(output: Path, config: Config, judged: Sequence[TrainingCase]) -> dict[str, dict[str, float]]:
    """Measure what was saved, as it will be loaded."""
    kept = load_pair(output / "model")
    kept.model.to("cpu" if config.engine.on_cpu else "cuda")
    scores = judge(kept, judged, config.data.tasks)
    write_metrics(output / "model", config, scores)
    finish_manifest(output, retrieval=scores)
    return scores
