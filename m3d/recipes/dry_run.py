"""A stage before it starts: its model is built on the meta device, without numbers; of the data indices are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from data_prep.preprocess import Preprocess
from m3d.config import config_root
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DVisionConfig
from m3d.models.clip import M3DCLIPConfig, build_pair, without_pooler
from m3d.models.segvol import PromptedSegVol
from m3d.recipes.chain import load
from m3d.recipes.finetune import Config as FinetuneStage
from m3d.recipes.merge import Config as MergeStage
from m3d.recipes.outline import PUBLISHED_GRID, Outline, words_config
from m3d.recipes.own_folder import checkpoint_folder
from m3d.recipes.parts import Parts, apply
from m3d.recipes.plan import Plan, length_of, mix_of, reading_of, rows_of
from m3d.recipes.preflight import check_stores, stores_of
from m3d.recipes.pretrain_clip import Config as ClipStage
from m3d.recipes.pretrain_clip import PairsConfig
from m3d.recipes.pretrain_segvol import Config as SegVolStage
from m3d.recipes.pretrain_words import Config as WordsStage
from m3d.recipes.registry import place_of, read_values
from m3d.recipes.take_words import PACKAGES
from m3d.recipes.take_words import Config as TakeStage
from m3d.recipes.talk import StoresConfig, TalkConfig
from m3d.train import activations
from m3d.train.activations import Sizes, Work
from m3d.train.cases import TrainingCase, stored
from m3d.train.engines import Engine
from m3d.train.estimate import (
    MACHINES,
    Count,
    Kept,
    Row,
    Setup,
    Verdict,
    count_parameters,
    judge,
    largest_block,
    learning,
    pairs,
    talk_and_draw,
)
from m3d.train.optim import OptimConfig
from m3d.train.pairs import paired
from m3d.train.text_towers import teach
from m3d.train.views import Masks, has_task


def plan(config: Any, path: Path) -> Plan:  # noqa: ANN401 - each recipe has its own
    """The plan of a stage's config, which was read from ``path``.

    Raises:
        FileNotFoundError: A folder that it begins from is not there, and no config beside it makes it.
        ValueError: Its parts do not fit each other.
    """
    if config.stage != "chain":
        return _one(config, Outline(place_of(path)))
    earlier: dict[Path, Any] = {}
    plans = []
    for step, (_, link) in zip(config.stages, load(config), strict=True):
        plans.append(_one(link, Outline(place_of(step.config), earlier=dict(earlier))))
        earlier[Path(link.output)] = link
    return Plan(stage="chain", model=" -> ".join(one.stage for one in plans), stages=tuple(plans))


def _one(config: Any, outline: Outline) -> Plan:  # noqa: ANN401
    """The plan of one stage."""
    makers: Mapping[str, Callable[[Any, Outline], Plan]] = {
        "align": _talk,
        "instruct": _talk,
        "pretrain_clip": _pairs,
        "pretrain_segvol": _drawing,
        "pretrain_words": _words,
        "take_words": _taking,
        "finetune": _finetuning,
        "merge": _merging,
    }
    stores = stores_of(config)
    missing = [store for store in stores if not (store / "store.json").is_file()]
    if missing:
        outline = replace(outline, grid=_expected_grid(missing[0], outline.notes))
    elif (preprocess := check_stores(stores)) is not None:
        outline = replace(outline, grid=preprocess.grid)
    return makers[config.stage](config, outline)


def _expected_grid(store: Path, notes: list[str]) -> tuple[int, int, int]:
    """The grid of a store that is not there: that of the shipped config of its name, or the published one."""
    path = config_root() / "data" / f"{store.name}.yaml"
    if not path.is_file():
        notes.append(f"{store} is not there: the published grid is taken for its own, steps are unknown")
        return PUBLISHED_GRID
    notes.append(f"{store} is not there: the grid is that of configs/data/{path.name}, steps are unknown")
    d, h, w = read_values(path)["preprocess"]["grid"]
    return d, h, w


def _cases(data: StoresConfig, wants: Callable[[TrainingCase], bool]) -> tuple[list[TrainingCase], int | None]:
    """The cases of stores that are there and that the stage wants, and how many an epoch shows."""
    if not all((Path(root) / "store.json").is_file() for root in data.stores):
        return [], None
    groups = [replace(group, cases=list(filter(wants, group.cases))) for group in data.groups()]
    return [case for group in groups for case in group.cases], sum(round(g.weight * len(g.cases)) for g in groups)


def _talk(config: TalkConfig, outline: Outline) -> Plan:
    """Alignment and instruction."""
    model_config = outline.whole(config.init)
    cases, images = _cases(config.data, partial(has_task, config.data.weights))
    reading = reading_of(cases, config.data, model_config.num_image_tokens)
    half = config.init.dtype == "bfloat16"
    model = on_meta(model_config, config.parts, half=half, boxes=config.loss.boxes > 0)
    counts, how = count_parameters(model), learning(model)
    if model_config.seg is None or not max(config.loss.dice, config.loss.bce, config.loss.prompted):
        reading = replace(reading, masks=0.0)
    row = Row(tokens=reading.tokens, texts=reading.texts, masks=reading.masks)
    kept = talk_and_draw(model_config, how, counts, row)
    setup = setup_of(config.optim, config.engine, checkpointing=config.checkpointing)
    return replace(
        _base(config, counts, how, images, outline),
        model=describe(model_config),
        reading=reading,
        mix=mix_of(cases, config.data.weights),
        verdicts=verdicts_of(counts, kept, setup, block=largest_block(model_config, counts)),
    )


def _base(
    config: Any,  # noqa: ANN401
    counts: Mapping[str, Count],
    how: Mapping[str, str],
    images: int | None,
    outline: Outline,
) -> Plan:
    """What the plans of all trained stages have."""
    steps, epochs = length_of(config.optim, images)
    every = sum(counts.values(), Count())
    return Plan(
        stage=config.stage,
        model="",
        parts=rows_of(counts, how),
        trainable=every.trainable,
        total=every.total,
        images=images,
        batch=config.optim.batch,
        steps=steps,
        epochs=epochs,
        notes=outline.remarks(),
    )


def _pairs(config: ClipStage, outline: Outline) -> Plan:
    """M3D-CLIP."""
    vision = outline.tower(config.init, config.vision)
    text = outline.text_tower(config.text)
    with torch.device("meta"):
        described = M3DCLIPConfig(
            vision_config=vision,
            text_config=text,
            shared_width=config.shared_width,
            volume_pooling=config.volume_pooling,
            volume_hidden=config.volume_hidden,
        )
        tower = without_pooler(AutoModel.from_config(text))
        model = build_pair(described, tower)
        model.text_tower = teach(tower, config.text)
    model.vision_tower.requires_grad_(config.learn_vision == "full")
    counts, how = count_parameters(model), learning(model)
    kept = pairs(vision, Sizes.of(text), config.text.max_length, looks=config.learn_vision == "full")
    setup = replace(setup_of(config.optim, config.engine), whole=True, chunk=config.loss.chunk)
    cases, images = _captioned(config.data)
    return replace(
        _base(config, counts, how, images, outline),
        model=f"{towers(vision)}; {text.model_type} "
        f"{text.num_hidden_layers} x {text.hidden_size}, {config.text.max_length} tokens; {config.loss.kind}",
        mix=mix_of(cases, dict.fromkeys(config.data.tasks, 1.0)),
        verdicts=verdicts_of(counts, kept, setup),
    )


def _drawing(config: SegVolStage, outline: Outline) -> Plan:
    """SegVol's stage: every mask is drawn by name, by a prompt, and once more after a correction."""
    described = outline.drawing(config)
    with torch.device("meta"):
        model = PromptedSegVol(described)
    model.seg_head.mask_decoder.iou_prediction_head.requires_grad_(False)
    counts, how = count_parameters(model), learning(model)
    cases, images = _cases(config.data, Masks().wants)
    whole = M3DConfig(vision_config=described.vision, text_config=LlamaConfig(), seg_config=described.seg, pool_size=1)
    kept = talk_and_draw(whole, how, counts, Row(tokens=0, masks=3.0 * (config.data.masks + config.data.absent)))
    return replace(
        _base(config, counts, how, images, outline),
        model=f"{towers(described.seg.encoder or described.vision)} -> mask head; names are vectors of "
        f"{described.text_width}",
        mix=mix_of(cases, {}),
        verdicts=verdicts_of(counts, kept, setup_of(config.optim, config.engine)),
    )


def _finetuning(config: FinetuneStage, outline: Outline) -> Plan:
    """The stage that learns from a folder, which is prepared for the checkpoint's own grid."""
    stage = config.learning()
    outline = replace(outline, grid=Preprocess.read(checkpoint_folder(config.checkpoint)).grid)
    if not (config.store / "store.json").is_file():
        outline.notes.append(f"{config.folder} is not prepared yet: an epoch's images are unknown")
    found = _drawing(stage, outline) if isinstance(stage, SegVolStage) else _talk(stage, outline)
    return replace(found, stage=config.stage)


def _words(config: WordsStage, outline: Outline) -> Plan:
    """A language model that reads alone."""
    sizes, text = config.model, words_config(config.model)
    with torch.device("meta"):
        model = nn.ModuleDict({"language_model": LlamaForCausalLM(text)})
    counts, how = count_parameters(model), learning(model)
    cases, images = _cases(config.data, partial(has_task, config.data.weights))

    def kept(setup: Setup) -> tuple[int, int]:
        rows = setup.micro_batch * config.data.exchanges
        work = Work(rows=rows, tokens=config.data.max_length, volumes=0, scored=config.data.max_length, bf16=setup.bf16)
        return activations.language(text, "full", work), activations.logits(text, work)

    return replace(
        _base(config, counts, how, images, outline),
        model=f"llama {sizes.layers} x {sizes.width}, up to {sizes.vocabulary:,} words, no picture",
        mix=mix_of(cases, config.data.weights),
        verdicts=verdicts_of(counts, kept, setup_of(config.optim, config.engine)),
    )


def _merging(config: MergeStage, outline: Outline) -> Plan:
    """Nothing learns."""
    there = [f"{role}: {folder}" for role, folder in config.parents().items() if folder is not None]
    return Plan(stage=config.stage, model=f"{'; '.join(there)} -> {config.output} in {config.dtype}")


def _taking(config: TakeStage, outline: Outline) -> Plan:
    """Nothing learns."""
    package = PACKAGES[config.name]
    return Plan(stage=config.stage, model=f"{package.distribution}, {package.file} -> {config.output}")


def _captioned(data: PairsConfig) -> tuple[list[TrainingCase], int | None]:
    """The cases that have a text, of stores that are there."""
    if not all((Path(root) / "store.json").is_file() for root in data.stores):
        return [], None
    found = [case for root in data.stores for case in stored(root, data.split)]
    wanted = paired(found, data.tasks, f"{', '.join(data.stores)}, split {data.split}")
    return wanted, len(wanted)


def on_meta(config: M3DConfig, parts: Parts, *, half: bool, boxes: bool) -> M3DForConditionalGeneration:
    """The model as it would be trained, without its numbers; ``half`` keeps a frozen language model in bf16."""
    with torch.device("meta"):
        model = M3DForConditionalGeneration(config)
        if half and parts.language_model != "full":
            model.language_model.to(torch.bfloat16)
        apply(model, parts, boxes=boxes)
    return model


def setup_of(optim: OptimConfig, engine: Engine, *, checkpointing: bool = False) -> Setup:
    """How a step is shared out; the machine says among how many GPUs."""
    return Setup(
        engine=engine.name,
        gpus=1,
        batch=optim.batch,
        micro_batch=optim.micro_batch,
        checkpointing=checkpointing,
        offload="offload" in (engine.deepspeed or ""),
        bf16=optim.bf16,
    )


def verdicts_of(counts: Mapping[str, Count], kept: Kept, setup: Setup, *, block: int = 0) -> tuple[Verdict, ...]:
    """Whether it fits each machine."""
    return tuple(judge(counts, kept, setup, name, block=block) for name in MACHINES)


def describe(config: M3DConfig) -> str:
    """A model in a line."""
    text = config.text
    return (
        f"{towers(config.vision)} -> {config.num_image_tokens} tokens -> {text.model_type} {text.num_hidden_layers} x "
        f"{text.hidden_size}, {text.vocab_size:,} words; {'with' if config.seg else 'no'} mask head"
    )


def towers(vision: M3DVisionConfig) -> str:
    """A vision tower in a line."""
    assert vision.image_size is not None and vision.patch_size is not None
    size, patch = ("x".join(map(str, sides)) for sides in (vision.image_size, vision.patch_size))
    return f"{size} voxels, patches of {patch}, ViT {vision.num_hidden_layers} x {vision.hidden_size}"
