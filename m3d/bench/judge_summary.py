"""The judge's scores as numbers that can be trusted: means with intervals by patient, beside the blind twin's."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m3d.bench.bootstrap import INTERVAL, RESAMPLES, SEED, Sums, difference, estimate, summed
from m3d.bench.judge_row import read_answers
from m3d.bench.judge_words import PROMPT_SHA256, PROMPT_VERSION
from m3d.bench.metrics.base import Floats, Sample, mean

__all__ = ["ROWS", "SCHEMA", "SUMMARY", "summarise", "with_judge"]

SCHEMA = "m3d.bench.judge/1"
ROWS, SUMMARY = "judge.jsonl", "judge.json"
Row = Mapping[str, Any]


class _JudgeScore:
    """The mean of what a judge gave, 0 to 100; a refusal is 0."""

    name = "judge"
    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = (0.0,)

    def __init__(self, judge: str) -> None:
        self.variant = f"share of the reference's aspects, 0 to 100, judged by {judge} ({PROMPT_VERSION})"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """None: a judge is asked, not computed; its scores are summed as they stand."""
        raise NotImplementedError

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean."""
        return mean(sums, counts)


def summarise(rows: Sequence[Row], *, model: str, kind: str) -> dict[str, Any]:
    """What lines of ``judge.jsonl`` say, by task and group."""
    metric = _JudgeScore(model)
    tasks = {}
    for task in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == task]
        groups = sorted({row["group"] for row in of_task} - {""})
        by_group = {name: [row for row in of_task if row["group"] == name] for name in groups}
        tasks[task] = {
            **_entry(metric, of_task),
            "groups": {name: _entry(metric, of_group) for name, of_group in by_group.items()},
        }
    return {
        "schema": SCHEMA,
        "model": model,
        "endpoint": kind,
        "prompt_version": PROMPT_VERSION,
        "prompt_sha256": PROMPT_SHA256,
        "variant": metric.variant,
        "better": metric.better,
        "unit": metric.unit,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": INTERVAL},
        "n": len(rows),
        "n_refused": sum(row["refused"] for row in rows),
        "n_empty": sum(row["from"] == "empty" for row in rows),
        "tasks": tasks,
    }


def with_judge(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """A scored run and, where a judge has read its answers, what that gave: a metric of each task, in percent.

    Raises:
        ValueError: ``judge.json`` is of another version, or what it judged is not what the run answers now.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return dict(run)
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("schema") != SCHEMA or summary.get("prompt_sha256") != PROMPT_SHA256:
        raise ValueError(
            f"{path} is of another version; judge again (`m3d bench judge {folder} ... --force`), or move it"
        )
    _check_current(folder, f"{summary['endpoint']}/{summary['model']}")
    tasks = dict(run["tasks"])
    for task, found in summary["tasks"].items():
        if task in tasks:
            refused = f"; {found['n_refused']} refused, counted 0" if found["n_refused"] else ""
            about = {"variant": f"{summary['variant']}{refused}", "better": summary["better"], "unit": "%"}
            metrics = {**tasks[task].get("metrics", {}), f"content by {summary['model']}": {**about, **found}}
            tasks[task] = {**tasks[task], "metrics": metrics}
    return {**run, "tasks": tasks}


def _check_current(folder: Path, judge: str) -> None:
    """Refuse scores of answers that have changed since."""
    rows = (json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines() if line.strip())
    judged = {(row["id"], row["sight"]): row for row in rows}
    tasks = sorted({row["task"] for row in judged.values()})
    now = {one.name: one.key(judge) for one in read_answers(folder, tasks)} if tasks else {}
    changed = [name for name, row in judged.items() if row["key"] != now.get(name)]
    if changed:
        raise ValueError(
            f"{folder / SUMMARY}: {len(changed)} answers are not those that were judged, such as {changed[0][0]!r}; "
            f"run `m3d bench judge {folder} ...` again, or move it away"
        )


def _entry(metric: _JudgeScore, rows: Sequence[Row]) -> dict[str, Any]:
    """The means of both sights, and what seeing gains over the blind twin on the samples that both have."""
    seeing = {row["id"]: row for row in rows if row["sight"] == "seeing"}
    blind = {row["id"]: row for row in rows if row["sight"] == "blind"}
    entry = {**estimate(metric, _sums(seeing.values())).to_dict(), **_counts(seeing.values())}
    if not blind:
        return entry
    entry |= estimate(metric, _sums(blind.values())).to_dict("blind")
    entry |= {f"blind_{name}": count for name, count in _counts(blind.values()).items()}
    both = sorted(set(seeing) & set(blind))
    gain = difference(metric, _sums(seeing[name] for name in both), _sums(blind[name] for name in both))
    return {**entry, **gain.to_dict("gain")}


def _sums(rows: Iterable[Row]) -> Sums:
    """Scores by patient; a refusal counts 0."""
    kept = list(rows)
    scores = np.array([[row["score"] or 0.0] for row in kept], dtype=np.float64).reshape(-1, 1)
    return summed(scores, [row["patient_id"] for row in kept])


def _counts(rows: Iterable[Row]) -> dict[str, Any]:
    kept = list(rows)
    given = [row["score"] for row in kept if not row["refused"]]
    return {
        "n_refused": len(kept) - len(given),
        "n_empty": sum(row["from"] == "empty" for row in kept),
        "value_without_refusals": float(np.mean(given)) if given else None,
    }
