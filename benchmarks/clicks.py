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
from scoring import FIVE, Mask, Row, Values, measured
from tiny_accuracy import Answers, folder_and_name, machine_facts, model_facts, write_result
from tqdm import tqdm

from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.bench.bootstrap import RESAMPLES, SEED
from m3d.bench.kinds import MOST_CLICKS
from m3d.bench.metrics.masks import SHOWN, TARGET
from m3d.bench.simulated import click_on
from m3d.inference.session import SessionObject

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "clicks"
WAYS = {"clicks": (False, True), "no feedback": (False, False), "name": (True, True)}  # asked by name, feedback
SIGHTS = ("seeing", "blind")
PROTOCOL = "middle of the largest error/1"

# -- the user -------------------------------------------------------------------------------------------------------


def click(target: SessionObject, truth: Mask, spacing: tuple[float, ...], *, name: str | None) -> dict[str, Any]:
    """Dice before the first click and after each, and what each took; of a mask that is right it stays."""
    if name is not None:
        try:
            target.add_name(name)
        except m3d.NoMask:
            pass  # a refusal: the clicks begin from nothing
    found = click_on(target, truth, spacing)
    clicks = [list(at) for at in found.clicks]
    return {"dice": list(found.dice), "milliseconds": list(found.milliseconds), "clicks": clicks}


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
        row = click(target, case.mask(name), case.volume.spacing, name=name if named else None)
        about = {"patient": case.id, "sight": sight, "task": way, "item": name}
        answers.add({**about, **row, "seconds": round(time.monotonic() - began, 3)})


# -- the table ------------------------------------------------------------------------------------------------------


def values_of(row: Row) -> dict[str, float]:
    """What a row says, ``way: measure`` -> value; a target that is never reached counts as the most clicks."""
    needed, first = clicks_needed(row["dice"]), (0,) if row["task"] == "name" else ()
    found = {f"dice@{number}": row["dice"][number] for number in (*first, *SHOWN)}
    found |= {"noc80": float(MOST_CLICKS if needed is None else needed), "never80": float(needed is None)}
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
    asked = {"fingerprint": about["fingerprint"], "protocol": PROTOCOL, "ways": list(WAYS), "most": MOST_CLICKS}
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
