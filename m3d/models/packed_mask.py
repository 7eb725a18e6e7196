"""Masks that say for each token whom it may attend to, as the language model's kind of attention takes them.

transformers hands a 4D mask on as it is, and then no layer applies its sliding window: it is put into the mask here, by
positions, for exchanges packed behind one volume stand further apart in their row than in the text. SDPA takes a mask
as bool, the eager implementations add it to their scores (a bool would be added as 0 or 1, without an error), and flash
attention takes none.
"""

# B = rows of text, T = tokens

import torch
from torch import Tensor
from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
Masks = Tensor | dict[str, Tensor]


def window_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a sliding layer of a language model sees, itself included; None where all layers see all."""
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    return None if kinds is not None and SLIDING not in kinds else window


def for_attention(
    mask: Tensor | None, config: PreTrainedConfig, dtype: torch.dtype, positions: Tensor | None = None
) -> Masks | None:
    """A mask ``(B, 1, T, T)`` bool as the implementation in use takes it; any other mask as it is.

    ``positions`` ``(B, T)`` are those of the tokens in their own exchange. Where only some layers slide, each kind of
    layer has its mask, by the names that transformers gives them.

    Raises:
        ValueError: The implementation, or a layer, takes no such mask.
    """
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
        return mask
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {FULL, SLIDING})
    if others:
        raise ValueError(f"{config.model_type} has layers of {others[0]}, which take no packed rows; turn packing off")
    whole, window = _of_kind(mask, config, dtype), window_of(config)
    if window is None or mask.shape[-1] <= window:
        return whole
    if positions is None:
        positions = torch.arange(mask.shape[-1], device=mask.device)[None]
    near = positions[:, :, None] - positions[:, None, :] < window
    slid = _of_kind(mask & near[:, None], config, dtype)
    return {FULL: whole, SLIDING: slid} if FULL in kinds else slid


def _of_kind(mask: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Tensor:
    kind = config._attn_implementation
    if kind == "sdpa":
        return mask
    if kind == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attn_implementation={kind!r} takes no packed rows; use sdpa or eager, or turn packing off")
