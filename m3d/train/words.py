"""Words before pictures: a language model made from nothing first learns how the tasks speak.

A pretrained LLM needs none of this. Ours, of a few million weights, learns grammar, digits and to repeat a name that
was asked for in a few minutes without volumes; beside them that would take hours.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from m3d.models import M3DForConditionalGeneration
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import BoxCodec
from m3d.train.batches import IGNORED, choose, encode_exchange, pad, place
from m3d.train.cases import PreparedCase


@dataclass(frozen=True)
class WordBatch:
    """Exchanges without their volumes: every token after the first is learned."""

    input_ids: Tensor
    attention_mask: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> "WordBatch":
        """Move every tensor."""
        return WordBatch(self.input_ids.to(device), self.attention_mask.to(device), self.ids)


@dataclass(frozen=True, kw_only=True)
class WordBatches:
    """Draw ``exchanges`` from as many cases; seeded by step, so a step repeats."""

    cases: Sequence[PreparedCase]
    tokenizer: PreTrainedTokenizerBase
    codec: BoxCodec
    weights: dict[str, float]
    exchanges: int = 48
    seed: int = 0

    def draw(self, step: int) -> WordBatch:
        """The batch of a step."""
        rng = random.Random(f"{self.seed}/words/{step}")
        rows: list[list[int]] = []
        ids: list[str] = []
        while len(rows) < self.exchanges:
            case = rng.choice(self.cases)
            labels = torch.from_numpy(case.labels)
            for record in choose(case.records, self.weights, 4, rng):
                placed = place(record, case, labels)
                if placed is not None:
                    said = render(TASKS, placed, codec=self.codec, rng=rng)
                    rows.append(encode_exchange(self.tokenizer, said.prompt, said.answer)[0])
                    ids.append(record.id)
        input_ids, attention = pad(rows, self.tokenizer.pad_token_id)
        return WordBatch(input_ids, attention, tuple(ids))


class Read(nn.Module):
    """The language model's own loss."""

    def __init__(self, model: M3DForConditionalGeneration) -> None:
        super().__init__()
        self.language_model = model.language_model

    def forward(self, batch: WordBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """``words``: the mean cross entropy of the next token."""
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
        out = self.language_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
        return {"words": out.loss}
