"""Evidence as a model's own masks give it, for a language model that is to read what will be measured at use.

Masks err in ways of their own: one structure is drawn too large in everybody, another's edge is never found. Who
learned from the truth's values alone takes such a value at its word; who learned from these knows what it tends to
mean. On the grid of the store both masks are measured, and the difference is added to the value of the record, which
was measured on the scan itself: what the grid alone does to a value is in neither. Densities differ less than they will
at use where voxels lie beyond the store's limits of intensity. Ours; M3D-LaMed measures nothing.

``OUTPUT/own_evidence/RUN-RANK.jsonl`` has a line for each scan. RUN tells what was drawn, by which weights, so that the
values of another run are never read.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_prep.case import Case, Unit, layered
from data_prep.derived.measures import BELOW_TOP, MEASURES, measure
from data_prep.derived.scene import Scene
from data_prep.record import Evidence, Record
from data_prep.store import StoredImage
from data_prep.volume import Volume, closest_axes
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.processing import encode_exchange
from m3d.tasks.naming import SEG
from m3d.tasks.wordings import Phrases
from m3d.train import engines
from m3d.train.cases import TrainingCase

__all__ = ["Drawer", "Values", "own_evidence", "own_values"]

log = logging.getLogger(__name__)

FOLDER = "own_evidence"
MOST_AT_ONCE = 8
Masks = Mapping[str, npt.NDArray[np.bool_]]
Values = Mapping[str, tuple[float | None, ...]]
"""What was measured for each record's evidence, in its order, by the record's id; None where nothing was seen."""


@dataclass(frozen=True, eq=False)
class Drawer:
    """Draws structures of prepared cases by name, as the model is asked for them: ``(D, H, W)`` bool each."""

    model: M3DForConditionalGeneration
    processor: M3DProcessor
    bf16: bool = False

    @torch.no_grad()
    def __call__(self, case: TrainingCase, names: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
        """The masks of names, some at a time; the volume is looked at once."""
        device = next(self.model.parameters()).device
        drawn: dict[str, npt.NDArray[np.bool_]] = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            features = {"image": self.model.get_image_features(case.tensors()[0][None, None].to(device))}
            for start in range(0, len(names), MOST_AT_ONCE):
                some = names[start : start + MOST_AT_ONCE]
                say = Phrases()
                prompt = say("seg.sem", "prompt", names=say.join([say.named(name) for name in some]))
                answer = say("seg.sem", "answer", masks=say.join([f"{name} {SEG}" for name in some]))
                ids, _ = encode_exchange(self.processor.tokenizer, self.processor.write(prompt), answer)
                out: Any = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    mm_encoder_outputs=features,
                    draw_masks=True,
                    logits_to_keep=1,
                )
                masks = (out.mask_logits[:, 0] > 0).cpu().numpy()
                drawn.update(zip(some, masks, strict=True))
        return drawn


# -- what is measured -----------------------------------------------------------------------------------------------


def own_values(case: TrainingCase, draw: Drawer) -> dict[str, list[float | None]]:
    """A case's evidence by record; of records whose structures are not labelled on the grid, none.

    Raises:
        ValueError: A record rests on a measure that is none of ours.
    """
    labels = case.tensors()[1]
    true = {name: case.mask(labels, name).numpy() for name in case.image.names.values()}
    true = {name: mask for name, mask in true.items() if mask.any()}
    records = [one for one in case.records_at(range(len(case.entries))) if one.target.evidence]
    records = [one for one in records if _named(one) <= true.keys()]
    if not records:
        return {}
    drawn = draw(case, sorted(set().union(*map(_named, records))))
    own, truth = _scene(case, {name: mask for name, mask in drawn.items() if mask.any()}), _scene(case, true)
    longer = _grid_by_scan(case.image)
    return {
        record.id: [_value(own, truth, one, record.id, longer) for one in record.target.evidence or ()]
        for record in records
    }


def _named(record: Record) -> set[str]:
    return {name for one in record.target.evidence or () for name in one.names}


def _value(own: Scene, truth: Scene, one: Evidence, where: str, longer: float) -> float | None:
    """What own masks give in place of a true value."""
    if one.measure not in MEASURES:
        raise ValueError(f"{where}: {one.measure!r} is no measure of ours; `m3d data prepare` its store again")
    drawn, true = (measure(scene, one.measure, one.names) for scene in (own, truth))
    if true is None:  # on this grid it cannot be measured at all
        return one.value
    if drawn is None:
        return None
    return round(one.value + (drawn - true) * (longer if one.measure == BELOW_TOP else 1), 2)


def _scene(case: TrainingCase, masks: Masks) -> Scene:
    """What can be known of masks on a prepared case's grid."""
    image, pixels = case.image, case.tensors()[0].numpy()
    limits = image.media.intensity
    low, high = limits.lo or 0.0, 1.0 if limits.hi is None else limits.hi
    volume = Volume((pixels * (high - low) + low).astype(np.float32), image.affine)
    labels, names = layered(masks) if masks else (np.zeros((1, *volume.shape), np.uint8), {})
    unit: Unit = "HU" if limits.of == "HU" else "arbitrary"
    return Scene.of(
        Case(id=case.id, patient_id="", volume=volume, labels=labels, names=names, unit=unit, placed=image.placed)
    )


def _grid_by_scan(image: StoredImage) -> float:
    """How much longer the grid is than the scan along the body, of which places are shares."""

    def length(affine: npt.NDArray[np.float64], shape: Sequence[int]) -> float:
        axis = next(i for i, (patient, _) in enumerate(closest_axes(affine)) if patient == 2)
        return float(np.linalg.norm(affine[:3, axis]) * shape[axis])

    return length(image.affine, image.media.shape) / length(image.scan_affine, image.way.scan_shape)


# -- kept -----------------------------------------------------------------------------------------------------------


def own_evidence(draw: Drawer, cases: Sequence[TrainingCase], output: Path, facts: Mapping[str, Any]) -> Values:
    """What the model's own masks give for the evidence of the cases' records: drawn once, kept in a stage's output.

    Processes share the cases and wait for each other's; what a run that was stopped has left is read. ``facts`` are
    those of the stage's manifest.

    Raises:
        ValueError: The model draws nothing, or a record rests on a measure that is none of ours.
    """
    if draw.model.seg_head is None:
        raise ValueError("data.evidence=own needs a model that draws: init has no mask head; take data.evidence=truth")
    folder, run = output / FOLDER, _run(facts)
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = engines.rank(), int(os.environ.get("WORLD_SIZE", "1"))  # they have not met yet
    known = dict(_read(folder, run))
    wanted = {case.id: case for case in cases}
    mine = [case for case in list(wanted.values())[rank::world] if case.id not in known]
    was_training = draw.model.training
    draw.model.train(mode=False)
    with (folder / f"{run}-{rank}.jsonl").open("a", encoding="utf-8") as file:
        for case in tqdm(mine, desc="own masks", unit="scan", disable=rank != 0):
            line = {"image_id": case.id, "values": own_values(case, draw)}
            file.write(f"\n{json.dumps(line, allow_nan=False)}\n")  # a line that was cut off ends here
            file.flush()
    draw.model.train(was_training)
    while wanted.keys() - (known := dict(_read(folder, run))).keys():
        time.sleep(0.5)  # if another process fails, the launcher ends this one
    found = {record: tuple(values) for records in known.values() for record, values in records.items()}
    unseen = sum(value is None for values in found.values() for value in values)
    log.info("evidence of %d records as the model's own masks give it; %d values not seen", len(found), unseen)
    return found


def _run(facts: Mapping[str, Any]) -> str:
    """Tells runs apart whose values may differ: by recipe, data and the weights that they begin from."""
    hashes = [one["sha256"] for one in (*facts["data"], *facts["parents"].values())]
    return hashlib.sha256(json.dumps([facts["run_sha256"], *hashes]).encode()).hexdigest()[:12]


def _read(folder: Path, run: str) -> Iterator[tuple[str, dict[str, list[float | None]]]]:
    """What a run has measured, by image; of a line that was cut off, nothing."""
    for path in sorted(folder.glob(f"{run}-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            yield row["image_id"], row["values"]
