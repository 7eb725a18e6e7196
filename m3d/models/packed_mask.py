"""Masks that say for each token whom it may attend to, as the language model's kind of attention takes them.

transformers hands a 4D mask on as it is. SDPA takes it as bool, the eager implementations add it to their scores (a
bool would be added as 0 or 1, without an error), and flash attention takes none. A sliding window is not applied to
them: exchanges are far shorter than the 2047 tokens of Phi-3-mini's.
"""

# B = rows of text, T = tokens

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def for_attention(mask: Tensor | None, config: PreTrainedConfig, dtype: torch.dtype) -> Tensor | None:
    """A mask ``(B, 1, T, T)`` bool as the implementation in use takes it; any other mask as it is.

    Raises:
        ValueError: The implementation takes no such mask.
    """
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
        return mask
    kind = config._attn_implementation
    if kind == "sdpa":
        return mask
    if kind == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attn_implementation={kind!r} takes no packed rows; use sdpa or eager, or turn packing off")
