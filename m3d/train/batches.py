"""Batches around volumes: several exchanges about each volume share its one encoding.

Texts are rendered after augmentation, so boxes and masks are those of the picture that is shown.
"""

# B = exchanges, T = tokens, V = volumes, M = [SEG] tokens of all exchanges in reading order

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.boxes import box_of_mask, to_norm
from data_prep.laterality import bound_axes, mirrorable, mirrored, speaks_of_density, strings_in
from data_prep.record import MaskTruth, Record
from m3d.models.processing import M3DProcessor
from m3d.tasks import TASKS, Rendered, render
from m3d.tasks.codecs import BoxCodec
from m3d.train.augment import Augment, Augmented
from m3d.train.cases import PreparedCase

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """``labels`` is -100 outside answers; ``masks`` (M, 1, D, H, W) bool, ``mask_volume`` (M,) their volumes."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor
    volume_index: Tensor
    masks: Tensor
    mask_volume: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Move every tensor."""
        moved: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device) for name, value in moved.items()})


def encode_exchange(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of ``prompt answer EOS``; only the answer and EOS are learned.

    Prompt and answer are tokenised together, as they will stand, and told apart by their character offsets.
    """
    encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
    ids: list[int] = [*encoded["input_ids"], tokenizer.eos_token_id]
    learned = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
    return ids, [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]


def choose(records: Sequence[Record], weights: dict[str, float], count: int, rng: random.Random) -> list[Record]:
    """Draw exchanges: first all that can be drawn, then by each task's weight one of its records."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    whole = sorted(by_task.get("seg.sem", ()), key=lambda record: len(record.target.masks or ()))[-1:]
    whole = [record for record in whole if record.target.masks]
    tasks = [task for task in by_task if weights.get(task, 0) > 0]
    more = rng.choices(tasks, [weights[task] for task in tasks], k=count - len(whole)) if tasks else []
    return [reorder(record, rng) for record in whole] + [narrow(rng.choice(by_task[task]), rng) for task in more]


def holding(records: Iterable[Record]) -> list[Record]:
    """The records that stay true when the patient is turned by a few degrees or shifted (``meta["pose"]``)."""
    return [record for record in records if record.meta.get("pose") != "fixed"]


def reorder(record: Record, rng: random.Random, count: int | None = None) -> Record:
    """Ask for ``count`` of a segmentation record's masks (all by default), in any order."""
    masks = list(record.target.masks or ())
    return _asking_for(record, rng.sample(masks, k=count or len(masks)))


def narrow(record: Record, rng: random.Random, most: int = 2) -> Record:
    """Ask for at most ``most`` of a segmentation record's masks; other records stay as they are."""
    masks = record.target.masks or ()
    several = record.task == "seg.sem" and masks
    return reorder(record, rng, rng.randint(1, min(most, len(masks)))) if several else record


def place(record: Record, case: PreparedCase, labels: Tensor) -> Record | None:
    """Give a record the geometry of the picture; None where what it speaks of has left the picture."""
    if record.target.masks:
        seen = [mask for mask in record.target.masks if case.mask(labels, mask.name).any()]
        if record.task == "seg.sem" and seen:
            return _asking_for(record, seen)  # what has left the picture is not asked for
        return record if len(seen) == len(record.target.masks) else None
    if not record.target.boxes:
        return record
    boxes = []
    for box in record.target.boxes:
        mask = case.mask(labels, box.name).numpy()
        if not mask.any():
            return None
        norm = to_norm(box_of_mask(mask, box.name), mask.shape)
        boxes.append(box.model_copy(update={"lo": norm.lo, "hi": norm.hi, "frame": "norm"}))
    return record.model_copy(update={"target": record.target.model_copy(update={"boxes": tuple(boxes)})})


def spoken(records: Iterable[Record]) -> Iterator[str]:
    """All that the texts of these records may say, templates aside."""
    for record in records:
        asked, true = record.prompt, record.target
        yield from strings_in([asked.text, asked.slots, true.text, true.options, true.quantity, true.unit])
        yield from (one.name for _, one in true.placed)


def mirror(record: Record) -> Record:
    """The record of the mirrored picture: left is right in every text and name."""
    prompt, target = record.prompt, record.target
    asked = {"text": _mirrored(prompt.text), "slots": _mirrored(prompt.slots)}
    true: dict[str, Any] = {"text": _mirrored(target.text), "options": _mirrored(target.options)}
    for group in ("boxes", "masks"):
        some = getattr(target, group)
        renamed = [one.model_copy(update={"name": mirrored(one.name)}) for one in some or ()]
        true[group] = None if some is None else tuple(renamed)
    return record.model_copy(
        update={"prompt": prompt.model_copy(update=asked), "target": target.model_copy(update=true)}
    )


def _mirrored(value: Any) -> Any:  # noqa: ANN401  (whatever a slot holds)
    if isinstance(value, str):
        return mirrored(value)
    if isinstance(value, dict):
        return {key: _mirrored(one) for key, one in value.items()}
    return type(value)(map(_mirrored, value)) if isinstance(value, (list, tuple)) else value


def _asking_for(record: Record, masks: Sequence[MaskTruth]) -> Record:
    slots = {"objects": [mask.name for mask in masks]}
    return record.model_copy(
        update={
            "prompt": record.prompt.model_copy(update={"slots": slots}),
            "target": record.target.model_copy(update={"masks": tuple(masks)}),
        }
    )


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded on the right: ``(B, T)`` and its attention mask."""
    length = max(map(len, rows))
    padded = torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return padded, attention


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Draw training batches of ``volumes`` cases with ``exchanges`` records each; seeded by step, so a step repeats."""

    cases: Sequence[PreparedCase]
    processor: M3DProcessor
    codec: BoxCodec
    weights: dict[str, float]
    augment: Augment | None = None
    volumes: int = 1
    exchanges: int = 6
    seed: int = 0

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        images, rows, masks, mask_volume, ids = [], [], [], [], []
        for number, case in enumerate(rng.sample(list(self.cases), self.volumes)):
            image, labels = case.tensors()
            moving = self.augment is not None and rng.random() < self.augment.probability
            chosen = choose(holding(case.records) if moving else case.records, self.weights, self.exchanges, rng)
            if self.augment is not None:
                texts = list(spoken(chosen))
                moved = self._moved(self.augment, case, image, labels, texts, generator, pose=moving)
                image, labels = moved.image, moved.labels
                chosen = [mirror(record) for record in chosen] if moved.mirrored else chosen
            images.append(image[None])
            for record in chosen:
                shown = place(record, case, labels)
                if shown is None:
                    continue
                said = render(TASKS, shown, codec=self.codec, rng=rng)
                rows.append((number, said))
                masks += [case.mask(labels, name)[None] for name in said.masks]
                mask_volume += [number] * len(said.masks)
                ids.append(record.id)
        return self._collate(torch.stack(images), rows, masks, mask_volume, ids)

    @staticmethod
    def _moved(
        augment: Augment,
        case: PreparedCase,
        image: Tensor,
        labels: Tensor,
        texts: list[str],
        generator: torch.Generator,
        *,
        pose: bool,
    ) -> Augmented:
        """Augment as far as the texts of this volume stay true."""
        bound = bound_axes(texts)
        return augment(
            image,
            labels,
            case.spacing,
            generator,
            sides="R" in bound,
            bound=bound,
            orient=case.image.media.orient,
            density=any(map(speaks_of_density, texts)),
            names=case.image.names if all(map(mirrorable, texts)) else None,
            pose=pose,
        )

    def _collate(
        self,
        pixel_values: Tensor,
        rows: list[tuple[int, Rendered]],
        masks: list[Tensor],
        mask_volume: list[int],
        ids: list[str],
    ) -> Batch:
        tokenizer = self.processor.tokenizer
        encoded = [encode_exchange(tokenizer, self.processor.write(said.prompt), said.answer) for _, said in rows]
        input_ids, attention = pad([tokens for tokens, _ in encoded], tokenizer.pad_token_id)
        labels, _ = pad([learned for _, learned in encoded], IGNORED)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention,
            labels=labels,
            pixel_values=pixel_values,
            volume_index=torch.tensor([number for number, _ in rows]),
            masks=torch.stack(masks) if masks else torch.zeros(0, *pixel_values.shape[1:], dtype=torch.bool),
            mask_volume=torch.tensor(mask_volume, dtype=torch.long),
            ids=tuple(ids),
        )
