"""Whether a vision tower still tells scans apart: one number to watch, for a collapse shows in no loss."""

import torch
from torch import Tensor


def token_spread(tokens: Tensor) -> float:
    """How much tokens differ between volumes, as a share of how much they differ at all: ``(V, N, C)``.

    The standard deviation over the volumes at the same place, by that over everything: 1 for tokens without memory of
    their place, 0 where every scan looks alike, which is how the first bundled model failed (MODEL_CARD).

    Raises:
        ValueError: There are fewer than two volumes.
    """
    if len(tokens) < 2:
        raise ValueError(f"the spread over volumes needs two or more, got {len(tokens)}")
    tokens = tokens.detach().float()
    between = tokens.var(dim=0, correction=0).mean()
    overall = tokens.flatten(0, 1).var(dim=0, correction=0).mean()
    return float(torch.sqrt(between / overall.clamp_min(torch.finfo(torch.float32).tiny)))
