"""Measuring what a model has drawn, where its answer asks for it (`m3d.tasks.evidence` has how it asks)."""

# (1, T) = one row of T tokens

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from data_prep.case import Case, layered
from data_prep.derived.measures import MEASURES, measure
from data_prep.derived.scene import Scene
from data_prep.volume import Volume
from m3d.tasks.evidence import Asking, asking

__all__ = ["AsksToMeasure", "measured_on", "plain_words"]


def plain_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """An answer's words, boxes and ``[SEG]`` included, whose space the token took along."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = str(tokenizer.decode([token for token in tokens if token not in silent], skip_special_tokens=False))
    return " [SEG]".join(part.rstrip() for part in text.split("[SEG]")).strip()


class AsksToMeasure(StoppingCriteria):
    """Ends a generation of one row at the colon behind which a measure belongs; the answer begins at ``start``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Whether each row, ``(1, T)``, is done."""
        answer = input_ids[0, self.start :].tolist()
        colon = str(self.tokenizer.decode(answer[-1:])).rstrip().endswith(":")
        asks = colon and asking(plain_words(self.tokenizer, answer)) is not None
        return torch.full((len(input_ids),), asks, device=input_ids.device)


def measured_on(volume: Volume, masks: Sequence[npt.NDArray[np.bool_]], asked: Asking) -> float | None:
    """What is asked for, of masks on the volume's own grid by the names that were said; None where one shows nothing.

    Voxels count as HU, which densities are in.
    """
    assert len(masks) == len(asked.names) == MEASURES[asked.measure].num_names
    if len(set(asked.names)) != len(asked.names) or not all(mask.any() for mask in masks):
        return None
    named = dict(zip(asked.names, masks, strict=True))
    labels, names = layered(named) if named else (np.zeros(volume.shape, np.uint8), {})
    case = Case(id="", patient_id="", volume=volume, labels=labels, names=names)
    return measure(Scene.of(case), asked.measure, asked.names)
