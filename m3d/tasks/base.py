"""What a task is: a record in, a prompt and an answer out, and a parser for what a model says.

Records hold numbers, never sentences about geometry: a prompt is rendered when its sample is drawn, after augmentation,
so that a box in the text is the box in the picture.
"""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import yaml

from data_prep.record import Record
from m3d.config import lookup
from m3d.tasks.codecs import BoxCodec


@dataclass(frozen=True)
class Rendered:
    """One exchange in words; ``masks`` names what each ``[SEG]`` of the answer draws, in order."""

    prompt: str
    answer: str
    masks: tuple[str, ...] = ()


class Task(Protocol):
    """``name`` is the record's ``task`` field; see `m3d.tasks.registry` for all of them."""

    name: str

    def render(self, record: Record, say: "Phrases", codec: BoxCodec) -> Rendered:
        """Write the prompt and the answer of a record."""

    def parse(self, text: str, codec: BoxCodec) -> Any:  # noqa: ANN401
        """Read a model's answer."""


@functools.cache
def templates(lang: str) -> dict[str, Any]:
    """The wordings of a language, keyed by task; a YAML a language under ``m3d/tasks/templates``.

    Raises:
        FileNotFoundError: There are no templates in that language.
    """
    path = resources.files("m3d.tasks") / "templates" / f"{lang}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no templates for lang={lang!r}; add m3d/tasks/templates/{lang}.yaml")
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


@dataclass(frozen=True)
class Phrases:
    """The wordings of one language: the first of each in evaluation, a seeded choice in training."""

    lang: str = "en"
    rng: random.Random | None = None

    def __call__(self, task: str, part: str, **slots: object) -> str:
        """One wording of ``part`` (``prompt``, ``answer``, ``absent``) of a task, its slots filled."""
        variants: Sequence[str] = templates(self.lang)[task][part]
        return (variants[0] if self.rng is None else self.rng.choice(variants)).format(**slots)


def render(
    tasks: Mapping[str, Task], record: Record, *, codec: BoxCodec, lang: str = "en", rng: random.Random | None = None
) -> Rendered:
    """Render a record by its own task.

    Raises:
        KeyError: No task has the record's name.
    """
    return lookup(tasks, record.task).render(record, Phrases(lang, rng), codec)
