"""From the released M3D-LaMed's parameter names to ours: a pure renaming of a whole state dict."""

import re
from collections.abc import Callable

from torch import Tensor

from encoders.published import rename as rename_vision
from segvol_head.published import rename as rename_seg

StateDict = dict[str, Tensor]

# Where each part stood in `LamedLlamaForCausalLM`, where it stands in ours, and how its own names change.
PARTS: tuple[tuple[str, str, Callable[[StateDict], StateDict]], ...] = (
    ("model.vision_tower.vision_tower.", "vision_tower.", rename_vision),
    ("model.seg_module.", "seg_head.", rename_seg),
    ("model.mm_projector.projector.", "perceiver.projector.", dict),
    ("model.mm_projector.linear.", "perceiver.projector.0.", dict),
    ("model.seg_projector.", "seg_projector.", dict),
    ("model.", "language_model.model.", dict),
    ("lm_head.", "language_model.lm_head.", dict),
)
LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that transformers < 4.31 wrote


def rename_lamed(state: StateDict) -> StateDict:
    """Rename a released M3D-LaMed state dict; values are the same tensors.

    Raises:
        ValueError: A key belongs to no part of M3D-LaMed.
    """
    groups: dict[tuple[str, str], StateDict] = {}
    for key, value in state.items():
        if LEFTOVERS.search(key):
            continue
        part = next(((old, new) for old, new, _ in PARTS if key.startswith(old)), None)
        if part is None:
            raise ValueError(f"{key!r} is no parameter of M3D-LaMed; is this another model's checkpoint?")
        groups.setdefault(part, {})[key.removeprefix(part[0])] = value
    ways = {(old, new): way for old, new, way in PARTS}
    return {part[1] + key: value for part, group in groups.items() for key, value in ways[part](group).items()}
