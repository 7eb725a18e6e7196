"""From answers to numbers, without the model: samples beside their truth, then every metric with its interval.

Masks are judged a scan at a time, in several processes. What was asked and not answered is a failure, at its worst; of
the blind twin it is left out, and so is the same record when the two are compared.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.atomic import atomic_path
from data_prep.record import Record
from data_prep.volume import BadScan
from m3d.bench import bootstrap
from m3d.bench.bootstrap import INTERVAL, RESAMPLES, SEED, summed
from m3d.bench.cases import BenchCase, Opened, Question, group_of
from m3d.bench.kinds import TEXT, named, task_of
from m3d.bench.mask_files import read_mask
from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample
from m3d.bench.metrics.choices import chance
from m3d.bench.metrics.masks import MaskPair
from m3d.bench.metrics.registry import kind_of, metrics_of
from m3d.bench.predictions import SIGHTS, UNPROMPTABLE, DrawnMask, Key, Prediction, Sight, match_names
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3

__all__ = ["Judged", "all_metrics", "judge_samples", "metrics_table", "write_samples"]

SCHEMA = "m3d.bench/1"
MISSING = "Missing: not answered"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer beside its truth, and the statistics of every metric that judges it; ``text`` is all that was said."""

    sample: Sample
    sight: Sight
    group: str
    text: str
    statistics: Mapping[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None
    by: str = TEXT

    @property
    def asked(self) -> bool:
        """Whether the model was asked at all; if not, nothing is known of what it would have said."""
        return (self.sample.failure or "").partition(":")[0] not in ("Missing", "BadScan")

    @property
    def promptable(self) -> bool:
        """Whether there was anything to point at; if not, the model was not asked, and that is not its failure."""
        return not _unpromptable(self.sample)

    @property
    def row(self) -> str:
        """Which row of the table it is counted in."""
        return named(self.sample.record.task, self.by)

    def to_row(self) -> dict[str, Any]:
        """The line of ``samples.jsonl``."""
        record = self.sample.record
        return {
            "id": record.id,
            "sight": self.sight,
            "by": self.by,
            "task": self.row,
            "subtask": record.subtask,
            "image_id": record.image_id,
            "patient_id": record.patient_id,
            "group": self.group,
            "failure": self.sample.failure,
            "text": self.text,
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
        asked = [one for one in self.case.questions if metrics_of(one.row, self.protocol)]
        return [self._judged(question, sight) for sight in self.sights for question in asked]

    def _judged(self, question: Question, sight: Sight) -> Judged:
        record = question.record
        missing = Prediction(id=record.id, sight=sight, by=question.by, failure=MISSING)
        prediction = self.predictions.get((question.name, sight), missing)
        sample, statistics = self._sample(record, prediction), dict[str, list[float]]()
        if kind_of(record.task) == "masks":
            for metric in metrics_of(question.row, self.protocol):
                statistics[metric.name] = _statistics(metric, [sample])[0].tolist()
            sample = replace(sample, masks=())
        return Judged(
            sample=sample,
            sight=sight,
            group=group_of(record),
            text=prediction.text,
            statistics=statistics,
            seconds=prediction.seconds,
            by=question.by,
        )

    def _sample(self, record: Record, said: Prediction) -> Sample:
        asked, options, kind = render(TASKS, record, codec=Frac3()), record.target.options or (), kind_of(record.task)
        text = said.text if said.failure is None else ""  # whatever a failure says is no answer
        choice = None
        if kind == "choice" and text:
            choice = TASKS[record.task].parse(text, Frac3(), options=options)  # type: ignore[call-arg]
        return Sample(
            record=record,
            said=text,
            reference=asked.answer,
            options=options,
            choice=choice,
            true_choice=record.target.choice,
            likelihoods=said.likelihoods,
            boxes=said.boxes,
            true_boxes=self._opened.boxes(record) if kind == "boxes" else (),
            masks=tuple(self._pairs(record, said)) if kind == "masks" else (),
            failure=said.failure,
        )

    @property
    def _opened(self) -> Opened:
        found: Opened | None = self.__dict__.get("opened")
        if found is None:
            try:
                found = self.case.open()
            except BadScan:
                if any(not (one.failure or "").startswith("BadScan") for one in self.predictions.values()):
                    raise  # it was read when it was asked about
                found = replace(self.case, entry=None).open()  # how bad a failure is, is known of the store's grid
            self.__dict__["opened"] = found
        return found

    def _pairs(self, record: Record, said: Prediction) -> list[MaskPair]:
        opened, truths = self._opened, record.target.masks or ()
        spacing = opened.spacing
        if not truths:  # what was asked for is absent: any mask is wrong
            drawn = [self._read(record, mask) for mask in said.masks]
            found = next((mask for mask in drawn if mask is not None and mask.any()), None)
            return [MaskPair("absent", found, np.zeros(opened.shape, bool), spacing)]
        matched = match_names([truth.name for truth in truths], [mask.name for mask in said.masks])
        pairs = []
        for number, (truth, place) in enumerate(zip(truths, matched, strict=True)):
            mask = None if place is None else said.masks[place]
            guess = None if mask is None else self._read(record, mask)
            soft, steps = (None, ()) if mask is None else (mask.soft, mask.steps)
            pairs.append(MaskPair(truth.name, guess, opened.mask(record, number), spacing, soft, steps))
        return pairs

    def _read(self, record: Record, mask: DrawnMask) -> npt.NDArray[np.bool_] | None:
        if self.protocol == "m3d":
            return None  # which counts probabilities alone
        if mask.file is None:
            raise ValueError(
                f"{record.id}: the mask of {mask.name!r} was drawn but not kept, so only --protocol m3d can be scored; "
                "run with keep_masks=true, or give its file"
            )
        return read_mask(self.folder, mask, self._opened.volume)


def _unpromptable(sample: Sample) -> bool:
    return (sample.failure or "").partition(":")[0] == UNPROMPTABLE


def _judge(scan: _Scan) -> list[Judged]:
    return scan.judged()


def _statistics(metric: Metric, samples: Sequence[Sample]) -> Floats:
    """A metric's rows, failures at their worst; what it does not judge stays so, and so does what cannot be asked."""
    rows = np.array(metric.statistics(samples), dtype=np.float64)
    rows[[_unpromptable(sample) for sample in samples]] = np.nan
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
    extra: Sequence[Metric] = (),
    workers: int | None = None,
    progress: Callable[[Iterable[list[Judged]], int], Iterable[list[Judged]]] = lambda some, _: some,
) -> list[Judged]:
    """Every record that was asked, seeing and, where the run has a twin, blind, with the statistics of its metrics."""
    sights = tuple(sight for sight in SIGHTS if sight == "seeing" or any(key[1] == sight for key in predictions))
    scans = [
        _Scan(
            case,
            {key: predictions[key] for key in _keys(case, sights) if key in predictions},
            sights,
            folder,
            protocol,
        )
        for case in cases
    ]
    drawn = any(kind_of(one.record.task) == "masks" for case in cases for one in case.questions)
    workers = min(workers or os.cpu_count() or 1, len(scans)) if drawn and protocol == "standard" else 1
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = [one for some in progress(pool.map(_judge, scans), len(scans)) for one in some]
    else:
        found = [one for some in progress(map(_judge, scans), len(scans)) for one in some]
    return _with_texts(found, protocol, extra)


def _keys(case: BenchCase, sights: Sequence[Sight]) -> list[Key]:
    return [(question.name, sight) for question in case.questions for sight in sights]


def all_metrics(row: str, protocol: ProtocolName, extra: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """The metrics of a row of the table, and for texts the ``extra`` ones."""
    return (*metrics_of(row, protocol), *(extra if kind_of(task_of(row)) == "text" else ()))


def _with_texts(found: Sequence[Judged], protocol: ProtocolName, extra: Sequence[Metric]) -> list[Judged]:
    """Add the metrics that judge all samples of a task together."""
    done = list(found)
    for task in sorted({one.sample.record.task for one in found}):
        for sight in SIGHTS if kind_of(task) != "masks" else ():
            places = [n for n, one in enumerate(done) if one.sample.record.task == task and one.sight == sight]
            samples = [done[place].sample for place in places]
            for metric in all_metrics(task, protocol, extra) if places else ():
                for place, row in zip(places, _statistics(metric, samples).tolist(), strict=True):
                    done[place] = replace(done[place], statistics={**done[place].statistics, metric.name: row})
    return done


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``samples.jsonl``, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


# -- the table ------------------------------------------------------------------------------------------------------


def metrics_table(
    judged: Sequence[Judged], protocol: ProtocolName, about: Mapping[str, Any], extra: Sequence[Metric] = ()
) -> dict[str, Any]:
    """What ``metrics.json`` holds: ``about`` the run, then every task, once for each kind of prompt."""
    rows = sorted(dict.fromkeys(one.row for one in judged), key=lambda row: list(TASKS).index(task_of(row)))
    by_row = {row: [one for one in judged if one.row == row] for row in rows}
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        **about,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": INTERVAL},
        "tasks": {
            row: _task(some, all_metrics(row, protocol, extra), choice=kind_of(task_of(row)) == "choice")
            for row, some in by_row.items()
        },
    }


def _task(judged: Sequence[Judged], metrics: Sequence[Metric], *, choice: bool) -> dict[str, Any]:
    promptable = [one for one in judged if one.promptable]
    seeing = [one for one in promptable if one.sight == "seeing"]
    blind = [one for one in promptable if one.sight == "blind" and one.asked]
    left_out = [one for one in judged if one.sight == "seeing" and not one.promptable]
    entry: dict[str, Any] = {
        "n": len(seeing),
        "patients": len({one.sample.patient for one in seeing}),
        **_failures(seeing),
        **({"n_not_promptable": len(left_out)} if left_out else {}),
        "seconds": round(sum(one.seconds or 0.0 for one in seeing), 1),
        **({"twin": {"n": len(blind), **_failures(blind)}} if blind else {}),
        "metrics": {metric.name: _metric(metric, seeing, blind) for metric in metrics},
    }
    for name, found in entry["metrics"].items() if choice else ():
        if name.startswith("accuracy"):
            found["chance"] = chance([one.sample for one in seeing])
    return entry


def _failures(judged: Sequence[Judged]) -> dict[str, Any]:
    kinds = Counter(one.sample.failure.partition(":")[0] for one in judged if one.sample.failure is not None)
    return {"n_failed": kinds.total(), "failures": dict(sorted(kinds.items()))}


def _metric(metric: Metric, seeing: Sequence[Judged], blind: Sequence[Judged]) -> dict[str, Any]:
    entry: dict[str, Any] = {"variant": metric.variant, "better": metric.better, "unit": metric.unit}
    entry |= _estimates(metric, seeing, blind)
    groups = sorted({one.group for one in seeing})
    if len(groups) > 1:
        parts = [([o for o in seeing if o.group == group], [o for o in blind if o.group == group]) for group in groups]
        entry["groups"] = {group: _estimates(metric, *part) for group, part in zip(groups, parts, strict=True)}
        entry["mean_of_groups"] = _mean_of_groups(metric, parts)
    return entry


def _estimates(metric: Metric, seeing: Sequence[Judged], blind: Sequence[Judged]) -> dict[str, Any]:
    """The value with its interval; beside the twin's, and how much is gained over it where both were asked."""
    found = bootstrap.estimate(metric, _sums(metric, seeing)).to_dict()
    if blind:
        other = _sums(metric, blind)
        own = _sums(metric, _both(seeing, blind))
        found |= bootstrap.estimate(metric, other).to_dict("blind")
        found |= bootstrap.difference(metric, own, other).to_dict("gain")
    return found


def _both(seeing: Sequence[Judged], blind: Sequence[Judged]) -> list[Judged]:
    """The samples whose record the twin was asked too."""
    known = {one.sample.record.id for one in blind}
    return [one for one in seeing if one.sample.record.id in known]


def _sums(metric: Metric, judged: Sequence[Judged], order: Sequence[str] | None = None) -> bootstrap.Sums:
    rows = np.array([one.statistics[metric.name] for one in judged], dtype=np.float64)
    return summed(rows, [one.sample.patient for one in judged], order)


def _mean_of_groups(
    metric: Metric, parts: Sequence[tuple[Sequence[Judged], Sequence[Judged]]]
) -> dict[str, float | None]:
    """Every group counts alike, however many samples it has; the twin's mean and the gain are of the groups it has."""
    order = sorted({one.sample.patient for seeing, _ in parts for one in seeing})

    def mean_of(groups: Sequence[Sequence[Judged]]) -> Floats:
        draws = [bootstrap.values(metric, _sums(metric, group, order)) for group in groups if group]
        judged = [one for one in draws if np.isfinite(one[0])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a resample may have none of them
            return np.nanmean(judged, axis=0) if judged else np.full(RESAMPLES + 1, np.nan)

    own = bootstrap.of_draws(mean_of([seeing for seeing, _ in parts])).to_dict()
    entry = {key: own[key] for key in ("value", "low", "high")}
    both = [(_both(seeing, blind), blind) for seeing, blind in parts if blind]
    if both:
        one, other = (mean_of([pair[side] for pair in both]) for side in (0, 1))
        twin = bootstrap.of_draws(other).to_dict("blind") | bootstrap.of_draws(one - other).to_dict("gain")
        entry |= {key: number for key, number in twin.items() if not key.endswith("_n")}
    return entry
