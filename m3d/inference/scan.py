"""Scan: look once, ask often. The volume is encoded once and the language model's cache of it is kept.

How it talks is in `m3d.inference.talking`, how it draws in `m3d.inference.drawing`.
"""

# C = width of the mask head, (D, H, W) = the prepared grid

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import Box
from data_prep.preprocess import Prepared
from data_prep.volume import Volume
from m3d.inference.drawing import draw, found_box, geometry_prompts
from m3d.inference.prompting import Point
from m3d.inference.results import FoundBox, FoundMask, Result
from m3d.inference.session import Session
from m3d.inference.talking import (
    MAX_NEW_TOKENS,
    NoMask,
    Spoken,
    asked_to_draw,
    encode,
    log_likelihoods,
    speak_all,
    stripped,
)
from m3d.models import M3DForConditionalGeneration, M3DProcessor, M3DVolumeFeatures
from m3d.models.processing import BOX_START
from m3d.tasks.base import Phrases
from m3d.tasks.codecs import Frac3
from m3d.tasks.segmentation import named_masks, names_before
from segvol_head import Prompts

__all__ = ["MAX_NEW_TOKENS", "NoMask", "Scan"]


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
        features, prefix = encode(model, processor, processor.pixels(prepared))
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
        features, prefix = encode(self.model, self.processor, torch.from_numpy(array)[None])
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
        prompt = Phrases()("rec.box3d", "prompt", name=stripped(name))
        return self._answer("locate", prompt, MAX_NEW_TOKENS, stripped(name))

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
        geometry = geometry_prompts(self.prepared, points or [], box)
        if name is None and geometry is None:
            raise ValueError("say what to segment: a name, points, a box, or several of them")
        if name is None:
            masks, notes = draw(self, [_label(points, box)], None, geometry)
            return self._result("segment", "", Spoken("", None), (), masks, notes, began)
        prompt, spoken, names = asked_to_draw(self, name)
        masks, notes = draw(self, names, spoken.prompts, geometry)
        own = replace(spoken, masks=())  # what it measured before it drew is none of what was asked for
        return self._result("segment", prompt, own, (), masks, notes, began)

    def session(self, *, feedback: bool | None = None) -> Session:
        """Draw interactively: points, boxes, scribbles, names and masks are added one by one, and taken back.

        With ``feedback`` the answer so far is a prompt of the next; None means where the model has learned that.

        Raises:
            ValueError: The model has no mask head, or cannot take ``feedback``.
        """
        return Session(self, feedback=feedback)

    def log_likelihoods(self, prompt: str, answers: Sequence[str]) -> tuple[float, ...]:
        """How likely the model finds each answer to a prompt: the log probabilities of its tokens added up, in nats.

        Raises:
            ValueError: There is no answer to judge.
        """
        return log_likelihoods(self, prompt, answers)

    def text_prompt(self, name: str) -> Tensor:
        """What the language model tells the mask head of a name, ``(1, C)``.

        Raises:
            NoMask: The model answered the name without drawing, or would draw something else.
        """
        _, spoken, names = asked_to_draw(self, name)
        assert spoken.prompts is not None
        number = [said.lower() for said in names].index(name.strip().lower())
        number = min(number, len(spoken.prompts) - 1)  # seg_config.merge="mean" has one for all
        return spoken.prompts[number : number + 1]

    def draw_one(
        self, name: str, *, text: Tensor | None, geometry: Prompts | None
    ) -> tuple[FoundMask, tuple[str, ...]]:
        """One mask with its logits on the grid, and what to beware of, of a `text_prompt`, of geometry, or of both."""
        (mask,), notes = draw(self, [name], text, geometry, keep_logits=True)
        return mask, notes

    # -- answers --------------------------------------------------------------------------------------------------

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
        all_spoken = speak_all(self, prompts, max_new_tokens)
        talking = (time.monotonic() - began) / len(prompts)
        for prompt in prompts:
            spoken = all_spoken.pop(0)  # masks of what was measured go when their answer has gone
            began = time.monotonic() - talking
            drawn = draw(self, named_masks(spoken.text), spoken.prompts, None, keep_logits=keep_logits)
            masks, notes = (*spoken.masks, *drawn[0]), (*spoken.notes, *drawn[1])
            codec = Frac3()
            found = codec.decode(spoken.text)
            names = names_before(spoken.text, BOX_START) if name is None else [name] * len(found)
            names += [""] * (len(found) - len(names))
            boxes = tuple(found_box(self.prepared, box, said) for box, said in zip(found, names, strict=False))
            if codec.counts["unparsed"]:
                notes = (*notes, f"{codec.counts['unparsed']} boxes of the answer could not be read")
            yield self._result(task, prompt, spoken, boxes, masks, notes, began)

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


def _label(points: Sequence[Point] | None, box: Box | None) -> str:
    return "prompted by " + " and ".join(kind for kind, given in (("points", points), ("box", box)) if given)
