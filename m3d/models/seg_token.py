"""Which hidden state prompts the mask head: decided here once, for training and generation alike.

The prompt of a ``[SEG]`` at position t is the last layer's state at t - 1, the state that *predicts* it (as in the
reference): it exists for every ``[SEG]`` a model can say, also the very last token of an answer, and it has just read
the name that the mask belongs to.
"""

# B = rows of text, T = tokens, M = [SEG] tokens in all rows, E = language width

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegTokens:
    """Where the ``[SEG]`` tokens of a batch stand: row and position of each, ``(M,)`` both, in reading order."""

    rows: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def find_seg_tokens(input_ids: Tensor, seg_token_id: int) -> SegTokens:
    """Find every ``[SEG]`` in ``(B, T)`` token ids; the first position cannot be one, for nothing predicts it."""
    rows, positions = (input_ids[:, 1:] == seg_token_id).nonzero(as_tuple=True)
    return SegTokens(rows, positions + 1)


def seg_states(hidden: Tensor, where: SegTokens) -> Tensor:
    """The state that predicts each ``[SEG]``: ``(B, T, E) -> (M, E)``."""
    return hidden[where.rows, where.positions - 1]


def mean_per_row(states: Tensor, where: SegTokens, num_rows: int) -> Tensor:
    """The reference's merge, ``(M, E) -> (B, E)``: the mean over a row's ``[SEG]`` tokens, zeros in a row without."""
    total = states.new_zeros(num_rows, states.shape[-1]).index_add(0, where.rows, states)
    count = torch.bincount(where.rows, minlength=num_rows).clamp(min=1)
    return total / count[:, None]
