"""Pictures that a person wants to look at: mid-planes with contours, boxes, letters, a scale bar and a legend.

`m3d.inference.planes` says what is in them; here they are drawn, all at one scale, with matplotlib's Agg canvas alone
(no pyplot, so nothing global is touched).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from m3d.inference.colors import PALETTE
from m3d.inference.planes import NOTICE, Bool, Finding, Plane, Window, choose_window, is_oblique, mid_planes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from data_prep.volume import Volume

__all__ = ["NOTICE", "Row", "draw_rows", "save_overlay", "save_png"]

INK, QUIET, WARN, PAPER = "#f4f5f7", "#9aa3b0", "#ffb454", "#0f1217"
DPI = 150
# all in inches
PANELS_WIDTH, PANELS_HEIGHT = 12.0, 5.6
MARGIN, GAP, HEADER, CAPTION, LINE = 0.35, 0.22, 0.55, 0.3, 0.26
LEGEND_CHAR, LEGEND_PAD = 0.077, 0.66
WORDS_INDENT, WORDS_LINES = 0.9, 12
BARS_MM = (100, 50, 20, 10, 5, 2, 1)

_Style = tuple[str, bool]
"""Colour, and whether its lines are dashed."""


@dataclass(frozen=True, eq=False)
class Row:
    """Planes that stand side by side; ``smooth`` is for the eye, without it the voxels themselves are shown."""

    planes: Sequence[Plane]
    window: Window
    label: str = ""
    smooth: bool = True

    @property
    def columns(self) -> list[list[Plane]]:
        """Side by side; what follows the first plane is stacked where it is so flat that it fits beside it."""
        first, *others = self.planes
        if sum(plane.size_mm[0] for plane in others) <= 0.8 * first.size_mm[0]:
            return [[first], others]
        return [[plane] for plane in self.planes]

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height of the tallest column and width of all of them."""
        heights = [sum(plane.size_mm[0] for plane in column) for column in self.columns]
        widths = [max(plane.size_mm[1] for plane in column) for column in self.columns]
        return max(heights), sum(widths)


def save_overlay(
    path: Path,
    volume: Volume,
    findings: Sequence[Finding],
    *,
    centre_on: int = 0,
    centre: Sequence[float] | None = None,
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Draw what was found in three planes through the middle of one finding, or through ``centre``, a voxel."""
    window = choose_window(volume)
    stated = [f"{window}. Patient right is on the left of the picture."]
    if is_oblique(volume):
        stated.append("Oblique scan, shown along its own axes, the closest to the patient's.")
    row = Row(mid_planes(volume, findings, centre_on=centre_on, centre=centre), window)
    save_png(draw_rows([row], findings, title=title, notes=[" ".join(stated), *notes]), path)


def draw_rows(
    rows: Sequence[Row],
    findings: Sequence[Finding],
    *,
    title: str,
    notes: Sequence[str] = (),
    words: Sequence[tuple[str, str]] = (),
) -> Figure:
    """Draw rows of planes at one scale; findings are numbered as in the planes' ``masks`` and ``boxes``.

    ``words`` are paragraphs below the legend, each with a short label, such as a question and its answer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = _Page.of(rows, findings, len(notes), words)
    styles = [_style(number, finding) for number, finding in enumerate(findings)]
    figure = Figure(figsize=(page.width, page.height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    page.write(figure, MARGIN, MARGIN / 2 + 0.12, title, color=INK, size=15, weight="bold", va="center")
    top = HEADER
    for row in rows:
        if row.label:
            page.write(figure, MARGIN, top + LINE / 2, row.label, color=INK, size=10.5, va="center")
            top += LINE
        for plane, left, above in page.panels(row):
            height, width = (side * page.scale for side in plane.size_mm)
            page.write(figure, left, top + above - 0.08, f"{plane.name}  {plane.where}", color=QUIET, size=8.5)
            axes = figure.add_axes(page.place(left, top + above, width, height))
            _draw_plane(axes, plane, row, styles, page.scale)
            if plane is row.planes[0]:
                _draw_bar(axes, plane)
        top += page.height_of(row)
    _draw_legend(figure, page, styles, top)
    top += len(page.legend) * LINE
    for number, (label, line) in enumerate(page.words):
        y = top + number * LINE + LINE / 2
        page.write(figure, MARGIN, y, label, color=QUIET, size=10, va="center")
        page.write(figure, MARGIN + WORDS_INDENT, y, line, color=INK, size=10, va="center")
    for number, note in enumerate([*notes, NOTICE]):
        last = number == len(notes)
        style = {"color": WARN, "size": 9, "weight": "bold"} if last else {"color": QUIET, "size": 8.5}
        y = page.height - MARGIN + 0.1 - LINE * 0.85 * (len(notes) - number)
        page.write(figure, MARGIN, y, note, va="center", **style)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure; the file says what made it and nothing about the scan."""
    figure.savefig(path, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": "m3d", "Comment": NOTICE})


@dataclass(frozen=True, eq=False)
class _Page:
    """Sizes in inches, measured from the upper left corner."""

    width: float
    height: float
    scale: float  # inches a mm
    legend: Sequence[Sequence[tuple[float, int, Finding]]]
    words: Sequence[tuple[str, str]]

    @classmethod
    def of(
        cls, rows: Sequence[Row], findings: Sequence[Finding], num_notes: int, words: Sequence[tuple[str, str]]
    ) -> _Page:
        heights = sum(row.size_mm[0] for row in rows)
        widest = max(row.size_mm[1] for row in rows)
        tallest = PANELS_HEIGHT * (1 if len(rows) == 1 else 1.6)
        scale = min(PANELS_WIDTH / widest, tallest / heights)
        width = max(widest * scale + GAP * (len(rows[0].planes) - 1), 7.0) + 2 * MARGIN
        legend = list(_legend_lines(findings, width - 2 * MARGIN))
        labels = sum(bool(row.label) for row in rows) * LINE
        lines = list(_word_lines(words, width - 2 * MARGIN - WORDS_INDENT))
        below = (len(legend) + len(lines)) * LINE + LINE * 0.85 * (num_notes + 1) + MARGIN
        page = cls(width, HEADER + labels + below, scale, legend, lines)
        return replace(page, height=page.height + sum(page.height_of(row) for row in rows))

    def panels(self, row: Row) -> Iterator[tuple[Plane, float, float]]:
        """Each plane with its left edge on the page and its upper edge in the row."""
        left = MARGIN
        for column in row.columns:
            top = CAPTION
            for plane in column:
                yield plane, left, top
                top += plane.size_mm[0] * self.scale + GAP + CAPTION
            left += max(plane.size_mm[1] for plane in column) * self.scale + GAP

    def height_of(self, row: Row) -> float:
        """From the captions to the gap below."""
        return max(top + plane.size_mm[0] * self.scale for plane, _, top in self.panels(row)) + GAP

    def place(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """A rectangle as matplotlib wants it: fractions, from the bottom."""
        return left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height

    def write(self, figure: Figure, left: float, top: float, text: str, **style: Any) -> None:  # noqa: ANN401
        figure.text(left / self.width, 1 - top / self.height, text, **({"va": "baseline", "ha": "left"} | style))


def _draw_plane(axes: Axes, plane: Plane, row: Row, styles: Sequence[_Style], scale: float) -> None:
    from matplotlib.patches import Rectangle

    height, width = plane.size_mm
    axes.set_axis_off()
    axes.imshow(
        np.clip(plane.image, row.window.lo, row.window.hi),
        cmap="gray",
        vmin=row.window.lo,
        vmax=row.window.hi,
        extent=(0, width, height, 0),
        interpolation="bicubic" if row.smooth else "nearest",
        aspect="auto",
    )
    # a row may show the scan alone, without what was found in it
    for (color, dashed), mask, box in zip(styles, plane.masks, plane.boxes, strict=False):
        if mask is not None and mask.any():
            _draw_mask(axes, plane, mask, (color, dashed), scale)
        if box is not None:
            corner, sides = box[:2], box[2:]
            axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="black", linewidth=2.8, alpha=0.5))
            style = "--" if dashed else "-"
            axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, linewidth=1.6, linestyle=style))
    axes.set(xlim=(0, width), ylim=(height, 0))
    _draw_letters(axes, plane.letters, size=min(11.0, 72 * scale * height / 3))


def _draw_mask(axes: Axes, plane: Plane, mask: Bool, style: _Style, scale: float) -> None:
    """Fill and contour at 0.5 of the spline through the voxels: the voxel's own edge, rounded for the eye."""
    color, dashed = style
    padded = np.pad(mask, 1).astype(np.float32)
    zoom = [max(1, min(8, round(side * scale * DPI / 2))) for side in plane.spacing]
    fine = ndimage.zoom(padded, zoom, order=3, mode="nearest", grid_mode=True)
    y, x = ((np.arange(n) + 0.5) / k * side - side for n, k, side in zip(fine.shape, zoom, plane.spacing, strict=True))
    axes.contourf(x, y, fine, levels=[0.5, 2.0], colors=[color], alpha=0.36, antialiased=True)
    axes.contour(x, y, fine, levels=[0.5], colors=[color], linewidths=1.5, linestyles="dashed" if dashed else "solid")


def _draw_letters(axes: Axes, letters: str, size: float) -> None:
    sides = ((0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center"))
    ends = ((0.5, 0.985, "center", "top"), (0.5, 0.015, "center", "bottom"))
    for letter, (x, y, horizontal, vertical) in zip(letters, (*sides, *ends), strict=True):
        _outlined(axes, x, y, letter, ha=horizontal, va=vertical, size=size, weight="bold")


def _draw_bar(axes: Axes, plane: Plane) -> None:
    """A scale bar of at most a third of the plane, at the lower left."""
    from matplotlib.patches import Rectangle

    height, width = plane.size_mm
    length = next((bar for bar in BARS_MM if bar <= width / 3.2), BARS_MM[-1])
    left, bottom = width * 0.03, height * 0.95
    axes.add_patch(
        Rectangle((left, bottom), length, height * 0.01, facecolor=INK, edgecolor="black", linewidth=0.6, zorder=5)
    )
    label = f"{length // 10} cm" if length >= 10 else f"{length} mm"
    _outlined(axes, 0.03 + length / width / 2, 0.06, label, ha="center", va="bottom", size=8.5)


def _outlined(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:  # noqa: ANN401
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=2.2, foreground="black", alpha=0.75)]
    axes.text(x, y, text, color=INK, transform=axes.transAxes, path_effects=effects, zorder=6, **style)


def _draw_legend(figure: Figure, page: _Page, styles: Sequence[_Style], top: float) -> None:
    from matplotlib.patches import Rectangle

    for line, entries in enumerate(page.legend):
        y = top + line * LINE + LINE / 2
        for left, number, finding in entries:
            color, dashed = styles[number]
            swatch = page.place(MARGIN + left, y - 0.075, 0.24, 0.15)
            figure.add_artist(
                Rectangle(
                    swatch[:2],
                    *swatch[2:],
                    transform=figure.transFigure,
                    facecolor=(color, 0.35 if finding.mask is not None else 0.0),
                    edgecolor=color,
                    linewidth=1.5,
                    linestyle="--" if dashed else "-",
                )
            )
            page.write(figure, MARGIN + left + 0.34, y, _legend_text(finding), color=INK, size=10, va="center_baseline")


def _legend_lines(findings: Sequence[Finding], width: float) -> Iterator[list[tuple[float, int, Finding]]]:
    """Flow the legend's entries into lines that fit."""
    line: list[tuple[float, int, Finding]] = []
    left = 0.0
    for number, finding in enumerate(findings):
        size = len(_legend_text(finding)) * LEGEND_CHAR + LEGEND_PAD
        if line and left + size > width:
            yield line
            line, left = [], 0.0
        line.append((left, number, finding))
        left += size
    if line:
        yield line


def _word_lines(words: Sequence[tuple[str, str]], width: float) -> Iterator[tuple[str, str]]:
    """Paragraphs in lines that fit, the label beside the first."""
    for label, text in words:
        wrapped = [
            line
            for part in text.splitlines() or [""]
            for line in textwrap.wrap(part, max(int(width / LEGEND_CHAR), 20)) or [""]
        ]
        if len(wrapped) > WORDS_LINES:
            wrapped = [*wrapped[: WORDS_LINES - 1], "…"]
        yield from zip([label, *[""] * (len(wrapped) - 1)], wrapped, strict=True)


def _legend_text(finding: Finding) -> str:
    return f"{finding.name}   {finding.note}" if finding.note else finding.name


def _style(number: int, finding: Finding) -> _Style:
    """Colour of the n-th finding, its own if it has one; of the palette dashed once all have been used."""
    if finding.color is not None:
        return finding.color, False
    return PALETTE[number % len(PALETTE)], bool(number // len(PALETTE) % 2)
