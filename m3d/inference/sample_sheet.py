"""One entry of a store as a person sees it: its image in three planes, its boxes and masks, what is asked and answered.

Drawn from the stored voxels and rendered by the task itself, so that what is shown is what training will draw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.boxes import Box, to_voxel
from data_prep.record import Record
from data_prep.store import Store, StoredImage, unpack
from data_prep.volume import Volume
from m3d.inference.planes import Finding, Window, mid_planes
from m3d.tasks import TASKS, Rendered, render
from m3d.tasks.codecs import Frac3

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["Sample", "choose_samples", "contact_sheet", "draw_sample"]

CARD_WIDTH, CARD_GAP = 1150, 24  # pixels
MENTIONED = 6


@dataclass(frozen=True, eq=False)
class Sample:
    """A record with its image and its words; ``rendered`` is None where no task of ours knows how, ``problem`` why."""

    record: Record
    image: StoredImage
    rendered: Rendered | None
    problem: str = ""

    @property
    def words(self) -> list[tuple[str, str]]:
        """What is asked and what is to be said."""
        if self.rendered is None:
            return [("problem", self.problem)]
        return [("asked", self.rendered.prompt or "(nothing: a caption)"), ("answer", self.rendered.answer)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        said = {label: text for label, text in self.words}
        return {"task": self.record.task, "id": self.record.id, "image_id": self.image.image_id, **said}


def choose_samples(
    store: Store, *, tasks: Sequence[str] | None = None, image_id: str | None = None, seed: int = 0
) -> list[Sample]:
    """One record of each task, chosen by ``seed``; one that has something to draw rather than one that has not.

    Raises:
        ValueError: It has no such image, no record of a task that is asked for, or no record at all.
    """
    entries = store.records.images
    if not entries:
        raise ValueError(f"{store.root} holds no record, so there is nothing to show; `m3d data verify` says why")
    if image_id is not None:
        if image_id not in entries:
            raise ValueError(f"{store.root} has no image {image_id!r}; its first is {next(iter(entries), 'none')!r}")
        entries = {image_id: entries[image_id]}
    found = sorted({task for entry in entries.values() for task in entry.tasks})
    missing = sorted(set(tasks or ()) - set(found))
    if missing:
        where = f"image {image_id}" if image_id else str(store.root)
        raise ValueError(f"{where} has no record of task {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    samples = []
    for task in tasks or found:
        rng = random.Random(f"{seed}/{task}")
        chosen = rng.choice([name for name, entry in entries.items() if task in entry.tasks])
        records = [record for record in store.records.of(chosen) if record.task == task]
        drawn = [record for record in records if record.target.boxes or record.target.masks]
        samples.append(_sample(rng.choice(drawn or records), store))
    return samples


def draw_sample(sample: Sample) -> Figure:
    """Three planes through what the record is about (else the middle), with its words beneath.

    Raises:
        BadScan: The image or its masks cannot be read.
    """
    from m3d.inference.overlay import Row, draw_rows

    image, record = sample.image, sample.record
    volume = Volume(unpack(image.array()), image.affine)
    findings, mentioned = _findings(record, image), []
    if not findings and not (record.target.boxes or record.target.masks):
        mentioned = findings = _mentioned(sample)
    planes = mid_planes(volume, findings, around=Box((0, 0, 0), volume.shape))
    what = f"{record.task} ({record.subtask})" if record.subtask else record.task
    grid = " x ".join(map(str, volume.shape))
    spacing = " x ".join(f"{side:.3g}" for side in volume.spacing)
    facts = f"{grid} voxels of {spacing} mm, {volume.orientation}, {record.split}"
    if not image.placed:
        facts = f"{grid} voxels, {record.split}; spacing and orientation are not known, the letters are guesses"
    by_rule = "; derived by rule" if "derivation" in record.meta else ""
    notes = [f"{facts}; as stored{by_rule}. Source: {record.source.dataset}."]
    if mentioned:
        notes.append("Drawn is what the words mention, for the reader: the task itself has no mask.")
    return draw_rows(
        [Row(planes, Window(0.0, 1.0), smooth=False)],
        findings,
        title=f"{what}   {image.image_id}",
        notes=notes,
        words=sample.words,
    )


def contact_sheet(figures: Sequence[Figure], columns: int = 2) -> Image:
    """All figures on one page, each in the column that is shortest so far."""
    from PIL import Image

    cards = []
    for figure in figures:
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]  # Agg has it
        card = Image.fromarray(np.ascontiguousarray(pixels))
        cards.append(card.resize((CARD_WIDTH, round(card.height * CARD_WIDTH / card.width)), Image.Resampling.LANCZOS))
    columns = min(columns, len(cards))
    heights = [CARD_GAP] * columns
    places = []
    for card in cards:
        column = heights.index(min(heights))
        places.append((CARD_GAP + column * (CARD_WIDTH + CARD_GAP), heights[column]))
        heights[column] += card.height + CARD_GAP
    sheet = Image.new("RGB", (CARD_GAP + columns * (CARD_WIDTH + CARD_GAP), max(heights)), "#2a2f37")
    for card, place in zip(cards, places, strict=True):
        sheet.paste(card, place)
    return sheet


def _sample(record: Record, store: Store) -> Sample:
    image = store.images.get(record.image_id)
    if image is None:
        raise ValueError(f"{store.root}/images.jsonl has no image {record.image_id!r}; run `m3d data verify` on it")
    try:
        return Sample(record, image, render(TASKS, record, codec=Frac3()))
    except (ValueError, KeyError, OSError) as error:
        return Sample(record, image, None, f"cannot be rendered: {error}")


def _mentioned(sample: Sample) -> list[Finding]:
    """The labelled structures whose names stand in the question or the answer, the first named first."""
    text = " ".join(words for _, words in sample.words).casefold()
    places = {value: text.find(name.casefold()) for value, name in sample.image.names.items()}
    values = sorted((value for value, place in places.items() if place >= 0), key=lambda value: places[value])
    labels = sample.image.labels() if values else None
    if labels is None:
        return []
    masks = ((sample.image.names[value], (labels == value).any(axis=0)) for value in values[:MENTIONED])
    return [Finding(name, mask) for name, mask in masks if mask.any()]


def _findings(record: Record, image: StoredImage) -> list[Finding]:
    """What the target draws or boxes, a mask and a box of one name together."""
    labels = image.labels() if record.target.masks else None
    boxes: dict[str, list[Box | None]] = {}
    for truth in record.target.boxes or ():
        if truth.frame != "mm":
            voxel = to_voxel(Box(truth.lo, truth.hi, truth.frame, truth.name), image.media.shape)
            boxes.setdefault(truth.name or "box", []).append(voxel)
    findings = []
    for mask in record.target.masks or ():
        if mask.label is not None and labels is not None:
            beside = boxes.pop(mask.name, [None])
            findings.append(Finding(mask.name, (labels == mask.label).any(axis=0), beside[0]))
    findings += [Finding(name, box=box) for name, some in boxes.items() for box in some]
    return [finding for finding in findings if finding.visible]
