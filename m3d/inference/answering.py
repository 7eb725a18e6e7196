"""Answers of a scan: what was said to a prompt, and drawn for it, put together as a `Result`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from m3d.inference.drawing import draw, found_box
from m3d.inference.presence import with_presence
from m3d.inference.results import FoundBox, FoundMask, NotDrawn, Result
from m3d.inference.talking import Spoken, distinct_names, speak_all
from m3d.inference.zooming import ZoomIn
from m3d.models.processing import BOX_START
from m3d.tasks.codecs import Frac3
from m3d.tasks.segmentation import named_masks, names_before
from segvol_head import Prompts

if TYPE_CHECKING:
    from m3d.inference.scan import Scan

__all__ = ["answer", "answer_all", "draw_each", "draw_named", "draw_pointed", "zoomed_in"]

NO_FINER = "the scan is no finer than the model's grid: there was nothing to zoom into"
OTHER_VOXELS = (
    "zooming in showed the model voxels of {}, and it is prepared for {}: unless it has learned from finer ones too, "
    "it draws worse than without"
)


def answer(scan: Scan, task: str, prompt: str, max_new_tokens: int, name: str | None = None) -> Result:
    """What is said to a prompt, with its boxes and masks; boxes are of ``name`` where it is given."""
    (result,) = answer_all(scan, task, [prompt], max_new_tokens, name)
    return result


def answer_all(
    scan: Scan,
    task: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    name: str | None = None,
    *,
    keep_logits: bool = False,
) -> Iterator[Result]:
    """Several prompts asked at once; answers come one by one, so that masks need not stay in memory."""
    began = time.monotonic()
    all_spoken = speak_all(scan, prompts, max_new_tokens)
    talking = (time.monotonic() - began) / len(prompts)
    for prompt in prompts:
        spoken = all_spoken.pop(0)  # masks of what was measured go when their answer has gone
        began = time.monotonic() - talking
        drawn = draw(scan, named_masks(spoken.text), spoken.prompts, None, keep_logits=keep_logits)
        masks, notes = (*spoken.masks, *drawn[0]), (*spoken.notes, *drawn[1])
        codec = Frac3()
        found = codec.decode(spoken.text)
        names = names_before(spoken.text, BOX_START) if name is None else [name] * len(found)
        names += [""] * (len(found) - len(names))
        boxes = tuple(found_box(scan.prepared, box, said) for box, said in zip(found, names, strict=False))
        if codec.counts["unparsed"]:
            notes = (*notes, f"{codec.counts['unparsed']} boxes of the answer could not be read")
        yield _result(scan, task, prompt, spoken, boxes, masks, notes, began)


def draw_pointed(scan: Scan, label: str, geometry: Prompts, zoom: ZoomIn | None = None) -> Result:
    """The one mask of points and a box, which nothing is said to."""
    began = time.monotonic()
    masks, notes = draw(scan, [label], None, geometry, zoom=zoom)
    return _result(scan, "segment", "", Spoken("", None), (), masks, notes, began)


def draw_named(scan: Scan, name: str, geometry: Prompts | None, zoom: ZoomIn | None = None) -> Result:
    """All masks of the answer to one name.

    Raises:
        NoMask: None of them is of that name.
    """
    began = time.monotonic()
    (asked,) = scan.asked_to_draw([name])
    asked.willing()
    masks, notes = draw(scan, asked.masks, asked.spoken.prompts, geometry, zoom=zoom)
    own = replace(asked.spoken, masks=())  # what it measured before it drew is none of what was asked for
    result = _result(scan, "segment", asked.prompt, own, (), masks, notes, began)
    return with_presence(scan, result, [asked.name]) if geometry is None else result


def draw_each(scan: Scan, names: Sequence[str], zoom: ZoomIn | None = None) -> Result:
    """One mask of each name, and which names have none.

    To zoom in, all are drawn on the model's grid first: what it takes is then known before the first window.
    """
    began = time.monotonic()
    wanted = distinct_names(names)
    spoken, prompts, masks, notes, refused = list[str](), list[str](), list[FoundMask](), list[str](), list[NotDrawn]()
    closer: list[tuple[str, Tensor]] = []
    with tqdm(total=len(wanted), desc="drawing", unit="name", leave=False, disable=None) as bar:
        for asked in scan.asked_to_draw(wanted):
            prompts.append(asked.prompt)
            spoken.append(asked.spoken.text)
            notes.extend(asked.spoken.notes)
            if asked.refused:
                refused.append(NotDrawn(asked.name, asked.refused))
            elif zoom is not None:
                closer.append((asked.name, asked.text_prompt))
            else:
                (mask,), beware = draw(scan, [asked.name], asked.text_prompt, None)
                masks.append(mask)
                notes.extend(beware)
            bar.update()
    if closer:
        said = torch.cat([text for _, text in closer])
        drawn, beware = draw(scan, [name for name, _ in closer], said, None, zoom=zoom)
        masks.extend(drawn)
        notes.extend(beware)
    all_said = Spoken("\n".join(spoken), None, notes=tuple(dict.fromkeys(notes)))
    result = _result(scan, "segment", "\n".join(prompts), all_said, (), tuple(masks), all_said.notes, began)
    return with_presence(scan, replace(result, asked=wanted, not_drawn=tuple(refused)), wanted)


def zoomed_in(result: Result, zoom: ZoomIn | None) -> Result:
    """The same result, which says how closely was looked."""
    if zoom is None:
        return result
    if not zoom.useful:
        return replace(result, warnings=(*result.warnings, NO_FINER))
    learned, notes = result.preprocess["spacing"], result.warnings
    if learned is not None:
        notes = (*notes, OTHER_VOXELS.format(_mm(zoom.spacing), _mm(learned)))
    return replace(result, drawn_at_mm=zoom.spacing, warnings=notes)


def _mm(sides: Sequence[float]) -> str:
    return " x ".join(f"{side:.1f}" for side in sides) + " mm"


def _result(
    scan: Scan,
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
        volume=scan.volume,
        scan_path=scan.path,
        model_id=scan.model_id,
        preprocess=scan.processor.preprocess.to_dict(),
        warnings=(*scan.warnings, *notes),
        seconds=time.monotonic() - began,
        measured=spoken.measured,
        evidence=spoken.evidence,
        num_measured=len(spoken.masks),
    )
