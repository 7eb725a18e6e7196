"""What a dry run finds: parameters, what is read of a volume, steps, data mix, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from m3d.recipes.talk import ExchangesConfig
from m3d.train.cases import TrainingCase
from m3d.train.estimate import Count, Verdict
from m3d.train.optim import OptimConfig

LEAST = 8
LONGEST = 512
"""Tokens of an exchange where a config sets no limit; the published one."""
CHARACTERS_A_TOKEN = 4
TEMPLATE_TOKENS = 16
"""What a task's wording and EOS add to a record's own words, about."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Values of one part, and how it learns."""

    name: str
    how: str
    trainable: int
    total: int


@dataclass(frozen=True, kw_only=True)
class TaskShare:
    """A task in the data: its records, the images that have some, and how often it is drawn."""

    task: str
    records: int
    images: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of a volume: ``texts`` rows, each of the volume and ``words`` tokens, and the masks they ask for."""

    volume_tokens: int
    words: int
    texts: int
    masks: float
    estimated_from: str

    @property
    def tokens(self) -> int:
        """BOS, the volume, and the words."""
        return 1 + self.volume_tokens + self.words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `m3d train --dry-run` says."""

    stage: str
    model: str
    parts: tuple[Part, ...] = ()
    trainable: int = 0
    total: int = 0
    reading: Reading | None = None
    images: int | None = None
    batch: int = 1
    steps: int | None = None
    epochs: float | None = None
    mix: tuple[TaskShare, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[Plan, ...] = ()

    def lines(self) -> Iterator[str]:
        """Sequence, step and length in words."""
        if self.reading is not None:
            read = self.reading
            yield (
                f"a volume: {read.texts} x {read.tokens:,} tokens (1 + {read.volume_tokens:,} of the volume + "
                f"{read.words:,} of text: {read.estimated_from}), {read.masks:.2g} masks"
            )
            yield f"a step: {self.batch:,} volumes, {self.batch * read.texts * read.tokens:,} tokens"
        elif self.verdicts:
            yield f"a step: {self.batch:,} volumes"
        if self.verdicts:
            yield f"steps: {self._length()}"

    def _length(self) -> str:
        images = "" if self.images is None else f" of {self.images:,} images"
        if self.steps is None:
            return f"{self.epochs:g} epochs; how many steps, the data say (none were given)"
        epochs = "" if self.epochs is None else f", {self.epochs:.3g} epochs{images}"
        return f"{self.steps:,}{epochs}"


def rows_of(counts: Mapping[str, Count], how: Mapping[str, str]) -> tuple[Part, ...]:
    """The table of parts."""
    named = {"lora": "lora", "new_tokens": "full"}
    found = []
    for name, count in counts.items():
        learned = how.get(name, named.get(name, "full")) if count.trainable or how.get(name) == "lora" else "frozen"
        found.append(Part(name=name, how=learned, trainable=count.trainable, total=count.total))
    return tuple(found)


def mix_of(cases: Sequence[TrainingCase], weights: Mapping[str, float]) -> tuple[TaskShare, ...]:
    """Records, images and weight of each task, the most frequent first."""
    records: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for case in cases:
        tasks = [entry.task for entry in case.entries]
        records.update(tasks)
        images.update(set(tasks))
    return tuple(
        TaskShare(task=task, records=number, images=images[task], weight=float(weights.get(task, 0)))
        for task, number in records.most_common()
    )


def reading_of(cases: Sequence[TrainingCase], data: ExchangesConfig, volume_tokens: int) -> Reading:
    """What is read of a volume, from the outlines of the records: the mean over tasks, by weight.

    Without records it is the most that there may be.

    Raises:
        ValueError: There is no room for text.
    """
    length: Counter[str] = Counter()
    number: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    for entry in (entry for case in cases for entry in case.entries if data.weights.get(entry.task, 0) > 0):
        number[entry.task] += 1
        length[entry.task] += TEMPLATE_TOKENS + entry.characters // CHARACTERS_A_TOKEN
        masks[entry.task] += min(entry.masks, data.most)
    shown = 1 + volume_tokens
    mean, drawn, source = float((data.max_length or LONGEST) - shown), 1.0, "the most there may be"
    if number:
        share = sum(data.weights[task] for task in number)
        mean = sum(data.weights[task] * length[task] / number[task] for task in number) / share
        drawn = sum(data.weights[task] * masks[task] / number[task] for task in number) / share
        source = f"estimated from {sum(number.values()):,} records"
    words = round(mean) * (data.exchanges if data.packing else 1)
    if data.max_tokens is not None and data.packing:
        words = min(words, data.max_tokens - shown)
    if words < LEAST:
        raise ValueError(
            f"data.max_length={data.max_length} and data.max_tokens={data.max_tokens} leave {words} tokens of text "
            f"beside the {volume_tokens} of a volume; raise them, or pool more patches (init.pool)"
        )
    asked = data.exchanges * drawn
    return Reading(
        volume_tokens=volume_tokens,
        words=words,
        texts=1 if data.packing else data.exchanges,
        masks=asked + 2 * min(data.simulated, asked),  # from a prompt, and from the correction of what it gave
        estimated_from=source,
    )


def length_of(optim: OptimConfig, images: int | None) -> tuple[int | None, float | None]:
    """Steps and epochs, as far as they are known."""
    if images is None:
        return optim.steps, None if optim.epochs is None else float(optim.epochs)
    if optim.steps is not None:
        return optim.steps, optim.steps * optim.batch / images
    assert optim.epochs is not None
    return optim.num_steps(optim.epochs * images), float(optim.epochs)
