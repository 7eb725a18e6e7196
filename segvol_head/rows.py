"""Learned vectors that stand for themselves: an embedding's whole table.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows(table: nn.Embedding, device: torch.device) -> Tensor:
    """All rows, ``(N, C)``, by way of the table's own forward: DeepSpeed's ZeRO-3 has its weights there, nowhere else.

    Read as ``table.weight`` by another module they train on one GPU and fail in ZeRO-3's backward pass.
    """
    found: Tensor = table(torch.arange(table.num_embeddings, device=device))
    return found
