"""From the released M3D-CLIP's parameter names to ours: a pure renaming, MONAI's leftovers dropped."""

from __future__ import annotations

import re

from torch import Tensor

RENAMED = (
    (r"(^|\.)patch_embedding\.patch_embeddings\.1\.", r"\1patch_embedding.projection."),
    (r"^vision_encoder\.", "vision_tower."),
    (r"^language_encoder\.", "text_tower."),
    (r"^mm_vision_proj\.", "vision_projection."),
    (r"^mm_language_proj\.", "text_projection."),
    (r"^logit_scale$", "log_scale"),
)

# MONAI <= 0.8 kept a second class token in the patch embedding, MONAI >= 1.4 adds unused cross attention to each block;
# transformers < 4.31 wrote position_ids.
LEFTOVERS = re.compile(
    r"(\.norm_cross_attn\.|\.cross_attn\.|(^|\.)patch_embedding\.cls_token$|\.embeddings\.position_ids$)"
)


def new_name(key: str) -> str | None:
    """Our name of a released ViT's or M3D-CLIP's parameter; None for a leftover that nothing calls."""
    if LEFTOVERS.search(key):
        return None
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a released ViT or M3D-CLIP state dict; values are the same tensors."""
    named = ((new_name(key), value) for key, value in state.items())
    return {name: value for name, value in named if name is not None}
