"""Several structures of a scan by name: does a model draw them better in one answer, or each in one of its own?

    python benchmarks/several_names.py --data PATH/openkbp --model NAME_OR_FOLDER [--patients 3]

The first OpenKBP validation patients are asked for all structures that they have contours of, in both ways; ``each`` is
`Scan.segment` with a list of names. Hard Dice on the scan's own grid; what is not drawn counts 0. Writes
``benchmarks/results/several_names_NAME.json``.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from scoring import Mask
from tiny_accuracy import HOME, RESULTS, folder_and_name, machine_facts, model_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.inference.results import write_json
from m3d.tasks.base import Phrases


def each(scan: m3d.Scan, names: tuple[str, ...]) -> dict[str, Mask]:
    """In answers of their own."""
    return {mask.name: mask.array for mask in scan.segment(names).masks}


def together(scan: m3d.Scan, names: tuple[str, ...]) -> dict[str, Mask]:
    """In one answer, asked for as a training record asks; of masks with one name the first counts."""
    say = Phrases()
    asked = scan.ask(say("seg.sem", "prompt", names=say.join([say.named(name) for name in names])))
    drawn: dict[str, Mask] = {}
    for mask in asked.masks[asked.num_measured :]:
        drawn.setdefault(mask.name.lower(), mask.array)
    return drawn


WAYS: Mapping[str, Callable[[m3d.Scan, tuple[str, ...]], dict[str, Mask]]] = {"each": each, "together": together}


def examine(scan: m3d.Scan, case: Case) -> dict[str, dict[str, Any]]:
    """By way: Dice of each structure, and the seconds that all of them took."""
    names, found = tuple(case.present), {}
    d, h, w = case.volume.spacing
    for way, ask in WAYS.items():
        began = time.monotonic()
        drawn = ask(scan, names)
        seconds = time.monotonic() - began
        pairs = {name: MaskPair("", drawn[name], case.mask(name), (d, h, w)) for name in names if name in drawn}
        dice = {name: Dice().value(pairs[name]) if name in pairs else 0.0 for name in names}
        found[way] = {"dice": dice, "not drawn": [name for name in names if name not in drawn], "seconds": seconds}
    return found


def summary(rows: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """By way: the mean over structures of their mean Dice, structures by themselves, and seconds a patient."""
    found = {}
    for way in WAYS:
        values = defaultdict(list)
        for row in rows:
            for name, dice in row[way]["dice"].items():
                values[name].append(dice)
        means = {name: round(statistics.fmean(some), 4) for name, some in sorted(values.items())}
        found[way] = {
            "mean": round(statistics.fmean(means.values()), 4),
            "structures": means,
            "n": sum(map(len, values.values())),
            "not drawn": sum(len(row[way]["not drawn"]) for row in rows),
            "seconds a patient": round(statistics.fmean(row[way]["seconds"] for row in rows), 2),
        }
    return found


def main() -> None:
    """Ask, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--name", help="what the result is called; the folder's name if not given")
    parser.add_argument("--patients", type=int, default=3)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, given.name)
    model, rows = m3d.load(folder), []
    for path in tqdm(cases(given.data, "validation")[: given.patients], unit="patient"):
        case = read_case(path)
        rows.append(examine(model.look(case.volume), case))
    result = {
        "command": f"python benchmarks/several_names.py --patients {given.patients}",
        **model_facts(name, folder),
        "patients": len(rows),
        **machine_facts(),
        "metrics": summary(rows),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_path(RESULTS / f"several_names_{name}.json") as temporary:
        write_json(temporary, result)
    for way, found in result["metrics"].items():
        print(
            f"{way:10} mean Dice {found['mean']:.3f}, {found['seconds a patient']:.1f} s a patient", found["structures"]
        )


if __name__ == "__main__":
    main()
