"""A few rows of a frozen vocabulary learn: those of our own tokens, in the input and in the output table.

The rows are parameters of their own beside a table that no optimizer sees. A mask on the gradient would need optimizer
state for the whole table and forbid weight decay; peft's token layers copy the whole table in every step. Here ZeRO and
FSDP find small ordinary parameters in ordinary modules, and the table stays as it was to the bit.
"""

# B = rows of text, T = tokens, R = learned rows, E = width, W = words in the vocabulary

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

TABLE, LEARNED = "table.weight", "learned"
"""What a table and its rows are called in a state dict, after the name of the module that they replace."""


class _Rows(nn.Module):
    """A table and the rows that stand in for some of its own."""

    rows: Tensor

    def __init__(self, table: nn.Embedding | nn.Linear, rows: Sequence[int], learned: nn.Parameter | None) -> None:
        super().__init__()
        if len(set(rows)) != len(rows) or not all(0 <= row < len(table.weight) for row in rows):
            raise ValueError(f"rows={list(rows)} must be different rows of a table of {len(table.weight)}")
        self.table = table
        self.register_buffer("rows", torch.tensor(list(rows), device=table.weight.device), persistent=False)
        # float32 whatever the table is: bfloat16 would round the optimizer's small steps away
        start = table.weight.detach()[self.rows].float()
        self.learned: nn.Parameter
        self.register_parameter("learned", nn.Parameter(start) if learned is None else learned)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen table, for those who ask for its type or place."""
        weight = self.table.weight
        assert isinstance(weight, nn.Parameter)
        return weight


class EmbeddingRows(_Rows):
    """An embedding of which ``rows`` learn."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, T) -> (B, T, E)``; a table that scales what it looks up (Gemma's) scales the learned rows as well."""
        embedded: Tensor = self.table(ids)
        ours = ids[..., None] == self.rows
        new = (ours.to(self.learned.dtype) @ self.learned).to(embedded.dtype)
        scale = torch.as_tensor(getattr(self.table, "embed_scale", 1.0), dtype=new.dtype, device=new.device)
        return torch.where(ours.any(dim=-1, keepdim=True), new * scale, embedded)


class HeadRows(_Rows):
    """An output projection of which ``rows`` learn."""

    def forward(self, states: Tensor) -> Tensor:
        """``(B, T, E) -> (B, T, W)``."""
        logits: Tensor = self.table(states)
        new = F.linear(states, self.learned.to(states.dtype))
        return logits.index_copy(-1, self.rows, new.to(logits.dtype))


def learn_rows(language_model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Let these rows of a language model's tables learn, in place; tied tables share the learned ones as well.

    Raises:
        ValueError: The output projection has a bias, which no row could hold.
    """
    table: Any = language_model.get_input_embeddings()
    head: Any = language_model.get_output_embeddings()
    if isinstance(table, EmbeddingRows):
        return
    if getattr(head, "bias", None) is not None:
        raise ValueError("the language model's output projection has a bias; its rows cannot learn on their own")
    tied = head is not None and head.weight is table.weight
    inputs = EmbeddingRows(table, rows, None)
    language_model.set_input_embeddings(inputs)
    if head is not None:
        language_model.set_output_embeddings(HeadRows(head, rows, inputs.learned if tied else None))
