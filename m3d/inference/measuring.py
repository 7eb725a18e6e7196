"""Answers that measure first: the model draws, and what it asks for is measured and given to it while it speaks.

`m3d.tasks.evidence` has how it asks.
"""

# T = tokens of one row

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from data_prep.case import Case, Unit, layered
from data_prep.derived.measures import measure
from data_prep.derived.scene import Scene
from data_prep.volume import Volume
from m3d.models import M3DForConditionalGeneration, M3DVolumeFeatures
from m3d.models.packed_mask import window_of
from m3d.models.processing import plain_words
from m3d.tasks.evidence import Asking, asking

__all__ = ["measured_on", "plain_words", "speak"]


def speak(
    model: M3DForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    *,
    measured: Callable[[int, Asking, Tensor], str],
    max_new_tokens: int,
    past: Any = None,  # noqa: ANN401 - a cache of transformers
    features: M3DVolumeFeatures | None = None,
) -> list[Tensor]:
    """Each prompt ``(T,)`` and its greedy answer, together, in which ``measured`` writes the values.

    It is given the number of the prompt, what is asked for and all tokens up to there. ``past`` is a cache of what all
    prompts begin with, which holds the volume; it is copied. Else ``features`` are those of the volumes, in order.
    """
    read = 0 if past is None else past.get_seq_length()
    longest = max(len(ids) for ids in prompts)
    window = window_of(model.config.text)
    uneven = past is not None and len({len(ids) for ids in prompts}) > 1
    if uneven and window is not None and longest + max_new_tokens > window:  # which padding would take up
        return [
            speak(
                model,
                tokenizer,
                [ids],
                measured=lambda _, asked, sequence, number=number: measured(number, asked, sequence),  # type: ignore[misc]
                max_new_tokens=max_new_tokens,
                past=past,
            )[0]
            for number, ids in enumerate(prompts)
        ]
    padded, mask = [], []
    for ids in prompts:  # what all have read, padding, and the rest
        gap = ids.new_full((longest - len(ids),), tokenizer.pad_token_id)
        padded.append(torch.cat([ids[:read], gap, ids[read:]]))
        mask.append(torch.cat([torch.ones_like(ids[:read]), torch.zeros_like(gap), torch.ones_like(ids[read:])]))
    if past is not None:
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(prompts))
    rows = _Rows(read, [longest - len(ids) for ids in prompts], longest)
    seen: dict[str, Any] = {} if features is None else {"mm_encoder_outputs": {"image": features}}
    out = model.generate(  # type: ignore[misc]
        input_ids=torch.stack(padded),
        attention_mask=torch.stack(mask),
        past_key_values=past,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([_WritesValues(tokenizer, rows, measured, longest + max_new_tokens)]),
        **seen,
    )
    return [rows.ended(row, number, tokenizer.eos_token_id) for number, row in enumerate(torch.as_tensor(out))]


@dataclass(frozen=True)
class _Rows:
    """Where a batch has its tokens: ``read`` ones, ``gaps[number]`` of padding, the rest, answers from ``start``."""

    read: int
    gaps: Sequence[int]
    start: int

    def whole(self, row: Tensor, number: int) -> Tensor:
        """A row without its padding."""
        return torch.cat([row[: self.read], row[self.read + self.gaps[number] :]])

    def ended(self, row: Tensor, number: int, eos: int | None) -> Tensor:
        """A row without its padding, and without what comes after the end of its answer."""
        ends = torch.eq(row[self.start :], -1 if eos is None else eos).nonzero()
        return self.whole(row[: self.start + int(ends[0]) + 1] if len(ends) else row, number)


class _WritesValues(LogitsProcessor):
    """Lets a row that has just asked for a measure say its value next, token by token; others go on as they will.

    What is not to be finished within ``end`` tokens ends the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: _Rows,
        measured: Callable[[int, Asking, Tensor], str],
        end: int,
    ) -> None:
        self._tokenizer, self._rows, self._measured, self._end = tokenizer, rows, measured, end
        self._to_say: list[list[int]] = [[] for _ in rows.gaps]
        self._colons: dict[int, bool] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for number, row in enumerate(input_ids):
            to_say = self._to_say[number]
            if not to_say and self._ends_in_colon(row):
                to_say += self._value(number, row)
            if to_say:
                scores[number] = -torch.inf
                scores[number, to_say.pop(0)] = 0.0
        return scores

    def _value(self, number: int, row: Tensor) -> list[int]:
        wanted = asking(plain_words(self._tokenizer, row[self._rows.start :].tolist()))
        if wanted is None:
            return []
        said = f" {self._measured(number, wanted, self._rows.whole(row, number))}"
        value: list[int] = self._tokenizer(said, add_special_tokens=False)["input_ids"]
        return value if len(row) + len(value) < self._end else [self._tokenizer.eos_token_id]

    def _ends_in_colon(self, row: Tensor) -> bool:
        last = int(row[-1])
        if last not in self._colons:
            self._colons[last] = str(self._tokenizer.decode([last])).rstrip().endswith(":")
        return len(row) > self._rows.start and self._colons[last]


def measured_on(
    volume: Volume, masks: Mapping[str, npt.NDArray[np.bool_]], asked: Asking, *, unit: Unit = "HU"
) -> float | None:
    """What is asked for, of masks on the volume's own grid by name, whose voxels are in ``unit``.

    None where a mask is missing or shows nothing, or where it cannot be known: the density of voxels that are no HU.
    """
    named = {name: masks[name] for name in asked.names if name in masks and masks[name].any()}
    if len(named) < len(asked.names):
        return None
    labels, names = layered(named) if named else (np.zeros(volume.shape, np.uint8), {})
    case = Case(id="", patient_id="", volume=volume, labels=labels, names=names, unit=unit)
    return measure(Scene.of(case), asked.measure, asked.names)
