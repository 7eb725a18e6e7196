"""How few clicks a structure takes: simulated users on the OpenKBP validation patients.

    python benchmarks/clicks.py --data PATH/openkbp --model NAME_OR_FOLDER [--limit N]

The user knows the truth. The first click is in the middle of it, each next one in the middle of the largest error:
inside where that is missed, outside where it is wrongly drawn (in the manner of RITM, Sofiiuk et al. 2022, in three
dimensions and in mm). There are three ways: ``clicks`` alone, with the answer so far as a prompt of the next one;
``no feedback``, without that; and ``name``, where the name is asked for first and the clicks correct it. The blind twin
sees a volume of zeros and has the same user: what it reaches, clicks alone tell.

Every structure is a line of ``runs/clicks/NAME.jsonl``, written when its clicks are done, so that a run that was
stopped goes on. The result is ``benchmarks/results/clicks.json``; of a run with ``--limit`` it stays beside the lines.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, label
from scoring import FIVE, Mask, Row, Values, measured
from tiny_accuracy import Answers, folder_and_name, machine_facts, model_facts, write_result
from tqdm import tqdm

from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.bench.bootstrap import RESAMPLES, SEED
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.inference.session import SessionObject

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "clicks"
MOST, SHOWN, TARGET = 10, (0, 1, 3, 5, 10), 0.8
WAYS = {"clicks": (False, True), "no feedback": (False, False), "name": (True, True)}  # asked by name, feedback
SIGHTS = ("seeing", "blind")
PROTOCOL = "middle of the largest error/1"

# -- the user -------------------------------------------------------------------------------------------------------


def next_click(
    guess: Mask, truth: Mask, spacing: Sequence[float], clicked: Sequence[tuple[int, ...]] = ()
) -> tuple[tuple[int, int, int], bool] | None:
    """Where a user who knows the truth clicks next, and whether that is inside; None where nothing is left to say.

    The largest error is the largest piece, in voxels, of what is missed or wrongly drawn, without voxels that were
    clicked before; a missed piece goes before one of the same size that is wrongly drawn.
    """
    found: list[tuple[int, bool, Mask]] = []
    for error, inside in ((truth & ~guess, True), (guess & ~truth, False)):
        for at in clicked:
            error[at] = False
        pieces, number = label(error)
        if number:
            sizes = np.bincount(pieces.ravel())[1:]
            found.append((int(sizes.max()), inside, pieces == int(sizes.argmax()) + 1))
    if not found:
        return None
    _, inside, piece = max(found, key=lambda one: one[0])
    return middle_of(piece, spacing), inside


def middle_of(piece: Mask, spacing: Sequence[float]) -> tuple[int, int, int]:
    """The voxel farthest from all that is outside, in mm; of equals, as in a thin shell, that nearest to the centre."""
    box = box_of_mask(piece)
    inner = np.pad(piece[tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))], 1)
    depth = distance_transform_edt(inner, sampling=tuple(spacing))
    deepest = np.argwhere(depth >= depth.max() - 1e-9)
    centre = np.argwhere(inner).mean(axis=0)
    nearest = deepest[np.linalg.norm((deepest - centre) * np.array(spacing), axis=1).argmin()]
    d, h, w = (int(side) + int(low) - 1 for side, low in zip(nearest, box.lo, strict=True))
    return d, h, w


def click_on(target: SessionObject, truth: Mask, spacing: tuple[float, ...], *, name: str | None) -> dict[str, Any]:
    """Dice before the first click and after each, and what each took; of a mask that is right it stays."""
    blank = np.zeros_like(truth)
    guess, scores, times, clicked = blank, [0.0], [], []
    if name is not None:
        try:
            guess = target.add_name(name).array
        except m3d.NoMask:
            pass  # a refusal: the clicks begin from nothing
        scores = [dice(guess, truth, spacing)]
    while len(times) < MOST:
        # Without a mask all is missed, and the middle of its largest piece is the first click.
        click = next_click(guess, truth, spacing, clicked)
        if click is None:
            break
        at, inside = click
        step = target.add_point(at, positive=inside)
        guess = step.array
        clicked.append(at)
        scores.append(dice(guess, truth, spacing))
        times.append(round(step.milliseconds, 2))
    scores += scores[-1:] * (MOST + 1 - len(scores))
    return {"dice": scores, "milliseconds": times, "clicks": [list(at) for at in clicked]}


def dice(guess: Mask, truth: Mask, spacing: tuple[float, ...]) -> float:
    """Hard Dice on the scan's own grid."""
    d, h, w = spacing
    return Dice().value(MaskPair("", guess, truth, (d, h, w)))


def clicks_needed(scores: Sequence[float], target: float = TARGET) -> int | None:
    """After how many clicks the target is reached for the first time; None where it is not."""
    return next((number for number, score in enumerate(scores) if score >= target), None)


# -- a patient ------------------------------------------------------------------------------------------------------


def wanted(case: Case) -> Iterator[tuple[str, str, str]]:
    """Sight, way and structure of every row of a case; what is not contoured is not asked for."""
    yield from ((sight, way, name) for sight in SIGHTS for way in WAYS for name in case.present)


def examine(load: Callable[[], m3d.M3D], case: Case, answers: Answers) -> None:
    """Click at all structures of a case that have not been clicked at yet."""
    missing = [one for one in wanted(case) if (case.id, *one) not in answers.rows]
    if not missing:
        return
    scans: dict[str, m3d.Scan] = {"seeing": load().look(case.volume)}
    if any(sight == "blind" for sight, _, _ in missing):
        scans["blind"] = scans["seeing"].blinded()
    for sight, way, name in missing:
        named, feedback = WAYS[way]
        began = time.monotonic()
        target = scans[sight].session(feedback=feedback).object(name)
        row = click_on(target, case.mask(name), case.volume.spacing, name=name if named else None)
        about = {"patient": case.id, "sight": sight, "task": way, "item": name}
        answers.add({**about, **row, "seconds": round(time.monotonic() - began, 3)})


# -- the table ------------------------------------------------------------------------------------------------------


def values_of(row: Row) -> dict[str, float]:
    """What a row says, ``way: measure`` -> value; a target that is never reached counts as the most clicks."""
    needed = clicks_needed(row["dice"])
    found = {f"dice@{number}": row["dice"][number] for number in SHOWN if number or row["task"] == "name"}
    found |= {"noc80": float(MOST if needed is None else needed), "never80": float(needed is None)}
    return {f"{row['task']}: {measure}": value for measure, value in found.items()}


def collected(rows: Sequence[Row], sight: str) -> dict[str, dict[str, Values]]:
    """Values by measure, structure and patient."""
    found: dict[str, dict[str, Values]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["sight"] == sight:
            for measure, value in values_of(row).items():
                found[measure][row["item"]][row["patient"]].append(value)
    return found


def table(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Every ``way: measure/structure``, and the means over them, ``/five`` and ``/mean``, beside the blind twin."""
    seeing, blind = collected(rows, "seeing"), collected(rows, "blind")
    found: dict[str, dict[str, Any]] = {}
    for measure, structures in seeing.items():
        groups = {name: [name] for name in sorted(structures)}
        groups |= {"five": [name for name in FIVE if name in structures], "mean": sorted(structures)}
        for group, names in groups.items():
            if names:
                twins = [blind[measure][name] for name in names if name in blind[measure]]
                found[f"{measure}/{group}"] = measured([structures[name] for name in names], twins)
    return found


def speed(rows: Sequence[Row]) -> dict[str, Any]:
    """Milliseconds a click, by way: those of seeing scans."""
    found = {}
    for way in WAYS:
        times = [one for row in rows if (row["sight"], row["task"]) == ("seeing", way) for one in row["milliseconds"]]
        if times:
            found[way] = {"median": statistics.median(times), "p90": float(np.quantile(times, 0.9)), "n": len(times)}
    return found


def main() -> None:
    """Click, then score all that was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--name", help="what the lines are called; the folder's name if not given")
    parser.add_argument("--limit", type=int, help="only the first patients")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, given.name)
    about = model_facts(name, folder)
    asked = {"fingerprint": about["fingerprint"], "protocol": PROTOCOL, "ways": list(WAYS), "most": MOST}
    answers = Answers(WORK / f"{name}.jsonl", asked)
    folders = cases(given.data, "validation")[: given.limit]
    load = cache(lambda: m3d.load(folder))
    for path in tqdm(folders, unit="patient"):
        examine(load, read_case(path), answers)
    patients = {path.name for path in folders}
    rows = [row for row in answers.rows.values() if row["patient"] in patients]
    result: Mapping[str, Any] = {
        "command": "python benchmarks/clicks.py",
        **about,
        "patients": len(folders),
        **asked,
        "target": TARGET,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        "seconds": round(sum(row["seconds"] for row in rows)),
        "milliseconds a click": speed(rows),
        **machine_facts(),
        "metrics": table(rows),
    }
    limited = WORK / f"clicks_{name}_first_{given.limit}.json"
    write_result(given.out or (limited if given.limit else RESULTS / "clicks.json"), result)
    for way, taken in result["milliseconds a click"].items():
        print(f"{way}: {taken['median']:.0f} ms a click (median), {taken['p90']:.0f} ms (90 %)")


if __name__ == "__main__":
    main()
