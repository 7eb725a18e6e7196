"""Sums become means over the whole step: what N processes minimise is what one would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


class Normalised(nn.Module):
    """What engines wrap: an objective whose losses come back divided, weighted and added."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, counts: Mapping[str, float], world: int) -> dict[str, Tensor]:
        """``loss`` to go backward from, and every loss by its name, each this micro-batch's share of the step's.

        Engines average gradients over processes, so ``loss`` is multiplied by their number.
        """
        named, parts = {}, []
        for name, loss in self.objective(batch).items():
            if loss.count not in counts:
                raise ValueError(
                    f"loss {name!r} is per {loss.count!r}, which batch['counts'] has not: {sorted(counts)}"
                )
            share = loss.total.float() / max(counts[loss.count], 1)
            parts.append(loss.weight * share)
            if counts[loss.count]:
                named[name] = share.detach()
        return {"loss": world * torch.stack(parts).sum(), **named}
