"""What a task is: a record in, a prompt and an answer out, and a parser for what a model says.

Records hold numbers, never sentences about geometry: a prompt is rendered when its sample is drawn, after augmentation,
so that a box in the text is the box in the picture.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep.boxes import Box, to_norm
from data_prep.record import Record
from m3d.config import hint, lookup
from m3d.tasks.codecs import BoxCodec
from m3d.tasks.wordings import SLOTS, Phrases, templates

__all__ = ["Phrases", "Rendered", "Task", "ask", "norm_boxes", "render", "slot", "templates"]


@dataclass(frozen=True)
class Rendered:
    """One exchange in words; ``masks`` names what each ``[SEG]`` of the answer draws, in order.

    ``prompt`` is empty where nothing is asked: the caption of a retrieval record. ``given`` are the stretches of the
    answer that a tool writes, not the model, as places of characters: first, and one beyond the last. ``chosen`` are
    the words of the option that the answer chooses by its letter.
    """

    prompt: str
    answer: str
    masks: tuple[str, ...] = ()
    given: tuple[tuple[int, int], ...] = ()
    chosen: str = ""


class Task(Protocol):
    """``name`` is the record's ``task`` field, ``needs`` the keys of its target; `m3d.tasks.registry` has them all."""

    name: str
    needs: tuple[str, ...]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Write the prompt and the answer of a record."""

    def parse(self, text: str, codec: BoxCodec) -> Any:  # noqa: ANN401
        """Read a model's answer."""


def render(
    tasks: Mapping[str, Task],
    record: Record,
    *,
    codec: BoxCodec,
    lang: str | None = None,
    rng: random.Random | None = None,
) -> Rendered:
    """Render a record by its own task, in ``lang`` or else the record's own language.

    Raises:
        KeyError: No task has the record's name.
        ValueError: The record lacks what its task needs, or names a template that is not ours.
    """
    task = lookup(tasks, record.task)
    for key in task.needs:
        if getattr(record.target, key) is None:
            raise ValueError(f"record {record.id}: task {record.task} needs target.{key}; `m3d data verify` finds such")
    _check_template(record)
    return task.render(record, Phrases(lang or record.lang, rng), codec)


def _check_template(record: Record) -> None:
    template = record.prompt.template
    known = [f"m3d.{name}" for name in (record.task, *SLOTS) if name == record.task or name.startswith(record.task)]
    if template is not None and template not in known:
        raise ValueError(
            f"record {record.id}: task {record.task} has no template {template!r}; "
            f"{hint(template, sorted(set(known)))}, or give prompt.text"
        )


def by_description(record: Record) -> bool:
    """Whether a record speaks of its structure by a description, not by a name alone."""
    template = record.prompt.template or ""
    return record.subtask == "description" or template.endswith(".description") or "description" in record.prompt.slots


def ask(record: Record, say: Phrases, wording: str, **slots: object) -> str:
    """The record's own text as it stands, else a wording of the prompt."""
    return record.prompt.text if record.prompt.text is not None else say(wording, "prompt", **slots)


def slot(record: Record, name: str) -> str:
    """A slot of the prompt, "" where the record is asked by a text of its own.

    Raises:
        ValueError: The template's slot is not there, or blank.
    """
    if record.prompt.text is not None:
        return ""
    value = str(record.prompt.slots.get(name, "")).strip()
    if not value:
        raise ValueError(
            f"record {record.id}: template {record.prompt.template} needs prompt.slots.{name}; "
            f"it has {sorted(record.prompt.slots)}"
        )
    return value


def description(record: Record) -> str:
    """The description in the prompt's slots, without its full stop: it stands within a sentence of ours."""
    return slot(record, "description").rstrip(" .。")


def norm_boxes(record: Record) -> list[Box]:
    """The record's boxes as fractions of their images.

    Raises:
        ValueError: A box is given in mm, which a record's image cannot place.
    """
    boxes = []
    for truth in record.target.boxes or ():
        if truth.frame == "mm":
            raise ValueError(f"record {record.id}: the box of {truth.name!r} is in mm; give it in stored voxels")
        box = Box(lo=truth.lo, hi=truth.hi, frame=truth.frame, name=truth.name)
        boxes.append(to_norm(box, record.media[truth.media].size))
    return boxes
