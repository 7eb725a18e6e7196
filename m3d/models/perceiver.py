"""The spatial-pooling perceiver: from thousands of patch tokens to a few hundred that a language model reads.

Neighbouring patches are averaged in 3D (or runs of tokens, ``sequence``) and only then projected (M3D-LaMed, section
4.1). Averages go through einops, for `avg_pool3d` has no bfloat16 kernel on the CPU.
"""

# B = volumes, N = patch tokens (d h w), K = pooled tokens, C = vision width, E = language width

import itertools

from einops import rearrange, reduce
from torch import Tensor, nn


def projection(kind: str, depth: int, width: int, language_width: int) -> nn.Sequential:
    """``mlp``: linear layers with exact GELUs between; ``linear``: the same without them."""
    linears: list[nn.Module] = [nn.Linear(width, language_width)]
    linears += [nn.Linear(language_width, language_width) for _ in range(depth - 1)]
    if kind == "linear":
        return nn.Sequential(*linears)
    return nn.Sequential(*list(itertools.chain.from_iterable((layer, nn.GELU()) for layer in linears))[:-1])


class SpatialPoolingPerceiver(nn.Module):
    """Pool neighbouring patches of a ``grid``, then project them."""

    def __init__(self, grid: tuple[int, int, int], pool_size: int, projector: nn.Sequential) -> None:
        super().__init__()
        self.grid, self.pool_size, self.projector = grid, pool_size, projector

    def pool(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, K, C)``: the mean of each block of ``pool_size`` cubed patches."""
        d, h, w = (side // self.pool_size for side in self.grid)
        p = self.pool_size
        return reduce(tokens, "b (d p h q w r) c -> b (d h w) c", "mean", d=d, h=h, w=w, p=p, q=p, r=p)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, K, E)``."""
        projected: Tensor = self.projector(self.pool(tokens))
        return projected


class StackingPerceiver(SpatialPoolingPerceiver):
    """Neighbouring patches side by side in one wide token, so that none of them is blurred; ours."""

    def pool(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, K, pool_size^3 C)``: each block of ``pool_size`` cubed patches in a row."""
        d, h, w = (side // self.pool_size for side in self.grid)
        p = self.pool_size
        return rearrange(tokens, "b (d p h q w r) c -> b (d h w) (p q r c)", d=d, h=h, w=w, p=p, q=p, r=p)


class SequencePoolingPerceiver(SpatialPoolingPerceiver):
    """The paper's ablation: pool runs of consecutive tokens, blind to where they are."""

    def pool(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, K, C)``: the mean of each run of ``pool_size`` cubed tokens."""
        return reduce(tokens, "b (k p) c -> b k c", "mean", p=self.pool_size**3)


PERCEIVERS = {"spatial": SpatialPoolingPerceiver, "stacked": StackingPerceiver, "sequence": SequencePoolingPerceiver}


def build_perceiver(
    pooling: str,
    grid: tuple[int, int, int],
    pool_size: int,
    projector: tuple[str, int],
    width: int,
    language_width: int,
) -> SpatialPoolingPerceiver:
    """The perceiver of that ``pooling``; ``projector`` is its kind and depth."""
    kind, depth = projector
    entering = width * pool_size**3 if pooling == "stacked" else width
    return PERCEIVERS[pooling](grid, pool_size, projection(kind, depth, entering, language_width))
