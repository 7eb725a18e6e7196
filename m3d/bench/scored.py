"""A scored run as it lies on disk: ``metrics.json`` and ``samples.jsonl``, read and checked for those that show it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3d.bench.kinds import TEXT, named
from m3d.bench.metrics.base import Floats, Metric

__all__ = [
    "POOLED",
    "PREDICTIONS",
    "MetricsOf",
    "facts_of",
    "known_metrics",
    "question_of",
    "read_lines",
    "read_metrics",
    "read_samples",
    "registered",
    "statistics_of",
]

METRICS, SAMPLES, PREDICTIONS, SCHEMA = "metrics{}.json", "samples{}.jsonl", "predictions.jsonl", "m3d.bench/1"
SEEING = "seeing"
POOLED = ("retrieval",)  # a sample's value depends on what else is in the pool

MetricsOf = Callable[[str, str], Sequence[Metric]]  # task, protocol -> its metrics


def read_metrics(folder: Path, protocol: str = "standard") -> dict[str, Any]:
    """``metrics.json`` of a run, ``metrics.m3d.json`` of protocol m3d; a number that is not one is None.

    Raises:
        FileNotFoundError: The run is not there, or was not scored.
        ValueError: It is no JSON, or of another schema.
    """
    path = _there(folder, _tagged(METRICS, protocol))
    found = _parsed(path.read_text(encoding="utf-8"), path)
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {found.get('schema')!r}, not {SCHEMA!r}; {_remedy(path)}")
    if not isinstance(found.get("tasks"), dict):
        raise ValueError(f"{path}: no tasks in it; {_remedy(path)}")
    return found


def read_samples(folder: Path, protocol: str = "standard") -> dict[str, dict[str, Any]]:
    """What the model said seeing, by question, in the order of ``samples.jsonl``; not what its blind twin did.

    A question is the id of a record, with the kind of prompt where that is not its text (`question_of`).

    Raises:
        FileNotFoundError: The run is not there, or was not scored.
        ValueError: A line is no JSON object, or a question is there twice.
    """
    samples: dict[str, dict[str, Any]] = {}
    name = _tagged(SAMPLES, protocol)
    for number, line in read_lines(folder, name):
        question = question_of(line)
        if question in samples:
            raise ValueError(f"{folder / name}:{number}: {question!r} is there twice; {_remedy(folder / name)}")
        samples[question] = line
    return samples


def question_of(line: Mapping[str, Any]) -> str:
    """Which question a line of a run's JSONL answers (`m3d.bench.kinds.named`)."""
    return named(str(line["id"]), str(line.get("by") or TEXT))


def read_lines(folder: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a run's JSONL that are of the model seeing, with their numbers from 1.

    Raises:
        FileNotFoundError: The run or the file is not there.
        ValueError: A line is no JSON object with an id.
    """
    path = _there(folder, name)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = _parsed(line, path, number)
                if not isinstance(found.get("id"), str):
                    raise ValueError(f"{path}:{number}: no id; {_remedy(path)}")
                if found.get("sight", SEEING) == SEEING:
                    yield number, found


def statistics_of(samples: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """A metric's rows ``(n, k)``; NaN where it does not judge a sample: no row, null, or null in it.

    Raises:
        ValueError: Rows are of different lengths.
    """
    rows = [sample.get("statistics", {}).get(name) for sample in samples]
    lengths = {len(row) for row in rows if row is not None}
    if len(lengths) > 1:
        raise ValueError(f"{name}: rows of {' and '.join(map(str, sorted(lengths)))} statistics; score the run again")
    width = max(lengths, default=1)
    found = [[np.nan] * width if row is None or None in row else row for row in rows]
    return np.array(found, dtype=np.float64).reshape(len(rows), width)


def registered(task: str, protocol: str) -> Sequence[Metric]:
    """The metrics of a task as `m3d.bench.metrics.registry` has them; imported when they are needed."""
    from m3d.bench.metrics.registry import metrics_of

    return metrics_of(task, "m3d" if protocol == "m3d" else "standard")


def known_metrics(task: str, protocol: str, names: Iterable[str], metrics_of: MetricsOf) -> dict[str, Metric]:
    """The metrics of a task by name; ``names`` are those to make where they are made anew for every pool."""
    try:
        if task in POOLED:
            from m3d.bench.metrics.retrieval import metric_named

            return {name: metric_named(name) for name in names}
        return {metric.name: metric for metric in metrics_of(task, protocol)}
    except KeyError:
        return {}


def facts_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, for a heading: model, data, protocol, grid, and how its intervals were made."""
    model, data, bootstrap = (metrics.get(key) or {} for key in ("model", "data", "bootstrap"))
    fingerprint = f" ({model['fingerprint']})" if model.get("fingerprint") else ""
    split = f", split {data['split']}" if data.get("split") else ""
    facts = {
        "model": f"{model.get('id', 'unnamed')}{fingerprint}",
        "data": f"{data.get('name', 'unnamed')}{split}",
        "protocol": str(metrics.get("protocol")),
        "grid": str(metrics.get("grid")),
    }
    if bootstrap:
        share, count = 100 * bootstrap.get("interval", 0.95), bootstrap.get("resamples")
        facts["intervals"] = f"{share:.0f} %, bootstrap of {count} resamples over {bootstrap.get('over')}"
    return facts


def _there(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `m3d bench run --out {folder}` makes it")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name}: not there; {_remedy(folder / name)}")
    return folder / name


def _parsed(text: str, path: Path, line: int | None = None) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which are no JSON, become None."""
    where = f"{path}" if line is None else f"{path}:{line}"
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg}); {_remedy(path)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: no JSON object; {_remedy(path)}")
    return found


def _tagged(name: str, protocol: str) -> str:
    return name.format("" if protocol == "standard" else f".{protocol}")


def _remedy(path: Path) -> str:
    """The command that makes a file of a run."""
    if path.name == PREDICTIONS:
        return f"`m3d bench run --out {path.parent}` makes it"
    protocol = path.suffixes[0].strip(".") if len(path.suffixes) > 1 else ""
    return f"`m3d bench score {path.parent}{f' --protocol {protocol}' if protocol else ''}` makes it"
