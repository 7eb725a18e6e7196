"""Results side by side: Markdown and a terminal table of scored runs, with what papers state beneath.

A published number stands beside a run only where task and metric are the same; its protocol and data are always said,
because a number of other data compares nothing.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from m3d.bench.scored import facts_of
from m3d.inference.planes import NOTICE

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = [
    "Published",
    "Row",
    "Sheet",
    "escaped",
    "interval",
    "labels_of",
    "markdown",
    "markdown_table",
    "number",
    "plain",
    "published_numbers",
    "sheet",
    "terminal",
    "terminal_table",
    "unread_systems",
]

Run = Mapping[str, Any]
VALUE, OTHER_DATA = "value [95 % CI]", "other data"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper states: ``value`` as a share, ``beside`` the names of our metrics that it may stand with."""

    model: str
    task: str
    metric: str
    value: float
    beside: tuple[str, ...]
    paper: str
    where: str
    protocol: str
    data: str
    note: str

    def fits(self, task: str, metric: str) -> bool:
        """Whether it is of the same task and a comparable metric."""
        return task == self.task and any(fnmatch.fnmatch(metric.casefold(), name.casefold()) for name in self.beside)

    def same_data(self, run: Run) -> bool:
        """Whether a run is of the data set that this was measured on."""
        name = str((run.get("data") or {}).get("name", "")).casefold()
        return name.startswith(("m3d-bench", self.data.casefold()))


MEAN = "mean of groups"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: a metric of a run, or what a paper states; None is a number that there is not."""

    task: str
    metric: str
    model: str
    group: str = ""
    unit: str = ""
    better: str = "higher"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    blind: float | None = None
    blind_low: float | None = None
    blind_high: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    mean_of_groups: float | None = None
    chance: float | None = None
    n: int | None = None
    n_failed: int | None = None
    footnote: int | None = None


@dataclass(frozen=True)
class Sheet:
    """A table's rows with what must be said beneath."""

    runs: tuple[dict[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def columns(self) -> dict[str, list[str]]:
        """Cells by heading; a column that would be empty is left out."""
        cells = {
            "task": [row.task for row in self.rows],
            "metric": [f"{row.metric} {'↑' if row.better == 'higher' else '↓'}" for row in self.rows],
            "group": [row.group for row in self.rows],
            "model": [row.model if row.footnote is None else f"{row.model} [{row.footnote}]" for row in self.rows],
            VALUE: [_value(row) for row in self.rows],
            "blind": [number(row.blind, row.unit) for row in self.rows],
            "gain [95 % CI]": [
                interval(row.gain, row.gain_low, row.gain_high, row.unit, signed=True) for row in self.rows
            ],
            "chance": [number(row.chance, row.unit) for row in self.rows],
            MEAN: [number(row.mean_of_groups, row.unit) for row in self.rows],
            "n": [_count(row.n) for row in self.rows],
            "failed": [_count(row.n_failed) for row in self.rows],
        }
        told = {heading for heading, column in cells.items() if any(cell.strip("-") for cell in column)}
        return {heading: column for heading, column in cells.items() if heading in told | {VALUE}}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"runs": list(self.runs), "rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}


def sheet(runs: Sequence[Run], *, labels: Sequence[str] | None = None, groups: bool = False) -> Sheet:
    """The rows of all runs, metric by metric; ``groups`` adds those of every structure or kind of question.

    Raises:
        ValueError: There is no run, or not a label for each.
    """
    if not runs:
        raise ValueError("a table needs at least one scored run")
    names = list(labels) if labels is not None else labels_of(runs)
    if len(names) != len(runs):
        raise ValueError(f"{len(runs)} runs need as many labels, got {len(names)}")
    rows: list[Row] = []
    stated: dict[str, int] = {}  # footnote -> its number
    for task, metric in _in_order(runs):
        for run, name in zip(runs, names, strict=True):
            rows += _rows_of(run, name, task, metric, groups)
        for published in published_numbers():
            if published.fits(task, metric):
                mark = stated.setdefault(_footnote(published, runs), len(stated) + 1)
                rows.append(Row(task=task, metric=metric, model=published.model, value=published.value, footnote=mark))
    return Sheet(tuple(map(facts_of, runs)), tuple(rows), tuple(_notes(runs, names, stated)))


def markdown(runs: Sequence[Run], *, labels: Sequence[str] | None = None, groups: bool = False) -> str:
    """The table in Markdown, with what the runs are above and notes below."""
    found = sheet(runs, labels=labels, groups=groups)
    lines = ["# M3D-Bench", ""]
    for facts in found.runs:
        lines.append("- " + "; ".join(f"{key}: {escaped(value)}" for key, value in facts.items()))
    lines += ["", *markdown_table(found.columns()), ""]
    lines += [f"- {escaped(note)}" for note in found.notes]
    return "\n".join(lines) + "\n"


def terminal(runs: Sequence[Run], *, labels: Sequence[str] | None = None, groups: bool = False) -> "Group":
    """The same for `rich`: print it with a console."""
    from rich.console import Group
    from rich.text import Text

    found = sheet(runs, labels=labels, groups=groups)
    heads = [Text("; ".join(f"{key}: {plain(value)}" for key, value in facts.items())) for facts in found.runs]
    columns = {heading: cells for heading, cells in found.columns().items() if heading != MEAN}  # no room for it
    table = terminal_table(columns, [row.footnote is not None for row in found.rows])
    return Group(*heads, table, *(Text(plain(note), style="dim") for note in found.notes))


def markdown_table(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(map(escaped, cells)) + " |" for cells in zip(*columns.values(), strict=True)]
    return lines


def terminal_table(columns: Mapping[str, Sequence[str]], faint: Sequence[bool]) -> "Table":
    """A `rich` table; what the first column says stands above its rows. ``faint`` are rows to hold back."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    (_, first), *others = columns.items()
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, _ in others:
        whole = "value" in heading or heading in ("metric", "model", "p (Holm)")
        table.add_column(heading, justify="right" if heading in ("n", "failed") else "left", no_wrap=whole)
    for place, cells in enumerate(zip(*(column for _, column in others), strict=True)):
        if place == 0 or first[place - 1] != first[place]:
            table.add_row(Text(plain(first[place]), style="bold"))
        last = place + 1 == len(first) or first[place + 1] != first[place]
        table.add_row(*(Text(plain(cell)) for cell in cells), style="dim" if faint[place] else "", end_section=last)
    return table


@cache
def published_numbers() -> tuple[Published, ...]:
    """What papers state, as ``published_numbers.yaml`` has it."""
    content = _publications()
    return tuple(_published(entry, content["sources"][entry["source"]]) for entry in content["numbers"])


def unread_systems() -> dict[str, str]:
    """Systems whose published numbers are not there, and why."""
    return dict(_publications()["unread"])


@cache
def _publications() -> dict[str, Any]:
    text = (resources.files("m3d.bench") / "published_numbers.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Short names for runs: the model's; with the protocol and then a number where they would be alike."""
    names = [str((run.get("model") or {}).get("id", "unnamed")) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({run.get('protocol')})" for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} #{count}" for count, name in enumerate(names, start=1)]
    return names


def number(value: float | None, unit: str = "", *, signed: bool = False) -> str:
    """Three digits for shares and scores, two for what has a unit; ``-`` where there is none."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{value:{sign}.2f} {unit}" if unit else f"{value:{sign}.3f}"


def interval(
    value: float | None, low: float | None, high: float | None, unit: str = "", *, signed: bool = False
) -> str:
    """A value with its interval, where it has one."""
    if value is None or low is None or high is None:
        return number(value, unit, signed=signed)
    ends = ", ".join(number(end, unit, signed=signed).removesuffix(f" {unit}") for end in (low, high))
    return f"{number(value, unit, signed=signed)} [{ends}]"


def plain(text: str) -> str:
    """One line without what could drive a terminal: a model may be named anything."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def _in_order(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Each task and metric of any run once, in the order of the runs."""
    tasks = dict.fromkeys(task for run in runs for task in run["tasks"])
    for task in tasks:
        seen = dict.fromkeys(name for run in runs for name in run["tasks"].get(task, {}).get("metrics", {}))
        yield from ((task, metric) for metric in seen)


def _rows_of(run: Run, name: str, task: str, metric: str, groups: bool) -> Iterator[Row]:
    """The row of a run, and those of its groups if asked for."""
    entry = run["tasks"].get(task, {}).get("metrics", {}).get(metric)
    if entry is None:
        return
    row = Row(task=task, metric=metric, model=name, unit=entry.get("unit") or "", better=entry.get("better", "higher"))
    whole = {"n_failed": run["tasks"][task].get("n_failed"), "mean_of_groups": _mean(entry)}
    yield replace(row, **whole, **_numbers(entry))
    if groups:
        for group, found in (entry.get("groups") or {}).items():
            yield replace(row, group=group, **_numbers(found))


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    spread = [f"{name}{end}" for name in ("blind", "gain") for end in ("", "_low", "_high")]
    return {key: entry.get(key) for key in ("value", "low", "high", *spread, "chance", "n")}


def _mean(entry: Mapping[str, Any]) -> float | None:
    value: float | None = (entry.get("mean_of_groups") or {}).get("value")
    return value


def _notes(runs: Sequence[Run], names: Sequence[str], stated: Mapping[str, int]) -> Iterator[str]:
    for run, name in zip(runs, names, strict=True):
        for task, found in run["tasks"].items():
            if kinds := found.get("failures"):
                said = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
                yield f"{name}, {task}: {found.get('n_failed')} of {found.get('n')} failed, counted as worst ({said})"
            if left_out := found.get("n_not_promptable"):
                total = found["n"] + left_out
                yield f"{name}, {task}: {left_out} of {total} cannot be prompted (nothing to point at), so not judged"
            if (twin := found.get("twin")) and twin["n"] < found["n"]:
                yield f"{name}, {task}: the blind twin was asked {twin['n']} of {found['n']}; the gain is of those"
    variants: dict[str, list[str]] = {}
    for task, metric in _in_order(runs):
        for run in runs:
            entry = run["tasks"].get(task, {}).get("metrics", {}).get(metric)
            if entry is not None and metric not in variants.setdefault(said := str(entry.get("variant")), []):
                variants[said].append(metric)
    yield from (f"{', '.join(metrics)}: {variant}" for variant, metrics in variants.items())
    if any(f"({OTHER_DATA})" in text for text in stated):
        yield "Published numbers that are of other data: nothing follows from a difference to these runs."
    yield from (f"[{count}] {text}" for text, count in stated.items())
    yield from (f"{system}: no published number could be read ({why})" for system, why in unread_systems().items())
    yield NOTICE


def _footnote(published: Published, runs: Sequence[Run]) -> str:
    data = "the data set of these runs" if all(map(published.same_data, runs)) else OTHER_DATA
    others = sorted({str(run.get("protocol")) for run in runs} - {published.protocol})
    beside = f", beside protocol {', '.join(others)} here" if others else ""
    return (
        f"{published.paper}, {published.where}: {published.metric} with protocol {published.protocol}{beside}; "
        f"on {published.data} ({data}), {published.note}"
    )


def _published(entry: Mapping[str, Any], source: Mapping[str, str]) -> Published:
    kept = {key: entry[key] for key in ("model", "task", "metric", "protocol", "data", "note")}
    return Published(**kept, value=entry["percent"] / 100, beside=tuple(entry["beside"]), **source)


def _value(row: Row) -> str:
    """A published number keeps the digits of its paper."""
    if row.footnote is not None and row.value is not None:
        return f"{row.value:.4f}"
    return interval(row.value, row.low, row.high, row.unit)


def _count(count: int | None) -> str:
    return "-" if count is None else str(count)


def escaped(text: str) -> str:
    """A cell of Markdown that shows ``text`` as it is."""
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\|`*_" else letter for letter in line)
