"""Whether a vision tower still tells scans apart: one number to watch, for a collapse shows in no loss."""

# V = volumes, N = tokens of a volume, C = tower width

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Moments:
    """Sums of tokens and of their squares, in double precision: all that the spread needs, of any number of volumes."""

    def __init__(self) -> None:
        self.volumes, self.sums = 0, torch.zeros(2, 1, 1, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Volumes more: ``(V, N, C)``."""
        more = tokens.detach().cpu().double()
        self.volumes += len(more)
        self.sums = self.sums + torch.stack([more.sum(dim=0), more.square().sum(dim=0)])

    @classmethod
    def of(cls, parts: Iterable[Moments]) -> Moments:
        """Those of several processes together."""
        whole = cls()
        for part in parts:
            whole.volumes += part.volumes
            whole.sums = whole.sums + part.sums
        return whole

    def spread(self) -> float:
        """How much tokens differ between volumes, as a share of how much they differ at all.

        The standard deviation over the volumes at the same place, by that over everything: 1 for tokens without memory
        of their place, 0 where every scan looks alike, which is how the first bundled model failed.

        Raises:
            ValueError: There are fewer than two volumes.
        """
        if self.volumes < 2:
            raise ValueError(f"the spread over volumes needs two or more, got {self.volumes}")
        mean, square = self.sums / self.volumes
        between = (square - mean.square()).clamp_min(0).mean()
        overall = (square.mean(dim=0) - mean.mean(dim=0).square()).clamp_min(0).mean()
        return float(torch.sqrt(between / overall.clamp_min(torch.finfo(torch.float32).tiny)))
