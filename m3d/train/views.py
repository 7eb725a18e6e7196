"""What a stage looks at: exchanges about a volume, or masks by name; one data set serves both.

Texts are rendered after augmentation, so boxes and masks are those of the picture that is shown, and augmentation goes
only as far as the texts stay true.
"""

# m = masks of an exchange or volume, L = label layers, (D, H, W) = the model's grid

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from data_prep.laterality import bound_axes, mirrorable, mirrored, speaks_of_density
from data_prep.record import Record
from m3d.models.processing import BOX_START, SEG_TOKEN, M3DProcessor, encode_exchange
from m3d.tasks import TASKS, check_tasks, render
from m3d.tasks.base import Rendered
from m3d.tasks.codecs import BoxCodec
from m3d.tasks.evidence import measure_first
from m3d.train.augment import Augment, Augmented
from m3d.train.cases import Arrays, TrainingCase, holds_in_one_pose, to_tensors
from m3d.train.exchanges import (
    Exchange,
    box_targets,
    choose,
    mirror,
    narrow,
    place,
    reorder,
    shorten,
    shown,
    spoken,
)

log = logging.getLogger(__name__)

Item = TypeVar("Item", covariant=True)


@dataclass(frozen=True, eq=False)
class Look:
    """A case, read to be shown: ``index`` is its place in the data set, ``seed`` what chance may depend on."""

    case: TrainingCase
    arrays: Arrays
    rng: random.Random
    index: int
    seed: str


class View(Protocol[Item]):
    """What is taken of a case."""

    def wants(self, case: TrainingCase) -> bool:
        """Whether the case has anything to show."""

    def size(self, case: TrainingCase, rng: random.Random) -> int:
        """About how long its row will be, without reading anything; ``rng`` is that of the `Look` to come."""

    def show(self, look: Look) -> Item:
        """The item."""


def moved(
    look: Look, texts: Sequence[str], augment: Augment | None, *, pose: bool | None = None, fixed: bool = False
) -> Augmented:
    """The case's tensors, augmented as far as the texts stay true.

    ``pose`` turns and shifts, or not, where it is not left to chance; ``fixed`` changes intensities alone.
    """
    image, labels = to_tensors(look.arrays)
    generator = torch.Generator().manual_seed(look.rng.getrandbits(63))
    if augment is None:
        return Augmented(image, labels, torch.eye(4, dtype=torch.float64).numpy())
    bound = bound_axes(texts)
    if fixed:
        augment, pose = replace(augment, flip=0.0, quarter_turn=0.0), False
    return augment(
        image,
        labels,
        look.case.spacing,
        generator,
        sides="R" in bound,
        bound=bound,
        orient=look.case.image.media.orient,
        density=any(map(speaks_of_density, texts)),
        names=look.case.image.names if all(map(mirrorable, texts)) else None,
        pose=pose,
    )


def has_task(weights: Mapping[str, float], case: TrainingCase) -> bool:
    """Whether a case has a record, about it alone, of a task with weight."""
    return any(weights.get(entry.task, 0) > 0 and entry.images == 1 for entry in case.entries)


# -- exchanges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Talk:
    """A volume ``(1, D, H, W)`` and the exchanges about it; ``lost`` counts those that were cut or left out, by why.

    ``picture`` names the volume as it is shown, where the same will be shown again.
    """

    id: str
    index: int
    seed: str
    pixels: Tensor
    exchanges: tuple[Exchange, ...]
    lost: Counter[str]
    picture: str | None = None


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """Exchanges of all tasks, drawn by weight.

    Attributes:
        weights: How often each task is drawn; one that is not named, or 0, never is.
        exchanges: How many are drawn for a volume.
        max_tokens: No more are added once a volume's packed row would be longer.
        max_length: Tokens of one exchange standing alone; a longer answer is cut, or left out if it draws.
        whole_first: Begin with the record that asks for most masks, all at once.
        most: Masks that other segmentation exchanges ask for at most.
        looks: In how many ways each volume is varied; 0 for anew at every visit.
        measured: Share of the answers that measure what they rest on first, where that is known.
        unseen: Share of these whose values are not seen, so that an answer does without, too.
    """

    processor: M3DProcessor
    codec: BoxCodec
    weights: Mapping[str, float]
    augment: Augment | None = None
    exchanges: int = 8
    max_tokens: int | None = None
    max_length: int | None = None
    whole_first: bool = False
    most: int = 2
    looks: int = 0
    measured: float = 0.0
    unseen: float = 0.0
    warned: Counter[str] = field(default_factory=Counter, repr=False, compare=False, init=False)

    def __post_init__(self) -> None:
        """Refuse weights and sizes that cannot be."""
        if any(weight < 0 for weight in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"weights={dict(self.weights)} must be 0 or more, and one of them above 0")
        check_tasks(self.weights, "weights")
        smallest = self.processor.num_image_tokens + 8
        for name in ("max_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value} leaves no room beside the {smallest - 8} tokens of a volume")
        if self.exchanges < 1 or self.most < 1 or self.looks < 0:
            raise ValueError(
                f"exchanges={self.exchanges} and most={self.most} must be 1 or more, looks={self.looks} not below 0"
            )
        if not (0 <= self.measured <= 1 and 0 <= self.unseen <= 1):
            raise ValueError(f"measured={self.measured} and unseen={self.unseen} must be shares, from 0 to 1")

    @cached_property
    def seg_token_id(self) -> int:
        """The id of ``[SEG]``."""
        found = self.processor.tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        assert isinstance(found, int)
        return found

    @cached_property
    def box_token_id(self) -> int:
        """The id of ``<bx_start>``."""
        found = self.processor.tokenizer.convert_tokens_to_ids(BOX_START)
        assert isinstance(found, int)
        return found

    def wants(self, case: TrainingCase) -> bool:
        """Whether a record of the case can be drawn."""
        return has_task(self.weights, case)

    def size(self, case: TrainingCase, rng: random.Random) -> int:
        """The prefix, and four characters a token."""
        numbers, _, _ = self._choose(case, rng)
        said = [case.entries[number] for number in numbers]
        words = sum(16 + entry.characters // 4 for entry in said)
        return self.processor.num_image_tokens + min(words, self.max_tokens or words)

    def _choose(self, case: TrainingCase, rng: random.Random) -> tuple[list[int], bool, str | None]:
        """The records of a visit, and whether the picture moves, of which those that hold in one pose say nothing.

        Also the name of the picture, where the same is shown again.
        """
        chance = self.augment.probability if self.augment is not None else 0.0
        picture = f"{case.id}/{rng.randrange(self.looks) if chance else 'as it is'}" if self.looks else None
        moves = (rng if picture is None else random.Random(picture)).random() < chance
        for moving in (moves, False):
            numbers = choose(
                case.entries, self.weights, self.exchanges, rng, whole_first=self.whole_first, moving=moving
            )
            if numbers:
                break
        if moving != moves and picture is not None:
            picture = f"{case.id}/still"
        return numbers, moving, picture

    def show(self, look: Look) -> Talk:
        """Draw records, move the picture, write them true of it."""
        case, rng = look.case, look.rng
        numbers, moving, picture = self._choose(case, rng)
        records = case.records_at(numbers)
        everything = self.whole_first and bool(case.entries[numbers[0]].masks)
        asked = [
            reorder(record, rng) if everything and turn == 0 else narrow(record, rng, self.most)
            for turn, record in enumerate(records)
        ]
        shown = self._moved(look, asked, moving, picture)
        lost: Counter[str] = Counter()
        exchanges: list[Exchange] = []
        length = 1 + self.processor.num_image_tokens
        for record in asked:
            exchange = self._write(mirror(record) if shown.mirrored else record, look, shown.labels, lost)
            if exchange is None:
                continue
            length += len(exchange.ids) - self.processor.num_image_tokens - 1
            if self.max_tokens is not None and length > self.max_tokens and exchanges:
                lost["over max_tokens"] += 1
                break
            exchanges.append(exchange)
        return Talk(case.id, look.index, look.seed, shown.image[None], tuple(exchanges), lost, picture)

    def _moved(self, look: Look, asked: Sequence[Record], moving: bool, picture: str | None) -> Augmented:
        """The picture, moved as far as its texts stay true; where it has a name, all texts that may be drawn of it."""
        case, said = look.case, asked
        if picture is not None:
            look = replace(look, rng=random.Random(f"{picture}/moved"))
            numbers = [number for number, entry in enumerate(case.entries) if not (moving and entry.fixed)]
            said = case.records_at(numbers)
        known = set(case.image.names.values())
        fixed = any(box.name not in known for record in said for box in record.target.boxes or ())
        fixed = fixed or any(holds_in_one_pose(record.meta) for record in said)
        return moved(look, list(spoken(said)), self.augment, pose=moving, fixed=fixed)

    def _write(self, record: Record, look: Look, labels: Tensor, lost: Counter[str]) -> Exchange | None:
        true = place(record, look.case, labels)
        if true is None:
            lost["left the picture"] += 1
            return None
        said = render(TASKS, true, codec=self.codec, rng=look.rng)
        ids, learned = self._encode(said)
        evidence = true.target.evidence
        if self.measured and evidence and true.lang == "en" and shown(evidence, look.case, labels):
            first = measure_first(said, evidence, seen=look.rng.random() >= self.unseen)
            tokens = self._encode(first)
            if self.max_length is not None and len(tokens[0]) > self.max_length:
                lost["not measured"] += 1  # the answer alone may fit
            elif look.rng.random() < self.measured:
                said, (ids, learned) = first, tokens
        short = shorten(ids, learned, self.max_length, self.seg_token_id)
        if short is None:
            self._warn("refused", record.id, len(ids), lost)
            return None
        if len(short[0]) < len(ids):
            self._warn("cut", record.id, len(ids), lost)
        masks = [look.case.mask(labels, name)[None] for name in said.masks]
        boxes = box_targets(true, sum(label == self.box_token_id for label in short[1]))
        stacked = torch.stack(masks) if masks else None
        return Exchange(record.id, *short, stacked, boxes, true.target.value, names=said.masks)

    def _encode(self, said: Rendered) -> tuple[list[int], list[int]]:
        prompt = self.processor.write(said.prompt)
        return encode_exchange(self.processor.tokenizer, prompt, said.answer, said.given)

    def _warn(self, what: str, record_id: str, length: int, lost: Counter[str]) -> None:
        """Count what did not fit, and say so at 1, 10, 100, ... of them."""
        lost[what] += 1
        self.warned[what] += 1
        number = self.warned[what]
        if str(number).strip("0") == "1":
            means = {"cut": "its answer is cut and has no end", "refused": "it is left out"}[what]
            log.warning(
                "%d exchanges so far were %s, the last %s: %d tokens are more than max_length=%s, %s",
                number, what, record_id, length, self.max_length, means,
            )  # fmt: skip


# -- masks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawn:
    """A volume ``(1, D, H, W)`` and structures of it: ``masks`` (m, 1, D, H, W) bool, one for each of ``names``."""

    id: str
    index: int
    seed: str
    pixels: Tensor
    masks: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Structures by name: at most ``masks`` that are in the picture, and ``absent`` that are certainly not."""

    augment: Augment | None = None
    masks: int = 4
    absent: int = 0

    def wants(self, case: TrainingCase) -> bool:
        """Whether the case has labels."""
        return bool(case.image.names) and case.image.masks is not None

    def size(self, case: TrainingCase, rng: random.Random) -> int:
        """All volumes are alike."""
        return 1

    def show(self, look: Look) -> Drawn:
        """Draw names, move the picture; what has left it is not drawn."""
        case, names = look.case, look.case.image.names
        before = set(torch.from_numpy(look.arrays[1]).unique().tolist())
        shown = moved(look, list(names.values()), self.augment)
        after = set(shown.labels.unique().tolist())
        there = [name for value, name in names.items() if value in after]
        # where the picture is mirrored, labels have changed sides, and so has what was never there
        gone = [mirrored(name) if shown.mirrored else name for value, name in names.items() if value not in before]
        chosen = look.rng.sample(there, k=min(self.masks, len(there)))
        if self.absent and case.image.complete:
            chosen += look.rng.sample(gone, k=min(self.absent, len(gone)))
        masks = [case.mask(shown.labels, name)[None] for name in chosen]
        stacked = torch.stack(masks) if masks else torch.zeros(0, 1, *shown.image.shape, dtype=torch.bool)
        return Drawn(case.id, look.index, look.seed, shown.image[None], stacked, tuple(chosen))


# -- captions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captioned:
    """A volume ``(1, D, H, W)`` and a text about it; ``id`` is the record's, ``picture`` as in `Talk`."""

    id: str
    index: int
    seed: str
    pixels: Tensor
    text: str
    picture: str | None = None
