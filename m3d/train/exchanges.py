"""From records to exchanges: what is asked of a volume and answered, drawn, made true of the picture, and in tokens."""

# K = placeholders of a volume, L = label layers

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.boxes import box_of_mask, to_norm
from data_prep.laterality import mirrored, strings_in
from data_prep.record import Evidence, MaskTruth, Record
from m3d.models.processing import IGNORED
from m3d.tasks.evidence import words_of
from m3d.train.cases import Entry, TrainingCase


@dataclass(frozen=True, eq=False)
class Exchange:
    """One prompt and answer as the model reads them standing alone, image placeholders and all.

    ``labels`` are -100 outside the answer; ``masks`` (m, 1, D, H, W) are those of its ``[SEG]``, in order. ``boxes``
    (b, 6) are those of the answer's ``<bx_start>``: lo and hi along d, h, w as shares of the grid, NaN where not known.
    ``value`` is what was measured, where that is the answer, in the unit of the question. ``names`` are those of the
    masks.
    """

    id: str
    ids: list[int]
    labels: list[int]
    masks: Tensor | None = None
    boxes: Tensor | None = None
    value: float | None = None
    names: tuple[str, ...] = ()


# -- choosing -------------------------------------------------------------------------------------------------------


def choose(
    entries: Sequence[Entry],
    weights: Mapping[str, float],
    count: int,
    rng: random.Random,
    *,
    whole_first: bool = False,
    moving: bool = False,
) -> list[int]:
    """Draw the numbers of at most ``count`` entries: a task by its weight, one of its subtasks, one record of that.

    A task without weight is never drawn. No record is drawn twice, but those with several masks, which `narrow` makes
    another question each time. ``whole_first`` begins with the record that has most masks, if ``seg.sem`` has weight.
    ``moving`` leaves out what is true of one pose only.
    """
    pools: dict[str, dict[str, list[int]]] = {}
    for number, entry in enumerate(entries):
        if weights.get(entry.task, 0) > 0 and entry.images == 1 and not (moving and entry.fixed):
            pools.setdefault(entry.task, {}).setdefault(entry.subtask, []).append(number)
    chosen = _most_masks(entries, pools) if whole_first else []
    while len(chosen) < count and pools:
        task = rng.choices(list(pools), [weights[task] for task in pools])[0]
        subtask = rng.choice(list(pools[task]))
        number = rng.choice(pools[task][subtask])
        chosen.append(number)
        if entries[number].masks < 2:
            _remove(pools, task, subtask, number)
    return chosen


def _most_masks(entries: Sequence[Entry], pools: Mapping[str, Mapping[str, Sequence[int]]]) -> list[int]:
    numbers = [number for some in pools.get("seg.sem", {}).values() for number in some if entries[number].masks]
    return [max(numbers, key=lambda number: entries[number].masks)] if numbers else []


def _remove(pools: dict[str, dict[str, list[int]]], task: str, subtask: str, number: int) -> None:
    pools[task][subtask].remove(number)
    if not pools[task][subtask]:
        del pools[task][subtask]
    if not pools[task]:
        del pools[task]


def reorder(record: Record, rng: random.Random, count: int | None = None) -> Record:
    """Ask for ``count`` of a segmentation record's masks (all by default), in any order."""
    masks = list(record.target.masks or ())
    return _asking_for(record, rng.sample(masks, k=count or len(masks))) if _asks_by_name(record) else record


def narrow(record: Record, rng: random.Random, most: int = 2) -> Record:
    """Ask for at most ``most`` of a segmentation record's masks; other records stay as they are."""
    masks = record.target.masks or ()
    return reorder(record, rng, rng.randint(1, min(most, len(masks)))) if _asks_by_name(record) else record


def _asks_by_name(record: Record) -> bool:
    """Whether prompt and answer are written from the names of the masks, so that some may be left out."""
    own = record.prompt.text is not None or record.target.text is not None
    return record.task == "seg.sem" and bool(record.target.masks) and not own


def _asking_for(record: Record, masks: Sequence[MaskTruth]) -> Record:
    slots = {"objects": [mask.name for mask in masks]}
    return record.model_copy(
        update={
            "prompt": record.prompt.model_copy(update={"slots": slots}),
            "target": record.target.model_copy(update={"masks": tuple(masks)}),
        }
    )


# -- true of the picture --------------------------------------------------------------------------------------------


def place(record: Record, case: TrainingCase, labels: Tensor) -> Record | None:
    """Give a record the geometry of the picture; None where what it speaks of has left the picture.

    A box of something that has no label stays as it stands: the picture of such a record must not be moved.
    """
    if record.target.masks:
        seen = [mask for mask in record.target.masks if case.mask(labels, mask.name).any()]
        if _asks_by_name(record) and seen:
            return _asking_for(record, seen)  # what has left the picture is not asked for
        return record if len(seen) == len(record.target.masks) else None
    if not record.target.boxes:
        return record
    boxes, labelled = [], set(case.image.names.values())
    for box in record.target.boxes:
        if box.name not in labelled:
            boxes.append(box)
            continue
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
        yield from words_of(true.evidence or ())


def mirror(record: Record) -> Record:
    """The record of the mirrored picture: left is right in every text and name."""
    prompt, target = record.prompt, record.target
    asked = {"text": _mirrored(prompt.text), "slots": _mirrored(prompt.slots)}
    true: dict[str, Any] = {"text": _mirrored(target.text), "options": _mirrored(target.options)}
    if target.evidence is not None:
        true["evidence"] = tuple(map(_mirrored_evidence, target.evidence))
    for group in ("boxes", "masks"):
        some = getattr(target, group)
        renamed = [one.model_copy(update={"name": mirrored(one.name)}) for one in some or ()]
        true[group] = None if some is None else tuple(renamed)
    return record.model_copy(
        update={"prompt": prompt.model_copy(update=asked), "target": target.model_copy(update=true)}
    )


def _mirrored_evidence(one: Evidence) -> Evidence:
    return one.model_copy(update={"measure": mirrored(one.measure), "names": _mirrored(one.names)})


def _mirrored(value: Any) -> Any:  # noqa: ANN401  (whatever a slot holds)
    if isinstance(value, str):
        return mirrored(value)
    if isinstance(value, dict):
        return {key: _mirrored(one) for key, one in value.items()}
    return type(value)(map(_mirrored, value)) if isinstance(value, (list, tuple)) else value


def shown(evidence: Sequence[Evidence], case: TrainingCase, labels: Tensor) -> bool:
    """Whether all that evidence was measured of is labelled and in the picture."""
    labelled = set(case.image.names.values())
    names = {name for one in evidence for name in one.names}
    return names <= labelled and all(bool(case.mask(labels, name).any()) for name in names)


def box_targets(record: Record, count: int) -> Tensor | None:
    """The boxes of an answer in which ``count`` begin, ``(count, 6)``; NaN where they are not the record's own."""
    boxes = record.target.boxes or ()
    if not count:
        return None
    if len(boxes) != count or any(box.frame != "norm" for box in boxes):
        return torch.full((count, 6), torch.nan)
    return torch.tensor([[*box.lo, *box.hi] for box in boxes])


# -- in tokens ------------------------------------------------------------------------------------------------------


def shorten(
    ids: list[int], labels: list[int], max_length: int | None, seg_token_id: int
) -> tuple[list[int], list[int]] | None:
    """Cut an exchange to ``max_length`` tokens, or None where it must not be cut.

    A cut answer has no end-of-sequence token, or it would teach to stop in mid-sentence. An answer with a ``[SEG]`` is
    refused, for its masks would have lost their names, and so is one of which nothing is left to learn.
    """
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    kept = labels[:max_length]
    if seg_token_id in ids or all(label == IGNORED for label in kept):
        return None
    return ids[:max_length], kept
