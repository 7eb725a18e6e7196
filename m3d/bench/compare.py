"""Whether one run is better than another: paired differences over the samples that both have, and how sure they are.

Patients are drawn together for the intervals, and their runs exchanged for the p-values (`m3d.bench.bootstrap`). Of
many metrics some differ by chance, so p is corrected for how many were tested (Holm).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3d.bench.bootstrap import Estimate, Sums, difference, estimate, summed, two_sided
from m3d.bench.metrics.base import Metric
from m3d.bench.scored import (
    POOLED,
    MetricsOf,
    facts_of,
    known_metrics,
    read_metrics,
    read_samples,
    registered,
    statistics_of,
)
from m3d.bench.table import escaped, interval, labels_of, markdown_table, number, plain, terminal_table

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Comparison", "Coverage", "Difference", "compare", "holm"]

ALPHA = 0.05
SAME_SETTINGS = ("protocol", "grid")
SAME_RECORD = ("task", "subtask", "image_id", "patient_id", "reference")
OF_THE_SET = ("CIDEr",)  # what is rare, and so a sample's value, depends on which others there are
Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """``one`` less ``other`` in one metric, over ``n`` samples of ``patients`` patients that both judge.

    ``p`` is of this test alone; ``p_holm`` is corrected for all that were made. None: there is no such number.
    """

    task: str
    metric: str
    variant: str
    unit: str
    better: str
    one: float | None
    other: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    patients: int
    p: float | None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it holds at 5 % after Holm's correction."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def winner(self) -> str:
        """``A`` or ``B`` where one is significantly better, else nothing."""
        if not self.significant or not self.difference:
            return ""
        return "A" if (self.difference > 0) == (self.better == "higher") else "B"


@dataclass(frozen=True)
class Coverage:
    """How many samples of a task both runs have, and how many only one."""

    both: int
    only_one: int
    only_other: int


@dataclass(frozen=True)
class Comparison:
    """All differences of two runs; ``left_out`` says which metrics were not compared, and why."""

    names: tuple[str, str]
    facts: tuple[dict[str, str], dict[str, str]]
    coverage: dict[str, Coverage]
    rows: tuple[Difference, ...]
    left_out: tuple[str, ...]

    @property
    def num_tests(self) -> int:
        """How many p-values there are."""
        return sum(row.p is not None for row in self.rows)

    def notes(self) -> Iterator[str]:
        """What must be said beneath the table."""
        for task, found in self.coverage.items():
            yield f"{task}: {found.both} samples in both, {found.only_one} only in A, {found.only_other} only in B"
        yield from self.left_out
        yield "A - B: difference of the same samples, interval of a bootstrap over patients; p: permutation, two-sided"
        clear = sum(row.significant for row in self.rows)
        yield (
            f"{self.num_tests} tests were made; {clear} significant at 5 % after Holm's correction (marked *); "
            f"without it {ALPHA * self.num_tests:.1f} would be expected of runs that are alike"
        )

    def columns(self) -> dict[str, list[str]]:
        """Cells by heading."""
        rows = self.rows
        return {
            "task": [row.task for row in rows],
            "metric": [f"{row.metric} {'↑' if row.better == 'higher' else '↓'}" for row in rows],
            "A": [number(row.one, row.unit) for row in rows],
            "B": [number(row.other, row.unit) for row in rows],
            "A - B [95 % CI]": [interval(row.difference, row.low, row.high, row.unit, signed=True) for row in rows],
            "p": [_p(row.p) for row in rows],
            "p (Holm)": [f"{_p(row.p_holm)}{' *' if row.significant else ''}" for row in rows],
            "better": [row.winner or "-" for row in rows],
            "n": [str(row.n) for row in rows],
            "patients": [str(row.patients) for row in rows],
        }

    def markdown(self) -> str:
        """The comparison in Markdown."""
        lines = ["# M3D-Bench: two runs", "", *(f"- {escaped(line)}" for line in self._heads()), ""]
        lines += [*markdown_table(self.columns()), "", *(f"- {escaped(line)}" for line in self.notes())]
        return "\n".join(lines) + "\n"

    def terminal(self) -> "Group":
        """The comparison for `rich`."""
        from rich.console import Group
        from rich.text import Text

        table = terminal_table(self.columns(), [not row.significant for row in self.rows])
        notes = (Text(plain(line), style="dim") for line in self.notes())
        return Group(*map(Text, self._heads()), table, *notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [{**asdict(row), "significant": row.significant, "winner": row.winner or None} for row in self.rows]
        return {
            "A": {"name": self.names[0], **self.facts[0]},
            "B": {"name": self.names[1], **self.facts[1]},
            "coverage": {task: asdict(found) for task, found in self.coverage.items()},
            "num_tests": self.num_tests,
            "alpha": ALPHA,
            "rows": rows,
            "left_out": list(self.left_out),
        }

    def _heads(self) -> Iterator[str]:
        for letter, name, facts in zip("AB", self.names, self.facts, strict=True):
            told = "; ".join(f"{key}: {value}" for key, value in facts.items() if key != "model")
            yield plain(f"{letter} = {name}: {told}")


def compare(one: Path, other: Path, *, protocol: str = "standard", metrics_of: MetricsOf = registered) -> Comparison:
    """Compare two runs, scored by ``protocol``, on the samples that both have, seeing.

    Raises:
        FileNotFoundError: A run was not scored.
        ValueError: Their settings, their metrics' variants or their records differ, or they share none.
    """
    runs = (read_metrics(one, protocol), read_metrics(other, protocol))
    _check_settings((one, other), runs)
    samples = (read_samples(one, protocol), read_samples(other, protocol))
    shared = [name for name in samples[0] if name in samples[1]]
    if not shared:
        raise ValueError(f"{one} and {other} have no record in common, so nothing is paired; run both on the same data")
    for name in shared:
        _check_record(name, (one, other), (samples[0][name], samples[1][name]))
    coverage = _coverage(*samples)
    _check_pools((one, other), runs, coverage)
    rows: list[Difference] = []
    left_out: list[str] = []
    for task, found in coverage.items():
        if found.both:
            pairs = [(samples[0][name], samples[1][name]) for name in shared if samples[0][name]["task"] == task]
            entries = _entries(task, runs)
            of_task = known_metrics(task, protocol, entries, metrics_of)
            for name, entry in entries.items():
                if reason := _why_not(name, of_task, pairs, task, runs, found):
                    left_out.append(f"{task}, {name}: not compared, {reason}")
                else:
                    rows.append(_difference(task, entry, of_task[name], pairs))
    first, second = labels_of(runs)
    facts = (facts_of(runs[0]), facts_of(runs[1]))
    return Comparison((first, second), facts, coverage, _held(rows), tuple(left_out))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false alarm stays below what a corrected p says."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _held(rows: Sequence[Difference]) -> tuple[Difference, ...]:
    """Rows with their corrected p."""
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    return tuple(row if row.p is None else replace(row, p_holm=next(corrected)) for row in rows)


def _difference(
    task: str, entry: Mapping[str, Any], metric: Metric, pairs: Sequence[tuple[Sample, Sample]]
) -> Difference:
    """One metric over the pairs that it judges in both runs."""
    first, second = (statistics_of([pair[side] for pair in pairs], metric.name) for side in (0, 1))
    judged = np.asarray(~(np.isnan(first).any(axis=1) | np.isnan(second).any(axis=1)), dtype=bool)
    patients = [str(pair[0]["patient_id"]) for pair, kept in zip(pairs, judged, strict=True) if kept]
    if not patients:
        found, one, other, p = Estimate(None, None, None, 0, 0), None, None, None
    else:
        sums: tuple[Sums, Sums] = (summed(first[judged], patients), summed(second[judged], patients))
        found, p = difference(metric, *sums), two_sided(metric, *sums)
        one, other = (estimate(metric, side).value for side in sums)
    return Difference(
        task=task,
        metric=metric.name,
        variant=str(entry.get("variant")),
        unit=entry.get("unit") or "",
        better=entry.get("better", metric.better),
        one=one,
        other=other,
        difference=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
        patients=found.patients,
        p=p,
    )


def _entries(task: str, runs: tuple[Mapping[str, Any], ...]) -> dict[str, Mapping[str, Any]]:
    """What the runs say of each metric of a task, the first that has it."""
    one, other = (run["tasks"].get(task, {}).get("metrics", {}) for run in runs)
    return {**one, **{name: entry for name, entry in other.items() if name not in one}}


def _why_not(
    name: str,
    known: Mapping[str, Metric],
    pairs: Sequence[tuple[Sample, Sample]],
    task: str,
    runs: tuple[Mapping[str, Any], ...],
    coverage: Coverage,
) -> str:
    """Why a metric cannot be compared, if so."""
    have = [name in run["tasks"].get(task, {}).get("metrics", {}) for run in runs]
    if not all(have):
        return f"only {'A' if have[0] else 'B'} has it"
    if name not in known:
        return "no metric of that name is known"
    if any(all(name not in pair[side].get("statistics", {}) for pair in pairs) for side in (0, 1)):
        return "its samples are not kept"
    if name in OF_THE_SET and (coverage.only_one or coverage.only_other):
        return "its values depend on the whole set, and the runs have different ones"
    return ""


def _coverage(one: Mapping[str, Sample], other: Mapping[str, Sample]) -> dict[str, Coverage]:
    tasks = dict.fromkeys(str(sample["task"]) for samples in (one, other) for sample in samples.values())
    found = {}
    for task in tasks:
        mine, theirs = ({name for name, it in samples.items() if it["task"] == task} for samples in (one, other))
        found[task] = Coverage(len(mine & theirs), len(mine - theirs), len(theirs - mine))
    return found


def _check_settings(folders: tuple[Path, Path], runs: tuple[Mapping[str, Any], ...]) -> None:
    """Refuse runs that were not scored alike."""
    for key in SAME_SETTINGS:
        if runs[0].get(key) != runs[1].get(key):
            raise ValueError(
                f"{key} differs: {runs[0].get(key)!r} in {folders[0]}, {runs[1].get(key)!r} in {folders[1]}; "
                f"score both with the same {key} (`m3d bench score --help`)"
            )
    for task in runs[0]["tasks"].keys() & runs[1]["tasks"].keys():
        one, other = (run["tasks"][task].get("metrics", {}) for run in runs)
        for name in one.keys() & other.keys():
            if one[name].get("variant") != other[name].get("variant"):
                raise ValueError(
                    f"{task}, {name}: variant {one[name].get('variant')!r} in {folders[0]}, "
                    f"{other[name].get('variant')!r} in {folders[1]}; score both with this version: `m3d bench score`"
                )


def _check_pools(
    folders: tuple[Path, Path], runs: tuple[Mapping[str, Any], ...], coverage: Mapping[str, Coverage]
) -> None:
    """Refuse ranks among different candidates."""
    for task, found in coverage.items():
        if task not in POOLED:
            continue
        pools = [(run["tasks"].get(task, {}).get("pools") or {}) for run in runs]
        one, other = ({name: pool.get("ids_sha256") for name, pool in some.items()} for some in pools)
        if found.only_one or found.only_other:
            raise ValueError(
                f"{task}: {found.only_one} samples only in {folders[0]} and {found.only_other} only in {folders[1]}, "
                "so the pools differ and ranks do not compare; run both on the same data"
            )
        if differ := sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)):
            raise ValueError(
                f"{task}: pool {', '.join(differ)} in {folders[0]} is not that in {folders[1]}, so ranks do not "
                "compare; ask both of the same records, and score both with the same pools and this version"
            )


def _check_record(name: str, folders: tuple[Path, Path], pair: tuple[Sample, Sample]) -> None:
    """Refuse samples of one id that are not of the same record."""
    for key in SAME_RECORD:
        if pair[0].get(key) != pair[1].get(key):
            raise ValueError(
                f"record {name!r} is not the same in both: {key} is {pair[0].get(key)!r} in {folders[0]} and "
                f"{pair[1].get(key)!r} in {folders[1]}; run both on the same data"
            )


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
