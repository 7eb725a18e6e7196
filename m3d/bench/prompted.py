"""Ask for masks by what a user points at, frames or has drawn before, alone or beside the record's own words.

`m3d.bench.simulated` says what that user, who knows the truth, does. What each kind of prompt comes to is an answer of
its own. A structure of which the truth has no voxel cannot be pointed at: that is said by name, and nothing is judged.
"""

# M = masks, C = width of the mask head

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data_prep.record import Record
from m3d.bench.cases import Opened, Question
from m3d.bench.config import BenchConfig
from m3d.bench.kinds import CLICKS, MASK, TEXT, parts_of
from m3d.bench.mask_files import keep_mask
from m3d.bench.predictions import UNPROMPTABLE, DrawnMask, Prediction, Sight, match_names
from m3d.bench.simulated import Told, click_on, dice, tell
from m3d.inference.prompting import as_prompts, mask_logits
from m3d.inference.scan import Scan
from m3d.inference.session import Session
from m3d.inference.talking import speak_all
from m3d.models.config import M3DConfig
from m3d.models.modeling import NO_HEAD
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3
from m3d.tasks.naming import named_masks

__all__ = ["Prompting", "check_model"]

Mask = npt.NDArray[np.bool_]


def check_model(config: BenchConfig, model: M3DConfig) -> None:
    """See, before anything is asked, that the model takes all kinds of prompts.

    Raises:
        ValueError: It has no mask head, or that has not learned to use an earlier mask.
    """
    for name, task in config.tasks.items():
        pointed = [kind for kind in task.prompts if kind != TEXT]
        if pointed and model.seg is None:
            raise ValueError(f"tasks.{name}.prompts: {NO_HEAD}, or leave {pointed[0]!r} out")
        masked = [kind for kind in pointed if MASK in parts_of(kind)]
        if masked and model.seg is not None and not model.seg.mask_prompt:
            raise ValueError(
                f"tasks.{name}.prompts has {masked[0]!r}, but the model has not learned to use an earlier mask "
                "(seg_config.mask_prompt); leave it out"
            )


@dataclass(frozen=True, eq=False)
class Prompting:
    """One scan as it is seen, and where its answers go."""

    scan: Scan
    opened: Opened
    config: BenchConfig
    folder: Path
    sight: Sight

    def answers(self, questions: Sequence[Question], limit: int) -> Iterator[list[Prediction]]:
        """Ask, some records at once; what the model says to a record's words serves all its kinds of prompt."""
        by_record: dict[str, list[Question]] = {}
        for question in questions:
            by_record.setdefault(question.record.id, []).append(question)
        groups = list(by_record.values())
        for first in range(0, len(groups), self.config.batch):
            some = groups[first : first + self.config.batch]
            began = time.monotonic()
            worded = [group[0].record for group in some if any(TEXT in parts_of(one.by) for one in group)]
            said = self._said(worded, limit)
            listening = (time.monotonic() - began) / max(1, len(worded))
            for group in some:
                yield [self._answer(one, said.get(one.record.id), listening) for one in group]

    def _said(self, records: Sequence[Record], limit: int) -> dict[str, _Said]:
        if not records:
            return {}
        asked = [render(TASKS, record, codec=Frac3()).prompt for record in records]
        found = {}
        for record, prompt, spoken in zip(records, asked, speak_all(self.scan, asked, limit), strict=True):
            wanted = [mask.name for mask in record.target.masks or ()]
            matched = match_names(wanted, named_masks(spoken.text)) if spoken.prompts is not None else []
            vectors: list[Tensor | None] = [None] * len(wanted)
            for number, place in enumerate(matched):
                if place is not None and spoken.prompts is not None:
                    last = min(place, len(spoken.prompts) - 1)  # seg_config.merge="mean" has one for all
                    vectors[number] = spoken.prompts[last : last + 1]
            found[record.id] = _Said(prompt, spoken.text, vectors)
        return found

    def _answer(self, question: Question, said: _Said | None, listening: float) -> Prediction:
        began, record, worded = time.monotonic(), question.record, TEXT in parts_of(question.by)
        answer = Prediction.of(record, self.sight, question.by)
        if said is not None and worded:
            answer = replace(answer, text=said.text)
        try:
            drawn, words = self._drawn(question, said if worded else None)
        except _CannotBePrompted as error:
            return replace(answer, failure=f"{UNPROMPTABLE}: {error}")
        failure = None if drawn else "NoMask: the answer has no [SEG]"
        seconds = round(time.monotonic() - began + (listening if worded else 0.0), 4)
        return replace(answer, prompt=words, masks=drawn, failure=failure, seconds=seconds)

    def _drawn(self, question: Question, said: _Said | None) -> tuple[tuple[DrawnMask, ...], str]:
        """The masks of a record, and in words what was told for them."""
        record, clicked = question.record, CLICKS in parts_of(question.by)
        truths = record.target.masks or ()
        if not truths:
            raise _CannotBePrompted("what is asked for is not there")
        drawn, words = list[DrawnMask](), [] if said is None else [said.prompt]
        for number, one in enumerate(truths):
            told, truth = self._told(question, number)
            if told.mask is not None and not self.scan.prepared.mask_to_grid(told.mask).any():
                words.append(f"{one.name}: nothing of the earlier mask is left on the model's coarser grid")
                continue  # which is the model's failing: nothing was drawn
            text = None if said is None else said.vectors[number]
            if said is not None and text is None and not clicked:
                continue  # the model would not draw it; a user who clicks begins from nothing
            look = self._by_clicks if clicked else self._at_once
            mask, steps, clicks = look(one.name, told, text, truth)
            words.append(f"{one.name}: {clicks or told.in_words()}")
            kept = None
            if self.config.keep_masks:
                kept = keep_mask(self.folder, question, self.sight, number, one.name, mask, self.opened.volume)
            drawn.append(DrawnMask(name=one.name, file=kept, steps=tuple(round(step, 6) for step in steps)))
        return tuple(drawn), "\n".join(words)

    def _told(self, question: Question, number: int) -> tuple[Told, Mask]:
        """What the user says of one structure, and where that is."""
        record = question.record
        truth = self.opened.mask(record, number)
        assert record.target.masks is not None
        if not truth.any():
            raise _CannotBePrompted(f"the truth of {record.target.masks[number].name!r} has no voxel")
        told = tell(question.by, truth, self.opened.volume, f"{self.config.seed}/{record.id}/{number}")
        return told, truth

    def _at_once(self, name: str, told: Told, text: Tensor | None, truth: Mask) -> tuple[Mask, tuple[float, ...], str]:
        """One pass of the mask head; Dice of a mask that was given stands before that of the answer."""
        way = self.scan.prepared
        earlier = None if told.mask is None else mask_logits(way, told.mask)
        geometry = as_prompts(way, told.points, told.box, mask=earlier)
        found, _ = self.scan.draw_one(name, text=text, geometry=geometry)
        if told.mask is None:
            return found.array, (), ""
        spacing = self.opened.volume.spacing
        return found.array, (dice(told.mask, truth, spacing), dice(found.array, truth, spacing)), ""

    def _by_clicks(
        self, name: str, told: Told, text: Tensor | None, truth: Mask
    ) -> tuple[Mask, tuple[float, ...], str]:
        """A session: what is told at once comes first, then one click after another."""
        target = _Session(self.scan, text).object(name)
        if told.mask is not None:
            target.add_mask(told.mask)
        if told.box is not None:
            target.add_box(told.box)
        if text is not None:
            target.add_name(name)
        found = click_on(target, truth, self.opened.volume.spacing)
        return found.mask, found.dice, str(target.current.given)


@dataclass(frozen=True, eq=False)
class _Said:
    """What the model said to a record's words, and what that tells the mask head of each mask, ``(1, C)``."""

    prompt: str
    text: str
    vectors: Sequence[Tensor | None]


class _CannotBePrompted(Exception):
    """There is nothing to point at."""


class _Session(Session):
    """A session in which a name says what the record's own words said."""

    def __init__(self, scan: Scan, text: Tensor | None) -> None:
        super().__init__(scan)
        self._text = text

    def text_prompt(self, name: str) -> Tensor:
        """What was said, ``(1, C)``."""
        assert self._text is not None
        return self._text
