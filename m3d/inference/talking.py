"""Talking about a scan: prompts go in; out come words, what was measured, and what ``[SEG]`` tells the mask head."""

# M = masks, T = tokens, E = language width, C = width of the mask head

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.boxes import Box
from data_prep.case import Unit
from data_prep.derived.measures import MEASURES
from data_prep.preprocess import Window
from m3d.inference.drawing import draw
from m3d.inference.measuring import measured_on, plain_words, speak
from m3d.inference.results import FoundMask, FoundMeasure
from m3d.models import M3DForConditionalGeneration, M3DProcessor, M3DVolumeFeatures
from m3d.models.box_head import read_boxes
from m3d.models.processing import BOX_END, BOX_START, IGNORED, SEG_TOKEN, encode_exchange
from m3d.models.seg_token import find_seg_tokens
from m3d.tasks.base import Phrases
from m3d.tasks.codecs import Frac3
from m3d.tasks.evidence import Asking, answer_of, lettered, value_words
from m3d.tasks.segmentation import named_masks

if TYPE_CHECKING:
    from m3d.inference.scan import Scan

__all__ = [
    "MAX_NEW_TOKENS",
    "Asked",
    "Given",
    "NoMask",
    "Spoken",
    "asked_to_draw",
    "distinct_names",
    "encode",
    "given_answers",
    "log_likelihoods",
    "speak_all",
    "stripped",
]

MAX_NEW_TOKENS = 512
AT_ONCE = 8
"""Names that are asked for at once: each has a copy of the language model's cache of the volume."""


class NoMask(ValueError):
    """The model was asked to draw and answered without ``[SEG]``."""


@dataclass(frozen=True)
class Spoken:
    """An answer: its words, and for each ``[SEG]`` in them what it tells the mask head, ``(M, C)``.

    Where the model has a box head, the digits of boxes are written from it; the letter of a choice, from the words that
    it was said in before. ``measured`` and ``masks`` are the evidence that it gave first, as it said it in
    ``evidence``; ``notes`` are what to beware of.
    """

    text: str
    prompts: Tensor | None
    evidence: str = ""
    measured: tuple[FoundMeasure, ...] = ()
    masks: tuple[FoundMask, ...] = ()
    notes: tuple[str, ...] = ()


@torch.inference_mode()
def encode(
    model: M3DForConditionalGeneration, processor: M3DProcessor, pixels: Tensor
) -> tuple[M3DVolumeFeatures, Any]:
    """Features of one volume ``(1, D, H, W)``, and the language model's cache after reading them."""
    features = model.get_image_features(pixels[None].to(model.device))
    ids = _prefix_ids(model, processor)
    out = model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
    return features, out.past_key_values


def _prefix_ids(model: M3DForConditionalGeneration, processor: M3DProcessor) -> Tensor:
    """The tokens that every prompt about one volume begins with: BOS, where the tokenizer has one, and the volume."""
    ids = processor.tokenizer(processor.write(""), return_tensors="pt")["input_ids"][0]
    last = int((ids == model.config.image_token_id).nonzero()[-1])
    prefix: Tensor = ids[None, : last + 1].to(model.device)
    return prefix


@torch.inference_mode()
def speak_all(scan: Scan, prompts: Sequence[str], max_new_tokens: int) -> list[Spoken]:
    """What the model says to each prompt, all asked at once."""
    model, tokenizer = scan.model, scan.processor.tokenizer
    written = [scan.processor.write(prompt) for prompt in prompts]
    ids = [torch.tensor(tokenizer(text)["input_ids"], device=model.device) for text in written]
    told = [_Evidence(scan, len(some)) for some in ids]
    sequences = speak(
        model,
        tokenizer,
        ids,
        measured=lambda number, wanted, sequence: told[number].value(wanted, sequence[None]),
        max_new_tokens=max_new_tokens,
        past=scan.prefix,
    )
    return [
        _heard(sequence[None], prompt, evidence, max_new_tokens)
        for sequence, prompt, evidence in zip(sequences, prompts, told, strict=True)
    ]


@dataclass(frozen=True)
class Asked:
    """What was said to a name that the model was asked to draw; ``masks`` are the names of what it draws, in order.

    ``refused`` says why none of them is that name; it is empty where one is.
    """

    name: str
    prompt: str
    spoken: Spoken
    masks: tuple[str, ...]
    refused: str = ""

    @classmethod
    def of(cls, name: str, prompt: str, spoken: Spoken) -> Asked:
        """Find the name in the answer."""
        if spoken.prompts is None:
            return cls(name, prompt, spoken, (), f"the model answered {spoken.text!r} without {SEG_TOKEN}")
        # "Sure, it is [SEG]." names nothing: that mask is what was asked for.
        masks = tuple(said or name for said in named_masks(spoken.text))
        if name.lower() not in [said.lower() for said in masks]:
            drawn = ", ".join(map(repr, masks))
            return cls(name, prompt, spoken, masks, f"the model drew {drawn} instead; it may not know that name")
        return cls(name, prompt, spoken, masks)

    def willing(self) -> Asked:
        """Itself.

        Raises:
            NoMask: The model refused.
        """
        if self.refused:
            raise NoMask(f"no mask of {self.name!r}: {self.refused}")
        return self

    @property
    def text_prompt(self) -> Tensor:
        """What the mask head is told of the name alone, ``(1, C)``."""
        assert self.spoken.prompts is not None and not self.refused
        number = [said.lower() for said in self.masks].index(self.name.lower())
        number = min(number, len(self.spoken.prompts) - 1)  # seg_config.merge="mean" has one for all
        return self.spoken.prompts[number : number + 1]


def asked_to_draw(scan: Scan, names: Sequence[str]) -> Iterator[Asked]:
    """Ask the model to draw each name; a few are asked at once, each in a conversation of its own.

    All in one conversation take about as long, and `m3d-tiny` then draws worse (benchmarks/several_names.py).

    Raises:
        ValueError: A name is empty.
    """
    names = [stripped(name) for name in names]
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        prompts = [Phrases()("seg.sem", "prompt", names=f"the {name}") for name in some]
        yield from map(Asked.of, some, prompts, speak_all(scan, prompts, MAX_NEW_TOKENS))


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the space around them, each once, whatever its letters' case.

    Raises:
        ValueError: There are none, or one is empty.
    """
    found: dict[str, str] = {}
    for name in map(stripped, names):
        found.setdefault(name.lower(), name)
    if not found:
        raise ValueError("no names: name structures, such as ['mandible', 'brainstem']")
    return tuple(found.values())


def stripped(name: str) -> str:
    """A structure's name without the space around it.

    Raises:
        ValueError: It is empty.
    """
    if not name.strip():
        raise ValueError("the name is empty; name a structure, such as 'mandible'")
    return name.strip()


def log_likelihoods(scan: Scan, prompt: str, answers: Sequence[str]) -> tuple[float, ...]:
    """See `Scan.log_likelihoods`."""
    if not answers:
        raise ValueError("no answers to judge: give at least one")
    return tuple(given_answers(scan, [(prompt, answer) for answer in answers]).likelihoods.tolist())


@dataclass(frozen=True)
class Given:
    """R exchanges that the model was made to read: how likely it finds their answers, in nats, ``(R,)``.

    ``states`` are the last ones behind the volume, ``(R, T, E)``, ``said`` the answers' tokens there, else -1.
    """

    likelihoods: Tensor
    states: Tensor
    said: Tensor


@torch.inference_mode()
def given_answers(scan: Scan, exchanges: Sequence[tuple[str, str]]) -> Given:
    """Let the model read prompts with answers that are given to it, all at once."""
    model, processor = scan.model, scan.processor
    rows = [encode_exchange(processor.tokenizer, processor.write(prompt), answer) for prompt, answer in exchanges]
    read, longest = scan.prefix.get_seq_length(), max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=model.device)
    labels = torch.tensor([some + [IGNORED] * (longest - len(some)) for _, some in rows], device=model.device)
    prefix = copy.deepcopy(scan.prefix)
    prefix.batch_repeat_interleave(len(rows))
    out = model(input_ids=ids[:, read:], past_key_values=prefix, output_hidden_states=True)
    following = labels[:, read + 1 :]
    logits = out.logits[:, :-1].flatten(0, 1).float()
    lost = F.cross_entropy(logits, following.flatten(), ignore_index=IGNORED, reduction="none")
    said = torch.where(labels == IGNORED, -1, ids)[:, read:]
    return Given(-lost.view(following.shape).sum(dim=1), out.hidden_states[-1], said)


class _Evidence:
    """What one answer asks for while it is said: drawn, measured, and kept."""

    def __init__(self, scan: Scan, asked: int) -> None:
        self.scan, self.asked = scan, asked
        self.found: list[FoundMeasure] = []
        self.drawn: dict[str, FoundMask] = {}
        self.notes: list[str] = []

    def value(self, wanted: Asking, sequence: Tensor) -> str:
        """Measure on the masks that the answer has drawn, ``(1, T)``; a name means one mask in an answer."""
        scan = self.scan
        if any(name not in self.drawn for name in wanted.names):
            prompts = _prompts(scan, *_states(scan, sequence, self.asked))
            last = None if prompts is None else prompts[-len(wanted.names) :]
            masks, said = draw(scan, wanted.names, last, None)
            for mask in masks:
                self.drawn.setdefault(mask.name, mask)
            self.notes.extend(said)
        unit: Unit = "HU" if isinstance(scan.processor.preprocess.intensity, Window) else "arbitrary"
        arrays = {name: mask.array for name, mask in self.drawn.items()}
        value = measured_on(scan.volume, arrays, wanted, unit=unit)
        self.found.append(FoundMeasure(wanted.measure, wanted.names, value, MEASURES[wanted.measure].unit))
        return value_words(wanted, value)


def _heard(sequence: Tensor, prompt: str, told: _Evidence, max_new_tokens: int) -> Spoken:
    """What an answer, ``(1, T)`` behind the tokens of its prompt, says and prompts."""
    scan, asked = told.scan, told.asked
    model, tokenizer = scan.model, scan.processor.tokenizer
    answer, notes = sequence[0, asked:], list(told.notes)
    text, prompts, evidence = plain_words(tokenizer, answer.tolist()), None, ""
    boxed = model.box_head is not None and bool((answer == model.config.box_start_token_id).any())
    if boxed or bool((answer == model.config.seg_token_id).any()):
        states, said = _states(scan, sequence, asked)
        prompts = _prompts(scan, states, said)
        if boxed:
            assert model.box_head is not None
            text = _written(text, read_boxes(model.box_head, states[said == model.config.box_start_token_id]))
    if told.found:
        evidence, text = answer_of(text)
        text = lettered(text, evidence, prompt)
        prompts = None if prompts is None else prompts[evidence.count(SEG_TOKEN) :]
        prompts = prompts if prompts is not None and len(prompts) and text else None
        if not text:
            notes.append(f"the answer was broken off at {max_new_tokens} tokens, before it was given; ask for more")
    return Spoken(text, prompts, evidence, tuple(told.found), tuple(told.drawn.values()), tuple(dict.fromkeys(notes)))


def _states(scan: Scan, sequence: Tensor, asked: int) -> tuple[Tensor, Tensor]:
    """Last states behind the volume, ``(1, T, E)``, and the tokens there that are the model's own, else -1."""
    read = scan.prefix.get_seq_length()
    rest = sequence[:, read:]
    past = copy.deepcopy(scan.prefix)
    out = scan.model(input_ids=rest, past_key_values=past, output_hidden_states=True, logits_to_keep=1)
    said = rest.clone()
    said[:, : asked - read] = -1  # a [SEG] that the user typed draws nothing
    return out.hidden_states[-1], said


def _prompts(scan: Scan, states: Tensor, said: Tensor) -> Tensor | None:
    """What each ``[SEG]`` tells the mask head; None where there is none, or no head."""
    where = find_seg_tokens(said, scan.model.config.seg_token_id)
    return scan.model.seg_prompts(states, where) if len(where) and scan.model.seg_head is not None else None


def _written(text: str, boxes: Tensor) -> str:
    """An answer whose boxes have the digits of ``boxes`` (N, 6), in order; one that was not ended stays as it is."""
    before, *begun = text.split(BOX_START)
    for number, (rest, box) in enumerate(zip(begun, boxes.tolist(), strict=True)):
        lo, hi = (tuple(map(side, box[:3], box[3:])) for side in (min, max))
        _, ended, after = rest.partition(BOX_END)
        begun[number] = Frac3().encode(Box(lo, hi, "norm")) + after if ended else BOX_START + rest
    return before + "".join(begun)
