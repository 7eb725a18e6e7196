"""How well a model draws, locates, answers and reports on the OpenKBP validation patients, beside its blind twin.

    python benchmarks/tiny_accuracy.py --data PATH/openkbp --model NAME_OR_FOLDER [--limit N] [--tasks dice,iou,vqa]

One model a run. The blind twin is the same model with every voxel zero. Every answer is a line of
``runs/accuracy/NAME.jsonl``, written when it is given, so that a run that was stopped goes on; the table is made of
these lines (`scoring`) and holds every task that all patients have been asked. Masks are hard and on the scan's own
grid; what the model refuses to draw or to locate counts 0. The result is ``benchmarks/results/accuracy_NAME.json``; of
a run with ``--limit`` it stays beside the answers.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from safetensors import safe_open
from scoring import Mask, Row, mask_row, score
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.boxes import Box, box_of_mask, iou, to_norm
from data_prep.case import Case
from data_prep.derived import DERIVATION, derived_drafts
from data_prep.openkbp import cases, read_case
from data_prep.store import file_sha256
from m3d.bench.bootstrap import RESAMPLES, SEED
from m3d.bench.simulated import deepest_voxel
from m3d.inference.checkpoints import bundled, resolve
from m3d.recipes.checkpoints import MANIFEST, code_version, fingerprint, model_folder, versions
from m3d.tasks.base import Phrases
from m3d.tasks.codecs import Frac3
from m3d.tasks.vqa import write_choices

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "accuracy"
TASKS: Mapping[str, tuple[str, ...]] = {  # what can be asked for, and the tasks of its rows
    "dice": ("dice",),
    "prompts": ("click", "box", "name+click", "name+box"),
    "iou": ("iou",),
    "vqa": ("vqa.closed", "vqa.open"),
    "reg": ("reg",),
    "report": ("report",),
}
SIGHTS = ("seeing", "blind")
SHORT, LONG = 160, 768  # tokens: of an answer with what it rests on, and of a report
Key = tuple[str, str, str, str]


# -- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One thing to ask of a scan: ``answer`` gives the rest of its row."""

    task: str
    item: str
    answer: Callable[[m3d.Scan], dict[str, Any]]


def asks(case: Case) -> Iterator[Ask]:
    """All that a case is asked; a structure without a contour is not absent, so it is not asked for."""
    for name in case.present:
        yield Ask("dice", name, partial(draw, case, name, ""))
        for kind in TASKS["prompts"]:
            yield Ask(kind, name, partial(draw, case, name, kind))
        yield Ask("iou", name, partial(locate, case, name))
        yield Ask("reg", name, partial(name_box, case, name))
    yield from questions(case)


def questions(case: Case) -> Iterator[Ask]:
    """Every derived question of every family, closed and open, and the report; those of the case's own records."""
    number: dict[str, int] = defaultdict(int)
    drafts = derived_drafts(case, random.Random(f"0/openkbp/{case.id}"), kinds=("vqa", "report"))
    for draft in drafts:
        item = f"{draft.subtask}/{number[f'{draft.task}/{draft.subtask}']}"
        number[f"{draft.task}/{draft.subtask}"] += 1
        if draft.task == "report":
            yield Ask("report", "report", partial(reply, Phrases()("report", "prompt"), LONG, {"truth": draft.text}))
        elif draft.task == "vqa.open":
            truth = {"truth": draft.text, "value": draft.value, "unit": draft.unit}
            yield Ask("vqa.open", item, partial(reply, str(draft.slots["question"]), SHORT, truth))
        elif draft.options is not None:
            question = write_choices(str(draft.slots["question"]), draft.options)
            options = {"options": list(draft.options), "choice": draft.choice}
            yield Ask("vqa.closed", item, partial(reply, question, SHORT, options))


def draw(case: Case, name: str, kind: str, scan: m3d.Scan) -> dict[str, Any]:
    """Draw a structure by its name, by the click or box that its truth suggests, or by both."""
    truth = case.mask(name)
    points = [(deepest_voxel(truth, case.volume.spacing), 1)] if "click" in kind else None
    box = box_of_mask(truth) if "box" in kind else None
    by_name = ("click" not in kind and "box" not in kind) or "name" in kind
    guess: Mask | None = None
    try:
        masks = scan.segment(name if by_name else None, points=points, box=box).masks
        guess = next((mask.array for mask in masks if not by_name or mask.name.lower() == name.lower()), None)
    except m3d.NoMask:
        pass  # a refusal: counts 0
    return mask_row(guess, truth, case.volume.spacing)


def locate(case: Case, name: str, scan: m3d.Scan) -> dict[str, Any]:
    """True IoU of the first box that is given; none counts 0."""
    found = scan.locate(name)
    value = iou(found.boxes[0].voxel, box_of_mask(case.mask(name))) if found.boxes else 0.0
    return {"iou": value, "found": bool(found.boxes), "text": found.text}


def name_box(case: Case, name: str, scan: m3d.Scan) -> dict[str, Any]:
    """Ask what is in the box of a structure; even a blind reader may know it by the box's place."""
    prepared = scan.prepared
    box: Box = to_norm(prepared.box_to_grid(box_of_mask(case.mask(name))).clip(prepared.shape), prepared.shape)
    return reply(Phrases()("reg", "prompt", box=Frac3().encode(box)), SHORT, {}, scan)


def reply(prompt: str, limit: int, truth: Mapping[str, Any], scan: m3d.Scan) -> dict[str, Any]:
    """What is said to a prompt and what it rests on, beside what is true."""
    found = scan.ask(prompt, max_new_tokens=limit)
    measured = {"measured": [one.to_dict() for one in found.measured]} if found.measured else {}
    return {**truth, "prompt": prompt, "text": found.text, **measured}


# -- answers on disk ------------------------------------------------------------------------------------------------


def key_of(row: Row) -> Key:
    """What tells a row from the others."""
    return row["patient"], row["sight"], row["task"], row["item"]


class Answers:
    """Rows in a file, one a line, after a line that says whose they are; what a stop cut off is dropped.

    Raises:
        ValueError: The file holds the answers of another model, or to other questions.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.is_file() else b""
        kept = kept[: kept.rfind(b"\n") + 1]
        first, *lines = kept.splitlines() or [b""]
        if first and json.loads(first) != about:
            raise ValueError(f"{path} holds answers of another model or to other questions: move it away, or --name")
        self.rows: dict[Key, dict[str, Any]] = {key_of(row): row for row in map(json.loads, lines)}
        path.write_bytes(kept or json.dumps(about).encode() + b"\n")
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in memory and on disk."""
        self.rows[key_of(row)] = row
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def examine(load: Callable[[], m3d.M3D], case: Case, tasks: Sequence[str], answers: Answers) -> None:
    """Ask a case, seeing and blind, all that has not been answered yet."""
    wanted = [ask for ask in asks(case) if ask.task in tasks]
    if all((case.id, sight, ask.task, ask.item) in answers.rows for sight in SIGHTS for ask in wanted):
        return
    model, began = load(), time.monotonic()
    looked = model.look(case.volume)
    scans = {"seeing": looked, "blind": looked.blinded()}
    answers.add({**_named(case, "seeing", "look", "look"), "seconds": round(time.monotonic() - began, 3)})
    for sight, scan in scans.items():
        for ask in wanted:
            if (case.id, sight, ask.task, ask.item) not in answers.rows:
                began = time.monotonic()
                row = {**_named(case, sight, ask.task, ask.item), **ask.answer(scan)}
                answers.add({**row, "seconds": round(time.monotonic() - began, 3)})


def _named(case: Case, sight: str, task: str, item: str) -> dict[str, Any]:
    return {"patient": case.id, "sight": sight, "task": task, "item": item}


# -- the result -----------------------------------------------------------------------------------------------------


def answered(rows: Mapping[Key, Row], folders: Sequence[Path]) -> list[Row]:
    """The rows of these patients, of every task that all of them have been asked, and the looks."""
    wanted: dict[str, list[Key]] = defaultdict(list)
    for case in map(read_case, folders):
        for ask in asks(case):
            wanted[ask.task] += [(case.id, sight, ask.task, ask.item) for sight in SIGHTS]
    whole = {task: keys for task, keys in wanted.items() if all(key in rows for key in keys)}
    patients = {folder.name for folder in folders}
    looks = [row for row in rows.values() if row["task"] == "look" and row["patient"] in patients]
    return [rows[key] for keys in whole.values() for key in keys] + looks


def model_facts(name: str, folder: Path) -> dict[str, Any]:
    """Which model it is: fingerprint, size, and what its manifest says of its making."""
    manifest, sizes = folder / MANIFEST, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            sizes += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    facts = {"model": name, "fingerprint": fingerprint(folder), "parameters": sizes}
    return facts | {"manifest_sha256": file_sha256(manifest) if manifest.is_file() else None}


def machine_facts() -> dict[str, Any]:
    """Where it was measured, and with what."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu}
    return {"machine": machine | {"threads": torch.get_num_threads()}, "packages": versions(), "commit": code_version()}


def seconds_of(rows: Sequence[Row], patients: int) -> dict[str, Any]:
    """Seconds in all, and a patient by task; those of stopped runs are counted too."""
    spent: dict[str, float] = defaultdict(float)
    for row in rows:
        spent[row["task"]] += row["seconds"]
    each = {task: round(total / patients, 2) for task, total in spent.items()}
    return {"seconds": round(sum(spent.values())), "seconds a patient": each}


def folder_and_name(model: str, name: str | None) -> tuple[Path, str]:
    """The checkpoint folder that is meant, and what the result is called."""
    folder = resolve(model if model in bundled() else model_folder(model))
    return folder, name or (folder.resolve().parent.name if folder.name == "model" else folder.name)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--name", help="what the result is called; the folder's name if not given")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of %(default)s")
    parser.add_argument("--limit", type=int, help="only the first patients")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.tasks = [task for task in given.tasks.split(",") if task]
    if unknown := sorted(set(given.tasks) - set(TASKS)):
        parser.error(f"--tasks: {unknown[0]!r} is none of {', '.join(TASKS)}")
    return given


def main() -> None:
    """Ask, then score all that has been answered."""
    given = read_arguments()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, given.name)
    about = model_facts(name, folder)
    questions_of = {"fingerprint": about["fingerprint"], "questions": DERIVATION, "tokens": [SHORT, LONG]}
    answers = Answers(WORK / f"{name}.jsonl", questions_of)
    folders = cases(given.data, "validation")[: given.limit]
    load, tasks = cache(lambda: m3d.load(folder)), [task for kind in given.tasks for task in TASKS[kind]]
    for path in tqdm(folders, unit="patient"):
        examine(load, read_case(path), tasks, answers)
    rows = answered(answers.rows, folders)
    result = {
        "command": "python benchmarks/tiny_accuracy.py",
        **about,
        "patients": len(folders),
        "tasks": sorted({row["task"] for row in rows} - {"look"}),
        **questions_of,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        **seconds_of(rows, len(folders)),
        **machine_facts(),
        "metrics": score(rows),
    }
    limited = WORK / f"accuracy_{name}_first_{given.limit}.json"
    write_result(given.out or (limited if given.limit else RESULTS / f"accuracy_{name}.json"), result)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole, and print its table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{'metric':30} {'n':>5} {'value':>7} {'95 % CI':>17} {'blind':>7} {'gain':>7}")
    for metric, row in result["metrics"].items():
        numbers = [row.get(key) for key in ("value", "low", "high", "blind", "gain")]
        value, low, high, blind, gain = ("-" if one is None else f"{one:.3f}" for one in numbers)
        print(f"{metric:30} {row['n']:5d} {value:>7} {low:>8} {high:>8} {blind:>7} {gain:>7}")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
