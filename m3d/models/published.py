"""From the released M3D-LaMed's parameter names to ours: a pure renaming of a whole state dict."""

import re
from collections.abc import Callable

from torch import Tensor

from encoders.published import new_name as vision_name
from segvol_head.published import new_name as seg_name

StateDict = dict[str, Tensor]


def _same(name: str) -> str | None:
    return name


# Where each part stood in `LamedLlamaForCausalLM`, where it stands in ours, and how its own names change.
PARTS: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("model.vision_tower.vision_tower.", "vision_tower.", vision_name),
    ("model.seg_module.", "seg_head.", seg_name),
    ("model.mm_projector.projector.", "perceiver.projector.", _same),
    ("model.mm_projector.linear.", "perceiver.projector.0.", _same),
    ("model.seg_projector.", "seg_projector.", _same),
    ("model.", "language_model.model.", _same),
    ("lm_head.", "language_model.lm_head.", _same),
)
LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that transformers < 4.31 wrote


def new_name(key: str) -> str | None:
    """Our name of a released M3D-LaMed's parameter; None for a leftover that nothing calls.

    Raises:
        ValueError: The key belongs to no part of M3D-LaMed.
    """
    if LEFTOVERS.search(key):
        return None
    for theirs, ours, way in PARTS:
        if key.startswith(theirs):
            name = way(key.removeprefix(theirs))
            return None if name is None else ours + name
    raise ValueError(f"{key!r} is no parameter of M3D-LaMed; is this another model's checkpoint?")


def rename_lamed(state: StateDict) -> StateDict:
    """Rename a released M3D-LaMed state dict; values are the same tensors.

    Raises:
        ValueError: A key belongs to no part of M3D-LaMed.
    """
    named = ((new_name(key), value) for key, value in state.items())
    return {name: value for name, value in named if name is not None}
