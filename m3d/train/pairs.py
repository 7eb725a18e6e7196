"""Volumes and what is said of them, in pairs: the data of the CLIP stage."""

# B = pairs, (D, H, W) = the store's grid

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from m3d.train.augment import Augment
from m3d.train.cases import TrainingCase, holds_in_one_pose, to_tensors
from m3d.train.exchanges import mirror, spoken
from m3d.train.views import Captioned, Look, moved

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^\W\d_a-z])|(?<=[。！？])\s*")  # noqa: RUF001 (Chinese)


@dataclass(frozen=True, kw_only=True)
class TextAugment:
    """Light changes that leave a text true: each sentence is left out with probability ``drop``, the rest reordered.

    Rule-made captions are few and alike; told in another order, and in part, one stands for many. (The released code
    shortens only texts that are too long: the first sentence and some of the others, drawn at random.)
    """

    drop: float = 0.2
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Refuse what would leave nothing."""
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop} must be a probability below 1")

    def __call__(self, text: str, rng: random.Random) -> str:
        """The text as it is told this time; at least one sentence of it."""
        sentences = sentences_of(text)
        kept = [sentence for sentence in sentences if rng.random() >= self.drop] or [rng.choice(sentences)]
        if self.shuffle:
            rng.shuffle(kept)
        return " ".join(kept)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, English or Chinese; a point within a number or before a small letter ends none."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


class CaptionPairs(Dataset[Captioned]):
    """Passes over the cases in batches of ``batch``, ``steps`` of them; an item depends on (seed, index) alone.

    Each pass has its own order and leaves out what does not fill a batch, so that no batch has one image twice: the
    loss would call a true pair a mismatch. One text of any of the tasks is drawn a visit. A volume is varied in
    ``looks`` ways, or anew at every visit (0).
    """

    def __init__(
        self,
        cases: Sequence[TrainingCase],
        *,
        tasks: Sequence[str],
        batch: int,
        steps: int,
        augment: Augment | None = None,
        text_augment: TextAugment | None = None,
        looks: int = 0,
        seed: int = 0,
    ) -> None:
        if batch > len(cases):
            raise ValueError(
                f"optim.batch={batch} of {len(cases)} images would show one twice, and the loss call a true pair a "
                f"mismatch; take at most {len(cases)}"
            )
        self.cases, self.tasks, self.batch, self.steps, self.seed = cases, frozenset(tasks), batch, steps, seed
        self.augment, self.text_augment, self.looks = augment, text_augment, looks
        self.pass_length = len(cases) // batch * batch
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> Captioned:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        turn, place = divmod(index, self.pass_length)
        case, seed = self.cases[self._order_of(turn)[place]], f"{self.seed}/{index}"
        rng = random.Random(seed)
        texts = [number for number, entry in enumerate(case.entries) if entry.task in self.tasks]
        (record,) = case.records_at([rng.choice(texts)])
        if self.text_augment is not None:
            text = self.text_augment(str(record.target.text), rng)
            record = record.model_copy(update={"target": record.target.model_copy(update={"text": text})})
        picture = f"{case.id}/{rng.randrange(self.looks)}" if self.looks else None
        look, said = Look(case, case.read(), rng if picture is None else random.Random(picture), index, seed), [record]
        if picture is not None:  # shown again with other texts: true of all
            said = case.records_at(texts)
        fixed = any(holds_in_one_pose(one.meta) for one in said)
        shown = moved(look, list(spoken(said)), self.augment, fixed=fixed)
        told = mirror(record) if shown.mirrored else record
        return Captioned(record.id, index, seed, shown.image[None], str(told.target.text), picture)

    def _order_of(self, turn: int) -> list[int]:
        if self._order[0] != turn:
            order = list(range(len(self.cases)))
            random.Random(f"{self.seed}/pass/{turn}").shuffle(order)
            self._order = (turn, order)
        return self._order[1]


def paired(cases: Sequence[TrainingCase], tasks: Sequence[str], where: str) -> list[TrainingCase]:
    """The cases that have a text of at least one of the tasks.

    Raises:
        ValueError: None has.
    """
    found = [case for case in cases if any(entry.task in tasks for entry in case.entries)]
    if not found:
        raise ValueError(f"{where}: no image has an entry of {' or '.join(tasks)}; prepare it with `derive` of these")
    return found


def judged_volume(case: TrainingCase) -> Tensor:
    """The volume of a case, unchanged: ``(1, D, H, W)``."""
    return to_tensors(case.read())[0][None]


def judged_text(case: TrainingCase, task: str) -> str:
    """The first text of a task, unchanged."""
    number = next(number for number, entry in enumerate(case.entries) if entry.task == task)
    (record,) = case.records_at([number])
    return str(record.target.text)


@dataclass(frozen=True, eq=False)
class PairCollator:
    """Pairs to a batch: ``pixel_values``, ``input_ids``, ``attention_mask``, ``ids``, ``pictures``, ``counts``."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, pairs: Sequence[Captioned]) -> dict[str, Any]:
        """Stack volumes and pad texts on the right."""
        return {
            "pixel_values": torch.stack([pair.pixels for pair in pairs]),
            **self.words([pair.text for pair in pairs]),
            "ids": [pair.id for pair in pairs],
            "pictures": [pair.picture for pair in pairs],
            "counts": {"pairs": len(pairs)},
        }

    def words(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``input_ids`` and ``attention_mask`` of texts, cut where the tokenizer says (``model_max_length``)."""
        encoded = self.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right", truncation=True)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
