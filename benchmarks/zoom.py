"""What zooming in gains and what it costs: Dice and surface Dice with and without, on the OpenKBP validation patients.

    python benchmarks/zoom.py --data PATH/openkbp --model NAME_OR_FOLDER [--limit N] [--zooms 1.5,2,native]

Every contoured structure is drawn by its name, by a click in its middle and by its box (both from the truth), on the
model's grid and then from closer: "native" is the scan's own voxels, a number is how many times finer than the grid.
Masks are hard and on the scan's own voxels; what the model refuses to draw counts 0. Each row of the table has the
value with zooming in, ``without`` beside it and their difference, ``gain``, with intervals from a bootstrap over
patients.

Every mask is a line of ``runs/zoom/NAME.jsonl``, written when it is drawn, so that a run that was stopped goes on. The
result is ``benchmarks/results/zoom.json``; of a run with ``--limit`` it stays beside the lines. With
``--picture FILE.png`` one patient is drawn instead.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from scoring import FIVE, TOLERANCE_MM, Row, Values, mask_row, measured
from tiny_accuracy import Answers, folder_and_name, machine_facts, model_facts, write_result
from tqdm import tqdm

from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.bench.bootstrap import RESAMPLES, SEED
from m3d.bench.simulated import deepest_voxel
from m3d.inference.overlay import Row as Strip
from m3d.inference.overlay import draw_rows, save_png
from m3d.inference.planes import Finding, choose_window, mid_planes
from m3d.inference.results import Result

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "zoom"
WAYS, WITHOUT = ("name", "click", "box"), "without"
PROTOCOL = "name, click or box/1"


# -- one mask -------------------------------------------------------------------------------------------------------


def segment(scan: m3d.Scan, case: Case, name: str, way: str, zoom: str) -> Result:
    """Draw a structure by its name, or by the click or the box that its truth suggests."""
    truth, closer = case.mask(name), zoom_of(zoom)
    if way == "name":
        return scan.segment(name, zoom=closer)
    if way == "click":
        return scan.segment(points=[(deepest_voxel(truth, case.volume.spacing), 1)], zoom=closer)
    return scan.segment(box=box_of_mask(truth), zoom=closer)


def zoom_of(zoom: str) -> bool | float:
    """What `Scan.segment` takes: ``without``, ``native`` or a number."""
    return {WITHOUT: False, "native": True}.get(zoom) or (zoom != WITHOUT and float(zoom))


def wanted(case: Case, zooms: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Zoom, way and structure of every row of a case; what is not contoured is not asked for."""
    yield from ((zoom, way, name) for name in case.present for way in WAYS for zoom in (WITHOUT, *zooms))


def examine(load: Callable[[], m3d.M3D], case: Case, zooms: Sequence[str], answers: Answers) -> None:
    """Draw all structures of a case that have not been drawn yet."""
    missing = [one for one in wanted(case, zooms) if (case.id, *one) not in answers.rows]
    if not missing:
        return
    scan = load().look(case.volume)
    for zoom, way, name in missing:
        began, guess = time.monotonic(), None
        try:
            masks = segment(scan, case, name, way, zoom).masks
            guess = next((mask.array for mask in masks if way != "name" or mask.name.lower() == name.lower()), None)
        except m3d.NoMask:
            pass  # a refusal: counts 0
        seconds = round(time.monotonic() - began, 3)
        about = {"patient": case.id, "sight": zoom, "task": way, "item": name}
        answers.add({**about, **mask_row(guess, case.mask(name), case.volume.spacing), "seconds": seconds})


# -- the table ------------------------------------------------------------------------------------------------------


def collected(rows: Sequence[Row], zoom: str) -> dict[str, dict[str, Values]]:
    """Values by measure, structure and patient."""
    found: dict[str, dict[str, Values]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["sight"] == zoom:
            for measure in ("dice", "nsd"):
                found[f"{row['task']}: {measure}"][row["item"]][row["patient"]].append(row[measure])
    return found


def table(rows: Sequence[Row], zooms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every ``way: measure, zoom/structure``, and the means over them, beside the same without zooming in."""
    found: dict[str, dict[str, Any]] = {}
    without = collected(rows, WITHOUT)
    for zoom in zooms:
        for measure, structures in collected(rows, zoom).items():
            groups = {name: [name] for name in sorted(structures)}
            groups |= {"five": [name for name in FIVE if name in structures], "mean": sorted(structures)}
            for group, names in groups.items():
                if names:
                    twins = [without[measure][name] for name in names]
                    row = measured([structures[name] for name in names], twins)
                    found[f"{measure}, {zoom}/{group}"] = {
                        key.replace("blind", WITHOUT): value for key, value in row.items()
                    }
    return found


def seconds_a_mask(rows: Sequence[Row], zooms: Sequence[str]) -> dict[str, float]:
    """The mean time of a mask, by zoom."""
    spent = {zoom: [row["seconds"] for row in rows if row["sight"] == zoom] for zoom in (WITHOUT, *zooms)}
    return {zoom: round(sum(times) / len(times), 3) for zoom, times in spent.items() if times}


# -- a picture ------------------------------------------------------------------------------------------------------


def picture(model: m3d.M3D, case: Case, name: str, zoom: str, path: Path) -> None:
    """One structure of a patient by its name: the truth, and what is drawn without and with zooming in."""
    scan, truth = model.look(case.volume), case.mask(name)
    shown = [Finding("contoured by a physician", mask=truth)]
    for how in (WITHOUT, zoom):
        (mask, *_) = segment(scan, case, name, "name", how).masks
        dice = mask_row(mask.array, truth, case.volume.spacing)["dice"]
        said = "on the model's grid" if how == WITHOUT else f"zooming in, {how}"
        shown.append(Finding(said, mask=mask.array, note=f"Dice {dice:.2f}"))
    window = choose_window(case.volume)
    strips = []
    for number in (1, 2):
        beside = [one if place in (0, number) else replace(one, mask=None) for place, one in enumerate(shown)]
        strips.append(Strip(mid_planes(case.volume, beside, centre_on=0), window, label=shown[number].name))
    title = f"{name}, drawn by its name by {model.id} with and without zooming in"
    save_png(draw_rows(strips, shown, title=title, notes=[f"OpenKBP, {case.id}. {window}."]), path)


def main() -> None:
    """Draw, then score all that was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--name", help="what the lines are called; the folder's name if not given")
    parser.add_argument("--zooms", default="native", help="numbers above 1 and native (%(default)s)")
    parser.add_argument("--limit", type=int, help="only the first patients")
    parser.add_argument("--picture", type=Path, help="draw the first patient's mandible into this file instead")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, given.name)
    zooms, load = given.zooms.split(","), cache(lambda: m3d.load(folder))
    folders = cases(given.data, "validation")[: given.limit]
    if given.picture:
        picture(load(), read_case(folders[0]), "mandible", zooms[-1], given.picture)
        return
    about = model_facts(name, folder)
    asked = {"fingerprint": about["fingerprint"], "protocol": PROTOCOL}
    answers = Answers(WORK / f"{name}.jsonl", asked)
    for path in tqdm(folders, unit="patient"):
        examine(load, read_case(path), zooms, answers)
    patients = {path.name for path in folders}
    rows = [row for row in answers.rows.values() if row["patient"] in patients]
    result: Mapping[str, Any] = {
        "command": f"python benchmarks/zoom.py --zooms {given.zooms}",
        **about,
        "patients": len(folders),
        **asked,
        "zooms": zooms,
        "tolerance_mm": TOLERANCE_MM,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        "seconds a mask": seconds_a_mask(rows, zooms),
        **machine_facts(),
        "metrics": table(rows, zooms),
    }
    limited = WORK / f"zoom_{name}_first_{given.limit}.json"
    write_result(given.out or (limited if given.limit else RESULTS / "zoom.json"), result)


if __name__ == "__main__":
    main()
