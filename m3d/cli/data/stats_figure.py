"""The figure of `m3d data stats`: six panels that say at a glance what a store can teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from data_prep.stats import Statistics

__all__ = ["draw_statistics"]

COLOURS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}
ASKED, SAID, INK, GRID = "#E69F00", "#0072B2", "#22272e", "#d9dde3"
MOST = 24  # rows that stay readable
DPI = 130


def draw_statistics(found: Statistics, path: Path) -> None:
    """Draw and write the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = found.structure_names[:MOST]
    rows = max(len(names), len(found.answers), 8)
    figure = Figure(figsize=(15, 4.6 + 0.21 * min(rows, MOST) + 3.2), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = 4.2, 1.5 + 0.21 * min(rows, MOST)
    panels = figure.subplots(2, 3, height_ratios=[upper, max(lower, 3.0)])
    _draw_tasks(panels[0, 0], found)
    _draw_density(panels[0, 1], found)
    _draw_words(panels[0, 2], found)
    _draw_structures(panels[1, 0], found, names)
    _draw_volumes(panels[1, 1], found, names)
    _draw_answers(panels[1, 2], found)
    splits = [f"{split}: {len(found.images[split]):,} images of {len(found.patients[split]):,} patients, "
              f"{found.records[split]:,} records" for split in found.splits]  # fmt: skip
    figure.suptitle("   |   ".join(splits), fontsize=12, color=INK)
    figure.savefig(path, format="png", metadata={"Software": "m3d"})


def _draw_tasks(axes: Axes, found: Statistics) -> None:
    tasks = sorted(found.tasks, reverse=True)
    start = [0] * len(tasks)
    for split in found.splits:
        counts = [found.tasks[task][split] for task in tasks]
        axes.barh(tasks, counts, left=start, color=COLOURS[split], label=split, height=0.7)
        start = [before + count for before, count in zip(start, counts, strict=True)]
    for task, total in zip(tasks, start, strict=True):
        axes.annotate(f" {total:,}", (total, task), va="center", fontsize=8, color=INK)
    axes.margins(x=0.14)
    axes.legend(fontsize=8, frameon=False, loc="best")
    _dress(axes, "Records by task", "records")


def _draw_density(axes: Axes, found: Statistics) -> None:
    entries = [[sum(found.by_image[image].values()) for image in found.images[split]] for split in found.splits]
    low, high = min(map(min, entries)), max(map(max, entries))
    bins = [edge - 0.5 for edge in range(low, high + 2)] if high - low < 40 else 40
    axes.hist(entries, bins=bins, color=[COLOURS[split] for split in found.splits], stacked=True, rwidth=0.9)
    axes.set_xlim(min(low - 1, 0.7 * low), 1.1 * high + 1)
    axes.locator_params(integer=True)
    several = found.kinds
    axes.annotate(
        f"mean {found.entries.mean:.1f} entries,\n{several.mean:.1f} tasks an image",
        (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_ylabel("images", fontsize=9)
    axes.margins(y=0.25)
    _dress(axes, "Density: entries an image", "entries", axis="y")


def _draw_words(axes: Axes, found: Statistics) -> None:
    from matplotlib.patches import Patch

    tasks = sorted(found.tasks, reverse=True)
    _boxes(axes, {task: found.asked_words[task] for task in tasks if task in found.asked_words}, tasks, ASKED, 0.18)
    _boxes(axes, {task: found.said_words[task] for task in tasks if task in found.said_words}, tasks, SAID, -0.18)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xscale("symlog", linthresh=10)
    most = max([1, *(max(some) for some in (*found.asked_words.values(), *found.said_words.values()))])
    axes.set_xticks([tick for tick in (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= most])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(handles=[Patch(color=ASKED, label="asked"), Patch(color=SAID, label="said")], fontsize=8, frameon=False)
    _dress(axes, "Words (box: quartiles, whiskers: 5 and 95 %)", "words")


def _draw_structures(axes: Axes, found: Statistics, names: Sequence[str]) -> None:
    if _nothing(axes, names, "Structures", "no record boxes or draws a structure"):
        return
    shown = names[::-1]
    drawn = [len(found.voxels.get(name, ())) for name in shown]
    axes.barh(
        range(len(shown)), [found.asked_for[name] for name in shown], color="#9bc4e2", height=0.75, label="records"
    )
    axes.barh(range(len(shown)), drawn, color=SAID, height=0.4, label="images with a mask")
    axes.set_yticks(range(len(shown)), shown)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    more = len(found.structure_names) - len(names)
    _dress(axes, f"Structures{f' (the first {len(names)}; {more} more)' if more else ''}", "count")


def _draw_volumes(axes: Axes, found: Statistics, names: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    in_ml = any(found.millilitres.values())
    values: Mapping[str, Sequence[float]] = found.millilitres if in_ml else found.voxels
    shown = [name for name in names[::-1] if values.get(name)]
    if _nothing(axes, shown, "Size of structures", "no mask was opened (--fast), or there is none"):
        return
    _boxes(axes, {name: values[name] for name in shown}, shown, SAID, 0.0)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    _dress(axes, "Size of structures, an image each", "mL" if in_ml else "voxels")


def _draw_answers(axes: Axes, found: Statistics) -> None:
    often = sorted(found.answers, key=lambda kind: (-found.answers[kind].total(), kind))[:MOST]
    kinds = sorted(often, key=lambda kind: found.majority(kind)[1])
    if _nothing(axes, kinds, "Answers", "no questions"):
        return
    axes.barh(kinds, [found.majority(kind)[1] for kind in kinds], color="#CC79A7", height=0.7)
    for kind in kinds:
        answer, rate = found.majority(kind)
        short = answer if len(answer) <= 24 else f"{answer[:23]}…"
        axes.annotate(f" {short} (n={found.answers[kind].total()})", (rate, kind), va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, 1.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    _dress(axes, "Always the most frequent answer is right in", "of the questions")


def _boxes(axes: Axes, values: Mapping[str, Sequence[float]], order: Sequence[str], colour: str, offset: float) -> None:
    """A row each: a line from 5 to 95 %, a bar over the quartiles, a mark at the median."""
    height = 0.32 if offset else 0.6
    for name, some in values.items():
        at = order.index(name) + offset
        low, first, middle, third, high = np.percentile(some, [5, 25, 50, 75, 95]).tolist()
        axes.hlines(at, low, high, color=colour, linewidth=1.3)
        axes.barh(at, third - first, left=first, height=height, color=colour, alpha=0.6)
        axes.vlines(middle, at - height / 2, at + height / 2, color=INK, linewidth=1.4)


def _nothing(axes: Axes, values: Sequence[str], title: str, why: str) -> bool:
    if values:
        return False
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=9, color=INK)
    axes.set_axis_off()
    return True


def _dress(axes: Axes, title: str, label: str, *, axis: str = "x") -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis=axis, color=GRID, linewidth=0.7)  # type: ignore[arg-type]  # "x" or "y"
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
