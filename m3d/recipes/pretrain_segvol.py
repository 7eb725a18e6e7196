"""The mask head learns to draw what names, points and boxes ask for (SegVol, section 3; REFERENCE A1.4).

``m3d train configs/tiny/segvol.yaml``. The result, ``OUTPUT/model``, holds the head, the tower or encoder that it looks
through, and ``seg_projector``; alignment and instruction take them from it (``init.segvol``). Where a text tower has
read the names, it lies beside them, and `m3d.load` gives a segmenter that needs no language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.preprocess import Preprocess
from m3d.models.clip import load_pair, vision_tower_of
from m3d.models.config import M3DVisionConfig
from m3d.models.fold import whole_state
from m3d.models.name_reader import NameReader, PairNames, read_name_reader
from m3d.models.name_tower import TEXT_TOWER
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol, load_segvol
from m3d.models.weights import put, write_weights
from m3d.recipes.assemble import load_language_model, teach_tokens
from m3d.recipes.build import HeadSizes, VisionSizes, check_preprocess
from m3d.recipes.checkpoints import model_folder
from m3d.recipes.talk import Judge, Sheet, StoresConfig, dataset, samples, train
from m3d.train import engines
from m3d.train.augment import Augment
from m3d.train.data import VolumeDataset, names_in
from m3d.train.drawing import DrawByPrompts, MaskCollator, NameVectors, language_vectors, read_vectors
from m3d.train.engines import Engine
from m3d.train.objective import LossWeights
from m3d.train.optim import OptimConfig
from m3d.train.pseudo import WithPseudo, check_pseudo
from m3d.train.views import Masks


@dataclass(frozen=True, kw_only=True)
class MasksConfig(StoresConfig):
    """And which structures: at most ``masks`` of a volume that are there, ``absent`` that are certainly not.

    ``pseudo`` is the probability with which a volume's masks are pseudo-masks in their place (``m3d data pseudo``),
    which are asked for by clicks and boxes and never by name. Scans without contours always show theirs.
    """

    masks: int = 4
    absent: int = 1
    pseudo: float = 0.0

    def view(self, augment: Augment | None) -> Masks | WithPseudo:
        """What is shown of a case that is learned from."""
        view = Masks(augment=augment, masks=self.masks, absent=self.absent)
        return WithPseudo(view=view, share=self.pseudo) if self.pseudo else view


@dataclass(frozen=True, kw_only=True)
class Names:
    """Who reads the names: the language model that will speak them later, or the text tower of the CLIP stage.

    Attributes:
        language_model: Folder of a causal LM; a name is then its state that predicts ``[SEG]``, and ``seg_projector``
            is handed on.
        clip: Folder of pretrain_clip; the head then learns to follow names, and ``seg_projector`` begins anew later.
        wordings: In how many wordings a language model is asked.
    """

    language_model: str | None = None
    clip: str | None = None
    wordings: int = 4

    def __post_init__(self) -> None:
        """Refuse none and both."""
        if (self.language_model is None) == (self.clip is None):
            raise ValueError("names needs one reader: names.language_model or names.clip")


def published_optim() -> OptimConfig:
    """SegVol's train.py: 4 volumes on each of 8 GPUs, lr 1e-4, weight decay 1e-5, 500 epochs, float32."""
    return OptimConfig(lr=1e-4, weight_decay=1e-5, warmup=0.02, epochs=500, batch=32, micro_batch=4)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told.

    Attributes:
        data: Scans and structures.
        names: Who reads the names.
        checkpoint: Folder of an earlier pretrain_segvol, or of a converted SegVol, that goes on learning: sizes,
            weights and, unless ``names`` says otherwise, its text tower.
        vision_tower: Folder of pretrain_clip (or any stage) whose tower is the beginning; None for one from nothing.
        vision: Sizes of a tower from nothing.
        head: Sizes of the head; with ``own_encoder`` the tower that learns is its own.
        samples_every: Steps between sample predictions; None for none.
        detail_dropout: How often a volume's detail path is silent, so that the tower learns to draw as well.
        pseudo_weight: Of the loss of pseudo-masks, where ``data.pseudo`` shows any (SegVol's train.py: 0.1).
    """

    stage: Literal["pretrain_segvol"] = "pretrain_segvol"
    output: str = "runs/pretrain_segvol"
    seed: int = 0
    data: MasksConfig
    names: Names | None = None
    checkpoint: str | None = None
    vision_tower: str | None = None
    vision: VisionSizes | None = None
    head: HeadSizes = field(default_factory=HeadSizes)
    loss: LossWeights = field(default_factory=LossWeights)
    detail_dropout: float = 0.25
    pseudo_weight: float = 0.1
    augment: Augment | None = field(default_factory=Augment)
    optim: OptimConfig = field(default_factory=published_optim)
    best: str | None = None
    samples_every: int | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        """Refuse two answers to one question, and what would be passed over."""
        self.data.check_samples(self.samples_every)
        self.optim.refuse_seed()
        if self.vision_tower is not None and self.vision is not None:
            raise ValueError("vision_tower brings its sizes along: give vision_tower or vision, not both")
        given = {"vision_tower": self.vision_tower, "vision": self.vision, "head": self.head}
        for name, value in given.items() if self.checkpoint is not None else ():
            if value not in (None, HeadSizes()):
                raise ValueError(f"checkpoint brings all parts; leave out {name}")
        if self.checkpoint is None and self.names is None:
            raise ValueError("names needs one reader: names.language_model or names.clip")

    def parents(self) -> dict[str, str | None]:
        """The folders that it begins from."""
        names = self.names
        return {
            "checkpoint": self.checkpoint,
            "language_model": None if names is None else names.language_model,
            "clip": None if names is None else names.clip,
            "vision_tower": self.vision_tower,
        }


def build(config: Config, preprocess: Preprocess, text_width: int) -> PromptedSegVol:
    """The head with its tower, as training begins.

    Raises:
        ValueError: Parts do not fit each other, the names, or the preparation of the scans.
    """
    torch.manual_seed(config.seed)
    model = _new(config, preprocess, text_width) if config.checkpoint is None else _taken_up(config, preprocess)
    if model.config.text_width != text_width:
        raise ValueError(
            f"checkpoint={config.checkpoint} takes vectors of names that are {model.config.text_width} wide, those of "
            f"names are {text_width}; leave out names, or give the reader that it has learned from"
        )
    model.seg_head.mask_decoder.iou_prediction_head.requires_grad_(False)  # no loss reaches it
    return model


def _taken_up(config: Config, preprocess: Preprocess) -> PromptedSegVol:
    assert config.checkpoint is not None
    folder = model_folder(config.checkpoint)
    check_preprocess(folder, preprocess)
    return load_segvol(folder).train()


def _new(config: Config, preprocess: Preprocess, text_width: int) -> PromptedSegVol:
    assert config.names is not None
    vision, state = vision_of(config, preprocess)
    described = M3DSegVolConfig(
        vision_config=vision,
        seg_config=config.head.config(vision),
        text_width=text_width,
        text_source="clip" if config.names.clip is not None else "language",
    )
    model = PromptedSegVol(described)
    if state is not None:
        if model.tower.cls_token is None:  # an encoder of the head's own has none, as published
            state.pop("cls_token", None)
        put(model.tower, state, f"{config.vision_tower}: vision_tower")
    return model


def vision_of(config: Config, preprocess: Preprocess) -> tuple[M3DVisionConfig, dict[str, torch.Tensor] | None]:
    """Sizes of the tower, and its weights where it begins from a checkpoint."""
    if config.vision_tower is None:
        return (config.vision or VisionSizes()).config(preprocess.grid), None
    folder = model_folder(config.vision_tower)
    check_preprocess(folder, preprocess)
    return vision_tower_of(folder)


def reader_of(config: Config) -> NameReader | None:
    """The text tower that reads names; None where a language model does.

    Raises:
        ValueError: The checkpoint has no text tower, and ``names`` names no reader.
    """
    if config.names is not None:
        clip = config.names.clip
        return None if clip is None else PairNames.of(load_pair(model_folder(clip)))
    assert config.checkpoint is not None
    reader = read_name_reader(model_folder(config.checkpoint))
    if reader is None:
        raise ValueError(
            f"checkpoint={config.checkpoint} has learned names from a language model; give its folder: "
            "names.language_model=PATH"
        )
    return reader


def read_names(config: Config, reader: NameReader | None, names: Sequence[str]) -> NameVectors:
    """Vectors of names, by whoever reads them."""
    if reader is not None:
        return read_vectors(reader, names)
    assert config.names is not None and config.names.language_model is not None
    language_model, tokenizer = load_language_model(model_folder(config.names.language_model))
    teach_tokens(language_model, tokenizer)
    return language_vectors(language_model.eval(), tokenizer, names, wordings=config.names.wordings)


def save_segvol(folder: Path, model: PromptedSegVol, preprocess: Preprocess, reader: NameReader | None = None) -> None:
    """Write a model into an empty folder; vectors of names are not part of it, the text tower that made them is."""
    write_weights(whole_state(model), folder)
    model.config.save_pretrained(folder)
    preprocess.write(folder)
    if reader is not None:
        reader.write(folder / TEXT_TOWER)


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Read names, build the head, let it draw; the manifest of what came of it."""
    engines.prepare(config.engine)
    if config.data.pseudo:
        check_pseudo(config.data.stores)
    preprocess, groups = config.data.preprocess(), config.data.groups()
    judged = config.data.judged_groups()
    found = names_in([*groups, *judged])
    if not found:
        raise ValueError(
            f"no structure of {', '.join(config.data.stores)} has a name; pseudo-masks stand beside named ones: add a "
            "store that has some"
        )
    reader = reader_of(config)
    names = read_names(config, reader, found)
    model = build(config, preprocess, names.vectors.shape[-1])
    seg = model.config.seg
    seg.vocabulary = list(dict.fromkeys([*(seg.vocabulary or []), *names_in(groups)]))
    objective = DrawByPrompts(
        model,
        names,
        config.loss,
        detail_dropout=config.detail_dropout,
        pseudo_weight=config.pseudo_weight if config.data.pseudo else None,
    )
    optim = replace(config.optim, seed=config.seed)
    collate = MaskCollator(global_batch=optim.batch)
    still = VolumeDataset(judged, replace(config.data, pseudo=0.0).view(None), seed=0) if judged else None
    judge = None if still is None else Judge(objective, still, collate, model.tokens, optim, config.engine.in_pieces)
    return train(
        config,
        objective,
        dataset(config.data, config.data.view(config.augment), optim, config.seed),
        collate,
        optim,
        save=lambda folder: save_segvol(folder, model, preprocess, reader),
        judge=judge,
        measures=judge.measures if judge is not None else None,
        callbacks=samples(config, objective, _sheet(config, objective)),
        facts={"parameters": sum(parameter.numel() for parameter in model.parameters()), "names": len(names.index)},
        resume=resume,
    )


def _sheet(config: Config, objective: DrawByPrompts) -> Sheet:
    from m3d.recipes.samples import DrawnSheet

    return lambda cases: DrawnSheet(objective, cases, bf16=config.optim.bf16)
