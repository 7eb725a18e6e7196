"""From answers to numbers, without the model: samples beside their truth, then every metric with its interval.

Masks are judged a scan at a time, in several processes. What was asked and not answered is a failure, at its worst.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.record import Record
from data_prep.volume import BadScan
from m3d.bench import bootstrap
from m3d.bench.bootstrap import RESAMPLES, SEED, Estimate, summed
from m3d.bench.cases import BenchCase, Opened, group_of
from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample
from m3d.bench.metrics.choices import chance
from m3d.bench.metrics.masks import MaskPair
from m3d.bench.metrics.registry import OF_MASKS, metrics_of
from m3d.bench.predictions import SIGHTS, DrawnMask, Key, Prediction, Sight, match_names
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3

__all__ = ["Judged", "judge_samples", "metrics_table", "read_mask", "write_samples"]

SCHEMA = "m3d.bench/1"
MISSING = "Missing: not answered"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer beside its truth, and the statistics of every metric that judges it."""

    sample: Sample
    sight: Sight
    group: str
    statistics: Mapping[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The line of ``samples.jsonl``."""
        record = self.sample.record
        return {
            "id": record.id,
            "sight": self.sight,
            "task": record.task,
            "subtask": record.subtask,
            "image_id": record.image_id,
            "patient_id": record.patient_id,
            "group": self.group,
            "failure": self.sample.failure,
            "text": self.sample.said,
            "reference": self.sample.reference,
            "statistics": {
                name: [one if np.isfinite(one) else None for one in row] for name, row in self.statistics.items()
            },
        }


# -- one scan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scan:
    """A scan's part of a run; picklable, for another process."""

    case: BenchCase
    predictions: dict[Key, Prediction]
    sights: tuple[Sight, ...]
    folder: Path
    protocol: ProtocolName

    def judged(self) -> list[Judged]:
        """Its samples; of masks the statistics too, without the masks."""
        return [self._judged(record, sight) for sight in self.sights for record in self._records()]

    def _records(self) -> list[Record]:
        return [record for record in self.case.records if record.task != "retrieval"]

    def _judged(self, record: Record, sight: Sight) -> Judged:
        prediction = self.predictions.get((record.id, sight), Prediction(id=record.id, sight=sight, failure=MISSING))
        sample, statistics = self._sample(record, prediction), dict[str, list[float]]()
        if record.task in OF_MASKS:
            for metric in metrics_of(record.task, self.protocol):
                statistics[metric.name] = _statistics(metric, [sample])[0].tolist()
            sample = replace(sample, masks=())
        return Judged(
            sample=sample, sight=sight, group=group_of(record), statistics=statistics, seconds=prediction.seconds
        )

    def _sample(self, record: Record, said: Prediction) -> Sample:
        asked, options = render(TASKS, record, codec=Frac3()), record.target.options or ()
        choice = None
        if record.task == "vqa.closed" and said.text:
            choice = TASKS["vqa.closed"].parse(said.text, Frac3(), options=options)  # type: ignore[call-arg]
        return Sample(
            record=record,
            said=said.text,
            reference=asked.answer,
            options=options,
            choice=choice,
            true_choice=record.target.choice,
            likelihoods=said.likelihoods,
            boxes=said.boxes,
            true_boxes=self._opened.boxes(record) if record.task == "rec.box3d" else (),
            masks=tuple(self._pairs(record, said)) if record.task in OF_MASKS else (),
            failure=said.failure,
        )

    @property
    def _opened(self) -> Opened:
        found: Opened | None = self.__dict__.get("opened")
        if found is None:
            try:
                found = self.case.open()
            except BadScan:  # its failures are judged by what the store has of it
                found = replace(self.case, entry=None).open()
            self.__dict__["opened"] = found
        return found

    def _pairs(self, record: Record, said: Prediction) -> list[MaskPair]:
        opened, truths = self._opened, record.target.masks or ()
        spacing = opened.spacing
        if not truths:  # what was asked for is absent: any mask is wrong
            drawn = [self._read(mask) for mask in said.masks]
            found = next((mask for mask in drawn if mask is not None and mask.any()), None)
            return [MaskPair("absent", found, np.zeros(opened.shape, bool), spacing)]
        matched = match_names([truth.name for truth in truths], [mask.name for mask in said.masks])
        pairs = []
        for number, (truth, place) in enumerate(zip(truths, matched, strict=True)):
            mask = None if place is None else said.masks[place]
            guess = None if mask is None else self._read(mask)
            soft = None if mask is None else mask.soft
            pairs.append(MaskPair(truth.name, guess, opened.mask(record, number), spacing, soft))
        return pairs

    def _read(self, mask: DrawnMask) -> npt.NDArray[np.bool_] | None:
        return None if mask.file is None else read_mask(self.folder, mask, self._opened.shape)


def read_mask(folder: Path, mask: DrawnMask, shape: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """The voxels of a mask that was kept.

    Raises:
        ValueError: The file cannot be read, or its mask lies on another grid than ``shape``.
    """
    path = folder / str(mask.file)
    try:
        array = np.asarray(nib.load(path).dataobj) > 0  # type: ignore[attr-defined]  # its stubs know a base class
    except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: the mask cannot be read ({error}); run again to draw it anew") from None
    if array.shape != shape:
        raise ValueError(
            f"{path}: the mask has shape {array.shape}, the scan that it is judged on {shape}; give the `scans` "
            "of the run, or masks on the store's grid"
        )
    return np.asarray(array)


def _judge(scan: _Scan) -> list[Judged]:
    return scan.judged()


def _statistics(metric: Metric, samples: Sequence[Sample]) -> Floats:
    """A metric's rows, failures at their worst; what it does not judge stays so."""
    rows = np.array(metric.statistics(samples), dtype=np.float64)
    if metric.worst is not None:
        for number, sample in enumerate(samples):
            if sample.failure is not None and not np.isnan(rows[number]).any():
                rows[number] = metric.worst
    return rows


# -- all of them ----------------------------------------------------------------------------------------------------


def judge_samples(
    folder: Path,
    cases: Sequence[BenchCase],
    predictions: dict[Key, Prediction],
    protocol: ProtocolName,
    *,
    workers: int | None = None,
    progress: Callable[[Iterable[list[Judged]], int], Iterable[list[Judged]]] = lambda some, _: some,
) -> list[Judged]:
    """Every record that was asked, seeing and, where the run has a twin, blind, with the statistics of its metrics."""
    sights = tuple(sight for sight in SIGHTS if sight == "seeing" or any(key[1] == sight for key in predictions))
    scans = [
        _Scan(
            case,
            {key: predictions[key] for record in case.records for key in _keys(record, sights) if key in predictions},
            sights,
            folder,
            protocol,
        )
        for case in cases
    ]
    workers = min(workers or os.cpu_count() or 1, len(scans))
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = [one for some in progress(pool.map(_judge, scans), len(scans)) for one in some]
    else:
        found = [one for some in progress(map(_judge, scans), len(scans)) for one in some]
    return _with_texts(found, protocol)


def _keys(record: Record, sights: Sequence[Sight]) -> list[Key]:
    return [(record.id, sight) for sight in sights]


def _with_texts(found: Sequence[Judged], protocol: ProtocolName) -> list[Judged]:
    """Add the metrics that judge all samples of a task together."""
    done = list(found)
    for task in {one.sample.record.task for one in found} - set(OF_MASKS):
        for sight in SIGHTS:
            places = [n for n, one in enumerate(done) if one.sample.record.task == task and one.sight == sight]
            samples = [done[place].sample for place in places]
            for metric in metrics_of(task, protocol) if places else ():
                for place, row in zip(places, _statistics(metric, samples).tolist(), strict=True):
                    done[place] = replace(done[place], statistics={**done[place].statistics, metric.name: row})
    return done


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``samples.jsonl``, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


# -- the table ------------------------------------------------------------------------------------------------------


def metrics_table(judged: Sequence[Judged], protocol: ProtocolName, about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metrics.json`` holds: ``about`` the run, then every task."""
    tasks = [task for task in TASKS if any(one.sample.record.task == task for one in judged)]
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        **about,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": bootstrap.INTERVAL},
        "tasks": {
            task: _task([one for one in judged if one.sample.record.task == task], task, protocol) for task in tasks
        },
    }


def _task(judged: Sequence[Judged], task: str, protocol: ProtocolName) -> dict[str, Any]:
    seeing, blind = ([one for one in judged if one.sight == sight] for sight in SIGHTS)
    failed = [one.sample.failure for one in seeing if one.sample.failure is not None]
    entry: dict[str, Any] = {
        "n": len(seeing),
        "patients": len({one.sample.patient for one in seeing}),
        "n_failed": len(failed),
        "failures": dict(Counter(failure.split(":")[0] for failure in failed)),
        "seconds": round(sum(one.seconds or 0.0 for one in seeing), 1),
        "metrics": {metric.name: _metric(metric, seeing, blind) for metric in metrics_of(task, protocol)},
    }
    if task == "vqa.closed":
        for name, found in entry["metrics"].items():
            if name.startswith("accuracy"):
                found["chance"] = chance([one.sample for one in seeing])
    return entry


def _metric(metric: Metric, seeing: Sequence[Judged], blind: Sequence[Judged]) -> dict[str, Any]:
    groups = sorted({one.group for one in seeing})
    entry = {
        "variant": metric.variant,
        "better": metric.better,
        "unit": metric.unit,
        **_estimates(metric, seeing, blind),
    }
    if len(groups) > 1:
        parts = [([o for o in seeing if o.group == group], [o for o in blind if o.group == group]) for group in groups]
        entry["groups"] = {group: _estimates(metric, *part) for group, part in zip(groups, parts, strict=True)}
        entry["mean_of_groups"] = _mean_of_groups(metric, parts)
    return entry


def _estimates(metric: Metric, seeing: Sequence[Judged], blind: Sequence[Judged]) -> dict[str, Any]:
    """The value with its interval; beside the twin's, and how much is gained over it."""
    order = sorted({one.sample.patient for one in seeing})
    own = _sums(metric, seeing, order)
    found = _said(bootstrap.estimate(metric, own))
    if blind:
        other = _sums(metric, blind, order)
        found |= _said(bootstrap.estimate(metric, other), "blind") | _said(
            bootstrap.difference(metric, own, other), "gain"
        )
    return found


def _sums(metric: Metric, judged: Sequence[Judged], order: Sequence[str]) -> bootstrap.Sums:
    rows = np.array([one.statistics[metric.name] for one in judged], dtype=np.float64)
    return summed(rows, [one.sample.patient for one in judged], order)


def _said(estimate: Estimate, name: str = "value") -> dict[str, Any]:
    if name != "value":
        return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        "patients": estimate.patients,
    }


def _mean_of_groups(
    metric: Metric, parts: Sequence[tuple[Sequence[Judged], Sequence[Judged]]]
) -> dict[str, float | None]:
    """Every group counts alike, however many samples it has."""
    order = sorted({one.sample.patient for seeing, _ in parts for one in seeing})
    weights = np.concatenate([np.ones((1, len(order)), np.int64), bootstrap.drawn(len(order))])

    def means(side: int) -> Floats:
        found = [bootstrap.values(metric, _sums(metric, part[side], order), weights) for part in parts if part[side]]
        judged = [one for one in found if np.isfinite(one[0])]
        with np.errstate(invalid="ignore"):
            return np.nanmean(judged, axis=0) if judged else np.full(len(weights), np.nan)

    own = means(0)
    entry = _middle(own)
    if any(blind for _, blind in parts):
        other = means(1)
        entry |= _middle(other, "blind") | _middle(own - other, "gain")
    return entry


def _middle(draws: Floats, name: str = "value") -> dict[str, float | None]:
    first, rest = draws[0], draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(rest, [0.025, 0.975]).tolist() if len(rest) else (None, None)
    prefix = "" if name == "value" else f"{name}_"
    return {name: float(first) if np.isfinite(first) else None, f"{prefix}low": low, f"{prefix}high": high}
