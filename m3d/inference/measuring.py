"""Answers that measure first: the model draws, and what it asks for is measured and given to it while it speaks.

`m3d.tasks.evidence` has how it asks.
"""

# T = tokens of one row

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from data_prep.case import Case, Unit, layered
from data_prep.derived.measures import measure
from data_prep.derived.scene import Scene
from data_prep.volume import Volume
from m3d.models import M3DForConditionalGeneration, M3DVolumeFeatures
from m3d.tasks.evidence import Asking, asking

__all__ = ["measured_on", "plain_words", "speak"]


def speak(
    model: M3DForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    *,
    measured: Callable[[Asking, Tensor], str],
    max_new_tokens: int,
    past: Any = None,  # noqa: ANN401 - a cache of transformers
    features: M3DVolumeFeatures | None = None,
) -> Tensor:
    """The prompt ``(1, T)`` and its greedy answer, in which ``measured`` writes the values.

    It is given what is asked for and all tokens up to there. ``past`` is a cache of a part of the prompt, which holds
    the volume; else ``features`` are those of the volume.
    """
    sequence, asked, end = ids, ids.shape[1], ids.shape[1] + max_new_tokens
    seen: dict[str, Any] = {} if features is None else {"mm_encoder_outputs": {"image": features}}
    while True:
        out: Any = model.generate(  # type: ignore[misc]
            input_ids=sequence,
            attention_mask=torch.ones_like(sequence),
            past_key_values=past,
            max_new_tokens=end - sequence.shape[1],
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([_AsksToMeasure(tokenizer, asked)]),
            return_dict_in_generate=True,
            **seen,
        )
        sequence, past, seen = torch.as_tensor(out.sequences), out.past_key_values, {}
        wanted = asking(plain_words(tokenizer, sequence[0, asked:].tolist()))
        if wanted is None:
            return sequence
        value = tokenizer(f" {measured(wanted, sequence)}", add_special_tokens=False)["input_ids"]
        if sequence.shape[1] + len(value) >= end:
            return sequence
        sequence = torch.cat([sequence, sequence.new_tensor([value])], dim=1)


def plain_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """An answer's words, boxes and ``[SEG]`` included, whose space the token took along."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = str(tokenizer.decode([token for token in tokens if token not in silent], skip_special_tokens=False))
    return " [SEG]".join(part.rstrip() for part in text.split("[SEG]")).strip()


class _AsksToMeasure(StoppingCriteria):
    """Ends a generation of one row at the colon behind which a measure belongs; the answer begins at ``start``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        answer = input_ids[0, self.start :].tolist()
        colon = str(self.tokenizer.decode(answer[-1:])).rstrip().endswith(":")
        asks = colon and asking(plain_words(self.tokenizer, answer)) is not None
        return torch.full((len(input_ids),), asks, device=input_ids.device)


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
