"""Words before pictures: a language model made from nothing first learns how the tasks speak.

A pretrained LLM needs none of this. Ours, of a few million weights, learns grammar, digits and to repeat a name that
was asked for in a few minutes without volumes; beside them that would take hours.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m3d.models.processing import IGNORED, encode_exchange
from m3d.tasks import TASKS, render
from m3d.tasks.base import Rendered
from m3d.tasks.codecs import BoxCodec, Frac3
from m3d.tasks.evidence import measure_first
from m3d.train.cases import TrainingCase
from m3d.train.exchanges import choose, narrow, place, shown
from m3d.train.objective import Loss
from m3d.train.views import Look, has_task


@dataclass(frozen=True, eq=False)
class Said:
    """Texts of a case in tokens, without its volume."""

    id: str
    rows: tuple[tuple[list[int], list[int]], ...]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Exchanges as they stand, without the volume that they are about.

    ``measured`` and ``unseen`` are those of `m3d.train.views.Exchanges`: answers behind the true values of their
    evidence. Without ``prompts`` only what a model has to say is learned, not its prompts and the values it is given.
    """

    tokenizer: PreTrainedTokenizerBase
    weights: Mapping[str, float]
    exchanges: int = 8
    max_length: int = 512
    measured: float = 0.0
    unseen: float = 0.0
    prompts: bool = True

    def wants(self, case: TrainingCase) -> bool:
        """Whether a record of the case can be drawn."""
        return has_task(self.weights, case)

    def size(self, case: TrainingCase, rng: random.Random) -> int:
        """All are alike."""
        return 1

    def show(self, look: Look) -> Said:
        """Draw records and write them."""
        rows = []
        labels = torch.from_numpy(look.arrays[1])
        for said in texts(
            look.case, labels, self.weights, self.exchanges, look.rng, measured=self.measured, unseen=self.unseen
        ):
            ids, own = encode_exchange(self.tokenizer, said.prompt, said.answer, said.given)
            rows.append((ids[: self.max_length], (ids if self.prompts else own)[: self.max_length]))
        return Said(look.case.id, tuple(rows))


def texts(
    case: TrainingCase,
    labels: Tensor,
    weights: Mapping[str, float],
    count: int,
    rng: random.Random,
    codec: BoxCodec | None = None,
    *,
    measured: float = 0.0,
    unseen: float = 0.0,
) -> list[Rendered]:
    """Prompts and answers of ``count`` records of a case, drawn by weight."""
    found = []
    for record in case.records_at(choose(case.entries, weights, count, rng)):
        placed = place(narrow(record, rng, len(record.target.masks or ()) or 1), case, labels)
        if placed is not None:
            said = render(TASKS, placed, codec=codec or Frac3(), rng=rng)
            evidence = placed.target.evidence
            if measured and evidence and placed.lang == "en" and shown(evidence, case, labels):
                first = measure_first(said, evidence, seen=rng.random() >= unseen)
                said = first if rng.random() < measured else said
            found.append(said)
    return found


@dataclass(frozen=True, kw_only=True)
class WordCollator:
    """Texts to a batch, padded on the right: ``input_ids``, ``attention_mask``, ``labels``, ``ids``, ``counts``."""

    pad_token_id: int

    def __call__(self, items: Sequence[Said]) -> dict[str, Any]:
        """The batch of some cases."""
        rows = [row for item in items for row in item.rows] or [([self.pad_token_id], [IGNORED])]
        length = max(len(row) for row, _ in rows)
        ids = torch.tensor([[*row, *[self.pad_token_id] * (length - len(row))] for row, _ in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
        labels = torch.tensor([[*own, *[IGNORED] * (length - len(own))] for _, own in rows])
        learned = int((labels[:, 1:] != IGNORED).sum())
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "ids": [item.id for item in items],
            "counts": {"words": learned, "tokens": int(mask.sum())},
        }


class ReadWords(nn.Module):
    """The language model's own loss, ``words``: every token after the first, prompts too."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Loss]:
        """The sum of cross entropies over learned tokens."""
        logits = self.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        following = batch["labels"][:, 1:].flatten()
        total = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="sum"
        )
        return {"words": Loss(total, "words")}
