"""How well the bundled model draws, locates and answers on the OpenKBP validation patients, beside its blind twin.

    python benchmarks/tiny_accuracy.py --data PATH/openkbp [--model m3d-tiny] [--limit N]

The blind twin is the same model with every voxel zero. Dice is hard, on the scan's own grid; a structure that the model
refuses to draw counts as 0. Box IoU is true 3D IoU against the box of the contour. Writes
``benchmarks/results/tiny_accuracy.json`` and prints the table.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import m3d
from data_prep.atomic import atomic_path
from data_prep.boxes import box_of_mask, iou
from data_prep.case import Case
from data_prep.derived import derived_drafts
from data_prep.openkbp import cases, read_case
from m3d.tasks import TASKS
from m3d.tasks.codecs import Frac3
from m3d.tasks.vqa import write_choices

TAUGHT = ("larger", "volume", "length", "cut")  # the families of questions that m3d-tiny was trained on
RESULT = Path(__file__).parent / "results" / "tiny_accuracy.json"


def dice(guess: np.ndarray, truth: np.ndarray) -> float:
    """Hard Dice of two masks on one grid; both empty is 1."""
    total = int(guess.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((guess & truth).sum()) / total


def draw(scan: m3d.Scan, name: str, truth: np.ndarray) -> float:
    """Dice of one structure by name, 0 where the model does not draw it."""
    try:
        masks = [mask for mask in scan.segment(name).masks if mask.name == name]
    except m3d.NoMask:
        return 0.0
    return dice(masks[0].array, truth) if masks else 0.0


def examine(scan: m3d.Scan, case: Case, rows: dict[str, list[float]]) -> None:
    """Everything that is measured on one case by one (seeing or blind) scan."""
    for name in case.names.values():
        truth = case.mask(name)
        if not truth.any():
            continue  # not contoured is not absent
        rows[f"dice/{name}"].append(draw(scan, name, truth))
        found = scan.locate(name).boxes
        rows[f"iou/{name}"].append(iou(found[0].voxel, box_of_mask(truth)) if found else 0.0)
    for draft in derived_drafts(case, random.Random(case.id), kinds=("vqa",)):
        if draft.task != "vqa.closed" or draft.subtask not in TAUGHT or draft.options is None:
            continue
        question = write_choices(str(draft.slots["question"]), draft.options)
        said = TASKS["vqa.closed"].parse(scan.ask(question).text, Frac3())
        rows[f"vqa/{draft.subtask}"].append(float(said == draft.choice))
        rows["vqa/chance"].append(1 / len(draft.options))


def main() -> None:
    """Examine every validation patient twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    model = m3d.load(given.model)
    seeing, blind = defaultdict(list), defaultdict(list)
    began = time.monotonic()
    folders = cases(given.data, "validation")[: given.limit]
    for folder in tqdm(folders, unit="patient"):
        case = read_case(folder)
        scan = model.look(case.volume)
        examine(scan, case, seeing)
        examine(scan.blinded(), case, blind)
    table = {
        name: {"n": len(values), "model": statistics.fmean(values), "blind": statistics.fmean(blind[name])}
        for name, values in sorted(seeing.items())
    }
    for kind in ("dice", "iou", "vqa"):
        named = [name for name in table if name.startswith(f"{kind}/") and name != "vqa/chance"]
        pairs = [(len(seeing[n]), table[n]) for n in named]
        weigh = [count if kind == "vqa" else 1 for count, _ in pairs]
        table[f"{kind}/mean"] = {
            "n": sum(count for count, _ in pairs),
            **{who: float(np.average([row[who] for _, row in pairs], weights=weigh)) for who in ("model", "blind")},
        }
    result = {
        "command": "python benchmarks/tiny_accuracy.py",
        "model": model.id,
        "patients": len(folders),
        "seconds": round(time.monotonic() - began),
        "metrics": table,
    }
    with atomic_path(RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{'metric':24} {'n':>4} {'model':>7} {'blind':>7}")
    for name, row in table.items():
        print(f"{name:24} {row['n']:4d} {row['model']:7.3f} {row['blind']:7.3f}")


if __name__ == "__main__":
    main()
