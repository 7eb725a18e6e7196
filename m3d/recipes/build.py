"""A model to train, from what earlier stages left: a language model's folder, a tower, a head, or sizes and chance.

Everything is loaded strictly, and what does not fit is named. A language model of billions of weights is read once, in
its own type; the other parts are made around it.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from data_prep.preprocess import Preprocess
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.clip import vision_tower_of
from m3d.models.segvol import HANDED_OVER, M3DSegVolConfig
from m3d.models.weights import put, read_weights
from m3d.recipes.assemble import around, load_language_model, teach_tokens
from m3d.recipes.checkpoints import model_folder
from m3d.recipes.handover import load_model

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Pooling = Literal["spatial", "stacked", "sequence"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """A 3D ViT; as published (paper, section 4.1) unless told otherwise. Its grid is that of the stores.

    ``detail_channels`` > 0 adds features of every voxel, ``detail_filters`` wide (`encoders.detail`).
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: tuple[int, int, int] = (4, 16, 16)
    cls_token: bool = True
    detail_channels: int = 0
    detail_filters: int = 8

    def config(self, grid: tuple[int, ...]) -> M3DVisionConfig:
        """The config of a tower that sees volumes of ``grid`` voxels."""
        return M3DVisionConfig(
            image_size=list(grid),
            patch_size=list(self.patch),
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            cls_token=self.cls_token,
            detail_channels=self.detail_channels,
            detail_filters=self.detail_filters,
        )


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """A SegVol head for new training; ``own_encoder`` as published, else it shares the vision tower's tokens."""

    own_encoder: bool = True
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_hidden: int = 256
    mask_prompt: bool = True
    projector_dropout: float = 0.1

    def config(self, vision: M3DVisionConfig) -> M3DSegConfig:
        """The config of a head beside ``vision``; an encoder of its own is as large, without class token."""
        own = M3DVisionConfig(**{**vision.to_dict(), "cls_token": False}) if self.own_encoder else None
        return M3DSegConfig(
            encoder_config=own,
            decoder_depth=self.decoder_depth,
            decoder_heads=self.decoder_heads,
            decoder_mlp_dim=self.decoder_mlp,
            iou_hidden_size=self.iou_hidden,
            num_masks=1,
            coordinates="grid",
            upscale_norm="channel",
            mask_prompt=self.mask_prompt,
            projector_dropout=self.projector_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class Init:
    """Where a model's parts come from.

    Attributes:
        checkpoint: Everything, from an earlier stage. If that folder left out the language model, give it as well.
        language_model: Folder of a Hugging Face causal LM with its tokenizer.
        vision_tower: Folder of pretrain_clip.
        segvol: Folder of pretrain_segvol, or of a whole model: the head, its encoder or the tower that it shares, and
            seg_projector.
        perceiver: Folder of a converted ``mm_projector.bin`` of the released stage 1 (``m3d convert``): the perceiver,
            and the input table that was trained with it, where the vocabulary is as large.
        vision: Sizes of a tower from nothing.
        head: Sizes of a head from nothing; without it and ``segvol`` the model only talks.
        pool: Side of the blocks of patches that become one token of the language model.
        pooling: Whether a block is averaged ("spatial", published), or stacked in one wide token.
        box_head: Whether boxes are read in numbers as well as said in digits; ``loss.boxes`` teaches it.
        dtype: Of the language model's weights; what learns in full should be float32.
    """

    checkpoint: str | None = None
    language_model: str | None = None
    vision_tower: str | None = None
    segvol: str | None = None
    perceiver: str | None = None
    vision: VisionSizes | None = None
    head: HeadSizes | None = None
    pool: int = 2
    pooling: Pooling = "spatial"
    box_head: bool = False
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Refuse what says nothing, or two things at once."""
        parts = [
            name
            for name in ("vision_tower", "segvol", "perceiver", "vision", "head")
            if getattr(self, name) is not None
        ]
        if self.checkpoint is not None and parts:
            raise ValueError(f"init.checkpoint brings all parts; leave out init.{parts[0]}")
        for name in ("pool", "pooling", "box_head") if self.checkpoint is not None else ():
            if getattr(self, name) != getattr(Init, name):
                raise ValueError(f"init.checkpoint brings it along, whatever it is; leave out init.{name}")
        if self.checkpoint is None and self.language_model is None:
            raise ValueError("init needs a checkpoint of an earlier stage, or a language_model to build around")
        if self.segvol is not None and self.head is not None:
            raise ValueError("init.segvol and init.head are both a mask head; leave one out")
        if self.vision_tower is not None and self.vision is not None:
            raise ValueError("init.vision_tower and init.vision are both a tower; leave one out")

    @property
    def parents(self) -> dict[str, str | None]:
        """The folders that it names, by role."""
        roles = ("checkpoint", "language_model", "vision_tower", "segvol", "perceiver")
        return {name: getattr(self, name) for name in roles}


@dataclass(frozen=True, eq=False)
class Built:
    """A model with what prepares words and scans for it; ``base`` is the language model's folder, where it has one."""

    model: M3DForConditionalGeneration
    processor: M3DProcessor
    base: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)


def build(init: Init, preprocess: Preprocess) -> Built:
    """The model that ``init`` describes, for scans prepared by ``preprocess``.

    Raises:
        FileNotFoundError: A folder, or a file of it, is not there.
        ValueError: Parts do not fit each other, their weights or the preparation of the scans.
    """
    base = model_folder(init.language_model) if init.language_model is not None else None
    if init.checkpoint is not None:
        folder = model_folder(init.checkpoint)
        check_preprocess(folder, preprocess)
        model, processor = load_model(folder, language_model=base, dtype=DTYPES[init.dtype])
        return Built(model, processor, base)
    assert base is not None
    for path in (init.vision_tower, init.segvol):
        if path is not None:
            check_preprocess(model_folder(path), preprocess)
    language_model, tokenizer = load_language_model(base, DTYPES[init.dtype])
    ids = teach_tokens(language_model, tokenizer)
    vision, seg = part_configs(init, preprocess)
    config = M3DConfig(
        vision_config=vision,
        text_config=language_model.config,
        seg_config=seg,
        pool_size=init.pool,
        pooling=init.pooling,
        box_head=init.box_head,
        **projector_settings(init),
        **ids,
    )
    model = around(config, language_model)
    notes = dict(fill(model, init))
    return Built(model, M3DProcessor(tokenizer, preprocess, config.num_image_tokens), base, notes)


def check_preprocess(folder: Path, preprocess: Preprocess) -> None:
    """Stop where a checkpoint's scans were prepared otherwise than the stores'."""
    if Preprocess.read(folder) != preprocess:
        raise ValueError(f"{folder} was trained on scans prepared otherwise than the stores; compare preprocess.json")


def part_configs(init: Init, preprocess: Preprocess) -> tuple[M3DVisionConfig, M3DSegConfig | None]:
    """Configs of tower and head, from the folders that bring them or from sizes."""
    segvol = M3DSegVolConfig.of(model_folder(init.segvol)) if init.segvol is not None else None
    shares = segvol is not None and segvol.seg.encoder is None
    if shares and (init.vision_tower is not None or init.vision is not None):
        raise ValueError("the head of init.segvol shares its vision tower; leave out init.vision_tower and init.vision")
    if segvol is not None and shares:
        vision = segvol.vision
    elif init.vision_tower is not None:
        vision = vision_tower_of(model_folder(init.vision_tower))[0]
    else:
        vision = (init.vision or VisionSizes()).config(preprocess.grid)
    if segvol is not None:
        return vision, segvol.seg
    return vision, None if init.head is None else init.head.config(vision)


def projector_settings(init: Init) -> dict[str, Any]:
    """Kind and depth of a perceiver that init.perceiver brings; the published ones otherwise.

    Raises:
        ValueError: It pools otherwise than ``init`` says.
    """
    if init.perceiver is None:
        return {}
    folder = model_folder(init.perceiver)
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if known.get("model_type") != "m3d_perceiver":
        raise ValueError(f"{folder} is no perceiver; init.perceiver takes what `m3d convert mm_projector.bin` writes")
    pooled = known["pooling"], known["pool_size"]
    if pooled != (init.pooling, init.pool):
        raise ValueError(f"{folder} pools {pooled}, init says {(init.pooling, init.pool)}; set init.pooling, init.pool")
    return {name: known[name] for name in ("projector", "projector_depth")}


def fill(model: M3DForConditionalGeneration, init: Init) -> Iterator[tuple[str, str]]:
    """Put the weights of earlier stages into their parts; says which came from where."""
    if init.vision_tower is not None:
        folder = model_folder(init.vision_tower)
        put(model.vision_tower, vision_tower_of(folder)[1], f"{folder}: vision_tower")
        yield "vision_tower", "pretrain_clip"
    if init.perceiver is not None:
        yield from fill_perceiver(model, model_folder(init.perceiver))
    if init.segvol is None:
        return
    folder = model_folder(init.segvol)
    segvol = M3DSegVolConfig.of(folder)
    for name in HANDED_OVER:
        part: nn.Module | None = getattr(model, name)
        if name == "vision_tower" and segvol.seg.encoder is not None:
            continue
        if name == "seg_projector" and not _same_width(segvol, model):
            log.info("seg_projector begins anew: the head has learned names from another source")
            continue
        assert part is not None
        put(part, read_weights(folder, f"{name}."), f"{folder}: {name}")
        yield name, "pretrain_segvol"


def fill_perceiver(model: M3DForConditionalGeneration, folder: Path) -> Iterator[tuple[str, str]]:
    """The released stage 1's perceiver; its second stage never loaded the input table beside it (REFERENCE B2)."""
    put(model.perceiver, read_weights(folder, "perceiver."), f"{folder}: perceiver")
    yield "perceiver", "mm_projector.bin"
    table = read_weights(folder, "language_model.model.embed_tokens.").get("weight")
    own = model.get_input_embeddings().weight
    assert isinstance(own, torch.Tensor)
    if table is None or table.shape != own.shape:
        log.info("the input table stays the language model's: %s brings none of its size", folder.name)
        return
    with torch.no_grad():
        own.copy_(table)
    yield "embed_tokens", "mm_projector.bin"


def _same_width(segvol: M3DSegVolConfig, model: M3DForConditionalGeneration) -> bool:
    return segvol.text_source == "language" and segvol.text_width == model.config.text.hidden_size
