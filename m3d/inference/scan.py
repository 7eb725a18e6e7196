"""Scan: look once, ask often. The volume is encoded once and the language model's cache of it is kept."""

# M = masks, E = language width, (D, H, W) = the prepared grid

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.boxes import Box, to_mm, to_voxel
from data_prep.case import Unit
from data_prep.derived.measures import MEASURES
from data_prep.preprocess import Prepared, Window
from data_prep.volume import Volume
from m3d.inference.measuring import measured_on, plain_words, speak
from m3d.inference.prompting import Point, as_prompts, place_box, place_points, refuse_contradictions
from m3d.inference.results import FoundBox, FoundMask, FoundMeasure, Result
from m3d.inference.session import Session
from m3d.models import M3DForConditionalGeneration, M3DProcessor, M3DVolumeFeatures
from m3d.models.box_head import read_boxes
from m3d.models.processing import BOX_END, BOX_START, IGNORED, SEG_TOKEN, encode_exchange
from m3d.models.seg_token import find_seg_tokens
from m3d.tasks.base import Phrases
from m3d.tasks.codecs import Frac3
from m3d.tasks.evidence import Asking, answer_of, value_words
from m3d.tasks.segmentation import named_masks, names_before
from segvol_head import Prompts

MAX_NEW_TOKENS = 512


class NoMask(ValueError):
    """The model was asked to draw and answered without ``[SEG]``."""


@dataclass(frozen=True)
class Spoken:
    """An answer: its words, and for each ``[SEG]`` in them what it tells the mask head, ``(M, C)``.

    Where the model has a box head, the digits of boxes are written from it. ``measured`` and ``masks`` are the evidence
    that it gave first, as it said it in ``evidence``; ``notes`` are what to beware of.
    """

    text: str
    prompts: Tensor | None
    evidence: str = ""
    measured: tuple[FoundMeasure, ...] = ()
    masks: tuple[FoundMask, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scan:
    """One volume, already looked at; every method returns a `Result` on the scan's own grid."""

    model_id: str
    model: M3DForConditionalGeneration
    processor: M3DProcessor
    prepared: Prepared
    features: M3DVolumeFeatures
    prefix: Any
    path: Path | None = None

    @classmethod
    def of(
        cls,
        model_id: str,
        model: M3DForConditionalGeneration,
        processor: M3DProcessor,
        volume: Volume,
        path: Path | None = None,
    ) -> "Scan":
        """Prepare and encode a volume, and let the language model read it once."""
        return cls.of_prepared(model_id, model, processor, processor.preprocess.apply(volume), path)

    @classmethod
    def of_prepared(
        cls,
        model_id: str,
        model: M3DForConditionalGeneration,
        processor: M3DProcessor,
        prepared: Prepared,
        path: Path | None = None,
    ) -> "Scan":
        """Encode a volume that lies on the model's grid already, as a store keeps it."""
        features, prefix = _encode(model, processor, processor.pixels(prepared))
        return cls(model_id, model, processor, prepared, features, prefix, path)

    def blinded(self) -> "Scan":
        """The same scan with every voxel zero: what the model says without looking, for honest comparison.

        Its header stays: how long the scan is can be told without looking.
        """
        source = np.zeros_like(self.volume.array)
        return self._instead(np.zeros(self.prepared.shape, np.float32), source, "blind")

    def shown(self, array: npt.NDArray[np.float32]) -> "Scan":
        """The same scan, of which the model is shown another picture on its grid, ``(D, H, W)`` in [0, 1].

        Raises:
            ValueError: The picture has another shape.
        """
        if array.shape != self.prepared.shape:
            raise ValueError(f"the picture has shape {array.shape}, the model's grid {self.prepared.shape}")
        lo, hi = self.prepared.intensity["lo"], self.prepared.intensity["hi"]
        source = self.prepared.to_scan(array) * np.float32(hi - lo) + np.float32(lo)
        return self._instead(array, source, "shown another picture")

    def _instead(self, array: npt.NDArray[np.float32], source: npt.NDArray[np.float32], how: str) -> "Scan":
        prepared = replace(self.prepared, array=array, source=replace(self.volume, array=source))
        features, prefix = _encode(self.model, self.processor, torch.from_numpy(array)[None])
        return replace(self, model_id=f"{self.model_id} ({how})", prepared=prepared, features=features, prefix=prefix)

    @property
    def volume(self) -> Volume:
        """The scan as it was read."""
        return self.prepared.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the answers should know of how the scan was prepared."""
        return self.prepared.warnings

    def ask(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Result:
        """Ask anything; boxes and masks that the answer speaks of come with it, and the measures that it rests on.

        Raises:
            ValueError: The question is empty.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        return self._answer("ask", question.strip(), max_new_tokens)

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS, keep_logits: bool = False
    ) -> Iterator[Result]:
        """Ask several things at once, which takes much less time than one after another; see `ask`.

        The answers are those of `ask`, to rounding, and come one by one, so that masks need not stay in memory. With
        ``keep_logits`` those of an answer keep their logits on the grid.

        Raises:
            ValueError: A question is empty.
        """
        asked = [question.strip() for question in questions]
        if not all(asked):
            raise ValueError(f"question {asked.index('') + 1} of {len(asked)} is empty")
        return self._answer_all("ask", asked, max_new_tokens, keep_logits=keep_logits) if asked else iter(())

    def report(self, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Result:
        """Write the scan's report."""
        return self._answer("report", Phrases()("report", "prompt"), max_new_tokens)

    def locate(self, name: str) -> Result:
        """Find a structure: its box in voxels of the scan and in mm, or the answer that it is not there."""
        prompt = Phrases()("rec.box3d", "prompt", name=_named(name))
        return self._answer("locate", prompt, MAX_NEW_TOKENS, _named(name))

    def segment(
        self, name: str | None = None, *, points: Sequence[Point] | None = None, box: Box | None = None
    ) -> Result:
        """Draw a structure by name, by points and a box in voxels of the scan, or by both together.

        A point is ``((d, h, w), label)``, label 1 inside and 0 outside the structure.

        Raises:
            NoMask: The model answered the name without drawing, or drew something else.
            ValueError: Nothing was asked for, or a point or box lies outside the scan.
        """
        began = time.monotonic()
        geometry = self._geometry(points or [], box)
        if name is None and geometry is None:
            raise ValueError("say what to segment: a name, points, a box, or several of them")
        if name is None:
            masks, notes = self._draw([_label(points, box)], None, geometry)
            return self._result("segment", "", Spoken("", None), (), masks, notes, began)
        prompt, spoken, names = self._asked_to_draw(name)
        masks, notes = self._draw(names, spoken.prompts, geometry)
        own = replace(spoken, masks=())  # what it measured before it drew is none of what was asked for
        return self._result("segment", prompt, own, (), masks, notes, began)

    def session(self, *, feedback: bool | None = None) -> Session:
        """Draw interactively: points, boxes, scribbles, names and masks are added one by one, and taken back.

        With ``feedback`` the answer so far is a prompt of the next; None means where the model has learned that.

        Raises:
            ValueError: The model has no mask head, or cannot take ``feedback``.
        """
        return Session(self, feedback=feedback)

    @torch.inference_mode()
    def log_likelihoods(self, prompt: str, answers: Sequence[str]) -> tuple[float, ...]:
        """How likely the model finds each answer to a prompt: the log probabilities of its tokens added up, in nats.

        Raises:
            ValueError: There is no answer to judge.
        """
        if not answers:
            raise ValueError("no answers to judge: give at least one")
        model, processor = self.model, self.processor
        rows = [encode_exchange(processor.tokenizer, processor.write(prompt), answer) for answer in answers]
        read, longest = self.prefix.get_seq_length(), max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=model.device)
        labels = torch.tensor([some + [IGNORED] * (longest - len(some)) for _, some in rows], device=model.device)
        prefix = copy.deepcopy(self.prefix)
        prefix.batch_repeat_interleave(len(rows))
        logits = model(input_ids=ids[:, read:], past_key_values=prefix).logits[:, :-1]
        following = labels[:, read + 1 :]
        lost = F.cross_entropy(
            logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return tuple((-lost.view(following.shape).sum(dim=1)).tolist())

    # -- talking --------------------------------------------------------------------------------------------------

    def _answer(self, task: str, prompt: str, max_new_tokens: int, name: str | None = None) -> Result:
        (result,) = self._answer_all(task, [prompt], max_new_tokens, name)
        return result

    def _answer_all(
        self,
        task: str,
        prompts: Sequence[str],
        max_new_tokens: int,
        name: str | None = None,
        *,
        keep_logits: bool = False,
    ) -> Iterator[Result]:
        began = time.monotonic()
        all_spoken = self._speak_all(prompts, max_new_tokens)
        talking = (time.monotonic() - began) / len(prompts)
        for prompt in prompts:
            spoken = all_spoken.pop(0)  # masks of what was measured go when their answer has gone
            began = time.monotonic() - talking
            drawn = self._draw(named_masks(spoken.text), spoken.prompts, None, keep_logits=keep_logits)
            masks, notes = (*spoken.masks, *drawn[0]), (*spoken.notes, *drawn[1])
            codec = Frac3()
            found = codec.decode(spoken.text)
            names = names_before(spoken.text, BOX_START) if name is None else [name] * len(found)
            names += [""] * (len(found) - len(names))
            boxes = tuple(self._box(box, said) for box, said in zip(found, names, strict=False))
            if codec.counts["unparsed"]:
                notes = (*notes, f"{codec.counts['unparsed']} boxes of the answer could not be read")
            yield self._result(task, prompt, spoken, boxes, masks, notes, began)

    def _speak(self, prompt: str, max_new_tokens: int) -> Spoken:
        (spoken,) = self._speak_all([prompt], max_new_tokens)
        return spoken

    def _asked_to_draw(self, name: str) -> tuple[str, Spoken, list[str]]:
        """The prompt for a name, what was said to it, and the names of its masks, of which one is that name."""
        prompt = Phrases()("seg.sem", "prompt", names=f"the {_named(name)}")
        spoken = self._speak(prompt, MAX_NEW_TOKENS)
        if spoken.prompts is None:
            raise NoMask(f"no mask of {name!r}: the model answered {spoken.text!r} without [SEG]")
        asked = name.strip()
        # "Sure, it is [SEG]." names nothing: that mask is what was asked for.
        names = [said or asked for said in named_masks(spoken.text)]
        if asked.lower() not in [said.lower() for said in names]:
            drawn = ", ".join(map(repr, names))
            raise NoMask(f"no mask of {asked!r}: the model drew {drawn} instead; it may not know that name")
        return prompt, spoken, names

    def text_prompt(self, name: str) -> Tensor:
        """What the language model tells the mask head of a name, ``(1, C)``.

        Raises:
            NoMask: The model answered the name without drawing, or would draw something else.
        """
        _, spoken, names = self._asked_to_draw(name)
        assert spoken.prompts is not None
        number = [said.lower() for said in names].index(name.strip().lower())
        number = min(number, len(spoken.prompts) - 1)  # seg_config.merge="mean" has one for all
        return spoken.prompts[number : number + 1]

    @torch.inference_mode()
    def _speak_all(self, prompts: Sequence[str], max_new_tokens: int) -> list[Spoken]:
        model, tokenizer = self.model, self.processor.tokenizer
        written = [self.processor.write(prompt) for prompt in prompts]
        ids = [torch.tensor(tokenizer(text)["input_ids"], device=model.device) for text in written]
        told = [_Evidence(self, len(some)) for some in ids]
        sequences = speak(
            model,
            tokenizer,
            ids,
            measured=lambda number, wanted, sequence: told[number].value(wanted, sequence[None]),
            max_new_tokens=max_new_tokens,
            past=self.prefix,
        )
        return [
            self._heard(sequence[None], evidence, max_new_tokens)
            for sequence, evidence in zip(sequences, told, strict=True)
        ]

    def _heard(self, sequence: Tensor, told: "_Evidence", max_new_tokens: int) -> Spoken:
        """What an answer, ``(1, T)`` with its prompt, says and prompts."""
        model, tokenizer, asked = self.model, self.processor.tokenizer, told.asked
        answer, notes = sequence[0, asked:], list(told.notes)
        text, prompts, evidence = plain_words(tokenizer, answer.tolist()), None, ""
        boxed = model.box_head is not None and bool((answer == model.config.box_start_token_id).any())
        if boxed or bool((answer == model.config.seg_token_id).any()):
            states, said = self._states(sequence, asked)
            prompts = self._prompts(states, said)
            if boxed:
                assert model.box_head is not None
                text = _written(text, read_boxes(model.box_head, states[said == model.config.box_start_token_id]))
        if told.found:
            evidence, text = answer_of(text)
            prompts = None if prompts is None else prompts[evidence.count(SEG_TOKEN) :]
            prompts = prompts if prompts is not None and len(prompts) and text else None
            if not text:
                notes.append(f"the answer was broken off at {max_new_tokens} tokens, before it was given; ask for more")
        return Spoken(
            text, prompts, evidence, tuple(told.found), tuple(told.drawn.values()), tuple(dict.fromkeys(notes))
        )

    def _states(self, sequence: Tensor, asked: int) -> tuple[Tensor, Tensor]:
        """Last states behind the volume, ``(1, T, E)``, and the tokens there that are the model's own, else -1."""
        read = self.prefix.get_seq_length()
        rest = sequence[:, read:]
        past = copy.deepcopy(self.prefix)
        out = self.model(input_ids=rest, past_key_values=past, output_hidden_states=True, logits_to_keep=1)
        said = rest.clone()
        said[:, : asked - read] = -1  # a [SEG] that the user typed draws nothing
        return out.hidden_states[-1], said

    def _prompts(self, states: Tensor, said: Tensor) -> Tensor | None:
        """What each ``[SEG]`` tells the mask head; None where there is none, or no head."""
        where = find_seg_tokens(said, self.model.config.seg_token_id)
        return self.model.seg_prompts(states, where) if len(where) and self.model.seg_head is not None else None

    # -- drawing --------------------------------------------------------------------------------------------------

    def draw_one(
        self, name: str, *, text: Tensor | None, geometry: Prompts | None
    ) -> tuple[FoundMask, tuple[str, ...]]:
        """One mask with its logits on the grid, and what to beware of, of a `text_prompt`, of geometry, or of both."""
        (mask,), notes = self._draw([name], text, geometry, keep_logits=True)
        return mask, notes

    @torch.inference_mode()
    def _draw(
        self, names: Sequence[str], text: Tensor | None, geometry: Prompts | None, *, keep_logits: bool = False
    ) -> tuple[tuple[FoundMask, ...], tuple[str, ...]]:
        count = len(text) if text is not None else int(geometry is not None)
        if not count:
            return (), ()
        owner = torch.zeros(count, dtype=torch.long, device=self.model.device)
        if geometry is not None:
            geometry = geometry[owner].to(self.model.device)
        logits = self.model.draw(self.features, text=text, volume_index=owner, prompts=geometry)
        masks, notes = [], []
        for number, name in enumerate(names):
            own = logits[number, 0].float().cpu().numpy()
            mask = self._mask(name or f"mask {number + 1}", own)
            masks.append(replace(mask, logits=own) if keep_logits else mask)
            if not mask.array.any():
                notes.append(f"the mask of {mask.name!r} is empty: the model sees none of it")
        return tuple(masks), tuple(notes)

    def _mask(self, name: str, logits: npt.NDArray[np.float32]) -> FoundMask:
        """Bring logits, not a mask, back to the scan: the edge is then found at the scan's own resolution."""
        on_scan = self.prepared.to_scan(logits, order=1, fill=-30.0)
        inside = on_scan > 0
        probability = 1 / (1 + np.exp(-on_scan[inside] if inside.any() else -on_scan.max()))
        return FoundMask(
            name=name,
            array=inside,
            score=float(probability.mean()),
            volume_ml=float(inside.sum() * self.volume.voxel_ml),
        )

    # -- geometry -------------------------------------------------------------------------------------------------

    def _geometry(self, points: Sequence[Point], box: Box | None) -> Prompts | None:
        placed = [(place_points([at], self.volume)[0], label) for at, label in points]
        framed = None if box is None else place_box(box, self.volume)
        refuse_contradictions(placed, framed)
        return as_prompts(self.prepared, placed, framed)

    def _box(self, box: Box, name: str) -> FoundBox:
        """A normalised box of the grid, clipped to the scan's voxels."""
        on_scan = self.prepared.box_to_scan(to_voxel(box, self.prepared.shape))
        lo = [float(min(max(side, 0), limit)) for side, limit in zip(on_scan.lo, self.volume.shape, strict=True)]
        hi = [float(min(max(side, 0), limit)) for side, limit in zip(on_scan.hi, self.volume.shape, strict=True)]
        voxel = replace(on_scan, lo=tuple(lo), hi=tuple(hi))
        return FoundBox(name=name, voxel=voxel, mm=to_mm(voxel, self.volume.affine))

    def _result(
        self,
        task: str,
        prompt: str,
        spoken: Spoken,
        boxes: tuple[FoundBox, ...],
        masks: tuple[FoundMask, ...],
        notes: tuple[str, ...],
        began: float,
    ) -> Result:
        return Result(
            task=task,
            prompt=prompt,
            text=spoken.text,
            boxes=boxes,
            masks=masks,
            volume=self.volume,
            scan_path=self.path,
            model_id=self.model_id,
            preprocess=self.processor.preprocess.to_dict(),
            warnings=(*self.warnings, *notes),
            seconds=time.monotonic() - began,
            measured=spoken.measured,
            evidence=spoken.evidence,
            num_measured=len(spoken.masks),
        )


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
            prompts = scan._prompts(*scan._states(sequence, self.asked))
            last = None if prompts is None else prompts[-len(wanted.names) :]
            masks, said = scan._draw(wanted.names, last, None)
            for mask in masks:
                self.drawn.setdefault(mask.name, mask)
            self.notes.extend(said)
        unit: Unit = "HU" if isinstance(scan.processor.preprocess.intensity, Window) else "arbitrary"
        arrays = {name: mask.array for name, mask in self.drawn.items()}
        value = measured_on(scan.volume, arrays, wanted, unit=unit)
        self.found.append(FoundMeasure(wanted.measure, wanted.names, value, MEASURES[wanted.measure].unit))
        return value_words(wanted, value)


@torch.inference_mode()
def _encode(
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


def _written(text: str, boxes: Tensor) -> str:
    """An answer whose boxes have the digits of ``boxes`` (N, 6), in order; one that was not ended stays as it is."""
    before, *begun = text.split(BOX_START)
    for number, (rest, box) in enumerate(zip(begun, boxes.tolist(), strict=True)):
        lo, hi = (tuple(map(side, box[:3], box[3:])) for side in (min, max))
        _, ended, after = rest.partition(BOX_END)
        begun[number] = Frac3().encode(Box(lo, hi, "norm")) + after if ended else BOX_START + rest
    return before + "".join(begun)


def _named(name: str) -> str:
    if not name.strip():
        raise ValueError("the name is empty; name a structure, such as 'mandible'")
    return name.strip()


def _label(points: Sequence[Point] | None, box: Box | None) -> str:
    return "prompted by " + " and ".join(kind for kind, given in (("points", points), ("box", box)) if given)
