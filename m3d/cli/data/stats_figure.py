"""The figure of `m3d data stats`: six panels that say at a glance what a store can teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m3d.cli.common import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    from data_prep.stats import Statistics

__all__ = ["draw_statistics"]

COLOURS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}
ASKED, SAID, INK, GRID = "#E69F00", "#0072B2", "#22272e", "#d9dde3"
MOST, LONGEST = 24, 26  # rows and letters that stay readable
DPI = 130


def draw_statistics(found: Statistics, path: Path) -> None:
    """Draw and write the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = found.structure_names[:MOST]
    rows = max(len(names), len(found.questions), 8)
    figure = Figure(figsize=(15, 4.6 + 0.21 * min(rows, MOST) + 3.2), dpi=DPI, layout=_padded(), facecolor="white")
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
    _dress(axes, "Records by task", "records")
    _legend(axes)


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
    _dress(axes, "Words: quartiles, 5 to 95 %", "words")
    _legend(axes, [Patch(color=ASKED, label="asked"), Patch(color=SAID, label="said")])


def _draw_structures(axes: Axes, found: Statistics, names: Sequence[str]) -> None:
    if _nothing(axes, names, "Structures", "no record boxes or draws a structure"):
        return
    shown = names[::-1]
    drawn = [len(found.voxels.get(name, ())) for name in shown]
    axes.barh(
        range(len(shown)), [found.asked_for[name] for name in shown], color="#9bc4e2", height=0.75, label="records"
    )
    axes.barh(range(len(shown)), drawn, color=SAID, height=0.4, label="images with a mask")
    axes.set_yticks(range(len(shown)), [shortened(name, LONGEST) for name in shown])
    number = len(found.structure_names)
    _dress(axes, f"Structures{f' ({len(names)} of {number})' if number > len(names) else ''}", "count")
    _legend(axes)


def _draw_volumes(axes: Axes, found: Statistics, names: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    in_ml = any(found.millilitres.values())
    values: Mapping[str, Sequence[float]] = found.millilitres if in_ml else found.voxels
    shown = [name for name in names[::-1] if values.get(name)]
    if _nothing(axes, shown, "Size of structures", "no mask was opened (--fast), or there is none"):
        return
    _boxes(axes, {name: values[name] for name in shown}, shown, SAID, 0.0)
    axes.set_yticks(range(len(shown)), [shortened(name, LONGEST) for name in shown])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    _dress(axes, "Size of structures, an image each", "mL" if in_ml else "voxels")


def _draw_answers(axes: Axes, found: Statistics) -> None:
    questions = found.questions
    numbers = {name: sum(found.answers[kind].total() for kind in kinds) for name, kinds in questions.items()}
    often = sorted(questions, key=lambda name: (-numbers[name], name))[:MOST]
    if _nothing(axes, often, "Answers", "no questions"):
        return
    best = {name: found.majority(*questions[name]) for name in often}
    names = sorted(often, key=lambda name: (best[name][1], name))
    axes.barh(names, [best[name][1] for name in names], color="#CC79A7", height=0.7)
    axes.set_yticks(range(len(names)), [shortened(name, LONGEST) for name in names])
    for name in names:
        answer, rate = best[name]
        axes.annotate(
            f" {shortened(answer, LONGEST)} (n={numbers[name]:,})", (rate, name), va="center", fontsize=7.5, color=INK
        )
    axes.set_xlim(0, 1.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    _dress(axes, "Always the most frequent answer is right in", "of the questions (n: with and without options)")


def _boxes(axes: Axes, values: Mapping[str, Sequence[float]], order: Sequence[str], colour: str, offset: float) -> None:
    """A row each: a line from 5 to 95 %, a bar over the quartiles, a mark at the median."""
    height = 0.32 if offset else 0.6
    for name, some in values.items():
        at = order.index(name) + offset
        low, first, middle, third, high = np.percentile(some, [5, 25, 50, 75, 95]).tolist()
        axes.hlines(at, low, high, color=colour, linewidth=1.3)
        axes.barh(at, third - first, left=first, height=height, color=colour, alpha=0.6)
        axes.vlines(middle, at - height / 2, at + height / 2, color=INK, linewidth=1.4)


def _legend(axes: Axes, handles: Sequence[Patch] | None = None) -> None:
    """Below the axis, at the right: there it covers nothing."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else list(handles)
    axes.legend(
        handles=shown,
        fontsize=8,
        frameon=False,
        ncols=3,
        loc="upper right",
        bbox_to_anchor=(1.0, 0.0),
        borderaxespad=2.2,
    )


def _padded() -> ConstrainedLayoutEngine:
    """Room at the edges and between panels."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1, wspace=0.02)


def _nothing(axes: Axes, values: Sequence[str], title: str, why: str) -> bool:
    if values:
        return False
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=9, color=INK)
    axes.set_axis_off()
    return True


def _dress(axes: Axes, title: str, label: str, *, axis: str = "x") -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel(label, fontsize=9, loc="left")
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis=axis, color=GRID, linewidth=0.7)  # type: ignore[arg-type]  # "x" or "y"
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
