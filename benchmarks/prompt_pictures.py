"""Two pictures for docs/segmentation.md: what each kind of prompt draws, and how masks grow better with clicks.

    python benchmarks/prompt_pictures.py --data PATH/openkbp      docs/prompts.png and docs/clicks.png

The first shows one structure of the first validation patient, drawn by the bundled model; the second what
``benchmarks/clicks.py`` has measured.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scoring import mask_row
from tiny_accuracy import folder_and_name

from data_prep.boxes import Box, box_of_mask
from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.bench.simulated import deepest_voxel
from m3d.inference.overlay import Row, draw_rows, save_png
from m3d.inference.planes import Finding, choose_window, mid_planes

HOME = Path(__file__).parents[1]
DOCS, CLICKS = HOME / "docs", HOME / "benchmarks" / "results" / "clicks.json"
AFTER = (1, 3, 5, 10)
WAYS = {"clicks": "clicks alone", "no feedback": "clicks, its earlier mask not shown", "name": "clicks after the name"}
Mask = npt.NDArray[np.bool_]


def prompted(scan: m3d.Scan, name: str, truth: Mask, spacing: tuple[float, float, float]) -> Iterator[tuple[str, Mask]]:
    """The structure by each kind of prompt that a session takes, each in an object of its own."""
    session, inside, box = scan.session(), deepest_voxel(truth, spacing), box_of_mask(truth)
    d = round(inside[0])
    where = np.argwhere(truth[d])
    stroke = [(d, int(h), int(w)) for h, w in where[:: max(1, len(where) // 12)]]
    lo, hi = where.min(axis=0).tolist(), (where.max(axis=0) + 1).tolist()
    yield "name", session.object("by name").add_name(name).mask.array
    yield "one point", session.object("by point").add_point(inside).mask.array
    yield "box", session.object("by box").add_box(Box(box.lo, box.hi)).mask.array
    yield "box on one slice", session.object("by slice").add_slice_box(axis=0, at=d, lo=lo, hi=hi).mask.array
    yield "scribble", session.object("by scribble").add_scribble(stroke).mask.array
    begun = session.object("by mask")
    begun.add_mask(np.roll(truth, 2, axis=1))
    yield "a shifted mask, then a point", begun.add_point(inside).mask.array


def draw_prompts(model: m3d.M3D, case: Case, name: str, path: Path) -> None:
    """A row for each kind of prompt: the contour and the mask that was drawn."""
    truth, window = case.mask(name), choose_window(case.volume)
    shown = [Finding("contoured by a physician", mask=truth)]
    for kind, mask in prompted(model.look(case.volume), name, truth, case.volume.spacing):
        dice = mask_row(mask, truth, case.volume.spacing)["dice"]
        shown.append(Finding(kind, mask=mask, note=f"Dice {dice:.2f}"))
    rows = []
    for number in range(1, len(shown)):
        beside = [one if place in (0, number) else replace(one, mask=None) for place, one in enumerate(shown)]
        rows.append(Row(mid_planes(case.volume, beside, centre_on=0), window, label=shown[number].name))
    title = f"{name} by every kind of prompt, {model.id}"
    save_png(draw_rows(rows, shown, title=title, notes=[f"OpenKBP, {case.id}. {window}."]), path)


def draw_clicks(path: Path) -> None:
    """Mean Dice of the five structures after so many clicks, with its 95 % interval."""
    measured = json.loads(CLICKS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for way, label in WAYS.items():
        points = [measured["metrics"][f"{way}: dice@{count}/five"] for count in AFTER]
        values = [point["value"] for point in points]
        axes.plot(AFTER, values, marker="o", label=label)
        axes.fill_between(AFTER, [one["low"] for one in points], [one["high"] for one in points], alpha=0.15)
    axes.axhline(measured["target"], color="grey", linestyle=":", label=f"NoC@{round(100 * measured['target'])}")
    axes.set(xlabel="clicks", ylabel="Dice, mean of five structures", xticks=AFTER, ylim=(0.5, 0.85))
    axes.set_title(f"{measured['model']}, {measured['patients']} validation patients, 95 % CI by patient", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--structure", default="left parotid")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for both (%(default)s)")
    given = parser.parse_args()
    draw_clicks(given.out / "clicks.png")
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; only the curve was drawn")
        return
    folder, _ = folder_and_name(given.model, None)
    draw_prompts(
        m3d.load(folder), read_case(cases(given.data, "validation")[0]), given.structure, given.out / "prompts.png"
    )


if __name__ == "__main__":
    main()
