"""From our parameter names to those of the released models: the tables of `published`, read from right to left.

The inverse is held against the forward renaming whenever it is used: what does not come back as it was is an error, so
a change of the forward tables cannot silently make it wrong.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from encoders.published import rename as clip_forward
from m3d.models.published import rename_lamed
from segvol_head.published import rename as segvol_forward

State = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]

LAMED: Table = (
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("seg_head.", "model.seg_module."),
    ("perceiver.projector.", "model.mm_projector.projector."),
    ("seg_projector.", "model.seg_projector."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
CLIP: Table = (
    ("vision_tower.", "vision_encoder."),
    ("text_tower.", "language_encoder."),
    ("vision_projection.", "mm_vision_proj."),
    ("text_projection.", "mm_language_proj."),
    ("log_scale", "logit_scale"),
)
SEGVOL: Table = (("seg_head.", "model."),)
PATCHES = ("patch_embedding.projection.", "patch_embedding.patch_embeddings.1.")
DEAD_MASKS = "prompt_encoder.mask_downscaling."


def to_lamed(names: Iterable[str]) -> dict[str, str]:
    """Names of `M3DForConditionalGeneration` and what LaMed calls them."""
    return _inverse(names, LAMED, rename_lamed)


def to_clip(names: Iterable[str]) -> dict[str, str]:
    """Names of the CLIP pair and what M3D-CLIP calls them."""
    return _inverse(names, CLIP, clip_forward)


def to_segvol(names: Iterable[str]) -> dict[str, str]:
    """Names of a mask head, ``seg_head.*``, and what SegVol's released files call them."""
    return _inverse(names, SEGVOL, lambda state: {f"seg_head.{k}": v for k, v in segvol_forward(state).items()})


def _inverse(names: Iterable[str], table: Table, forward: Callable[[State], Mapping[str, Tensor]]) -> dict[str, str]:
    turned = {name: _turned(name, table) for name in names}
    marks = {theirs: torch.empty(0, device="meta") for theirs in turned.values()}
    back = {id(mark): name for name, mark in forward(marks).items()}
    for ours, theirs in turned.items():
        if back.get(id(marks[theirs])) != ours:
            raise ValueError(f"{ours!r} would be read back as {back.get(id(marks[theirs]))!r}: it has no counterpart")
    return turned


def _turned(name: str, table: Table) -> str:
    for ours, theirs in table:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours).replace(*PATCHES)
    raise ValueError(f"{name!r} has no counterpart in the released model")


def dead_masks(prefix: str, width: int, *, channels: int = 16) -> State:
    """SegVol's 2-D convolutions that no 3-D mask can pass (REFERENCE A1.4), as zeros, for strict loaders."""
    quarter = channels // 4
    shapes = {
        "0.weight": (quarter, 1, 2, 2),
        "0.bias": (quarter,),
        "1.weight": (quarter,),
        "1.bias": (quarter,),
        "3.weight": (channels, quarter, 2, 2),
        "3.bias": (channels,),
        "4.weight": (channels,),
        "4.bias": (channels,),
        "6.weight": (width, channels, 1, 1),
        "6.bias": (width,),
    }
    return {f"{prefix}{DEAD_MASKS}{name}": torch.zeros(shape) for name, shape in shapes.items()}


def dead_pooler(prefix: str, width: int) -> State:
    """BERT's pooler, which M3D-CLIP has and never calls, as zeros."""
    return {f"{prefix}weight": torch.zeros(width, width), f"{prefix}bias": torch.zeros(width)}
