"""Where answers that measure first go wrong: in reading values, or in the masks that the values were measured on.

    python benchmarks/evidence.py --model NAME_OR_FOLDER STORE [--split validation] [--answers runs/accuracy/NAME.jsonl]

``reading``: closed questions whose evidence is given with its true values, and with "not seen" in their place; what the
model goes on to answer counts. ``measuring``: what was measured on the model's own masks, beside the truth, from the
answers that `tiny_accuracy` keeps: the median ratio by measure and structure. Writes
``benchmarks/results/evidence_NAME.json``.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from tiny_accuracy import RESULTS, WORK, folder_and_name, machine_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.derived.measures import MEASURES
from m3d.recipes.checkpoints import fingerprint
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3
from m3d.tasks.evidence import ANSWER, lettered, measure_first
from m3d.tasks.vqa import ClosedVQA
from m3d.train.cases import TrainingCase, stored

MOST_TOKENS = 48


@torch.inference_mode()
def read(model: m3d.M3D, case: TrainingCase) -> list[tuple[str, bool, bool]]:
    """Family, and whether the right option is chosen: with the true values, and where nothing is seen."""
    network, processor = model.model, model.processor
    features = {"image": network.get_image_features(case.tensors()[0][None, None].to(network.device))}
    found = []
    for record in case.records_at(range(len(case.entries))):
        options, evidence = record.target.options, record.target.evidence
        if record.task != "vqa.closed" or not evidence or options is None:
            continue
        said, right = render(TASKS, record, codec=Frac3()), []
        for seen in (True, False):
            first = measure_first(said, evidence, seen=seen)
            begun = f"{processor.write(said.prompt)} {first.answer[: first.given[-1][1]]}"
            ids = processor.tokenizer(begun, return_tensors="pt")["input_ids"].to(network.device)
            told = network.generate(
                input_ids=ids, mm_encoder_outputs=features, max_new_tokens=MOST_TOKENS, do_sample=False
            )
            before, _, answer = processor.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True).partition(
                ANSWER
            )
            answer = lettered(answer.strip(), before.strip().removesuffix("."), said.prompt)
            right.append(ClosedVQA().parse(answer, Frac3(), options=options) == record.target.choice)
        found.append((record.subtask or "", *right))
    return found


def by_family(rows: Iterable[tuple[str, bool, bool]]) -> dict[str, dict[str, float]]:
    """Shares of right letters, by family and in all."""
    groups: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for family, seen, unseen in rows:
        groups[family].append((seen, unseen))
    groups = {**dict(sorted(groups.items())), "mean": [pair for pairs in groups.values() for pair in pairs]}
    return {
        family: {
            "n": len(pairs),
            "true values": statistics.fmean(seen for seen, _ in pairs),
            "not seen": statistics.fmean(unseen for _, unseen in pairs),
        }
        for family, pairs in groups.items()
    }


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Measured by true value of open answers that rest on one measure: the median, by measure and structures."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        measured = row.get("measured") or ()
        if row["task"] != "vqa.open" or row["sight"] != "seeing" or len(measured) != 1 or not row.get("value"):
            continue
        (one,) = measured
        if one["value"] is not None:
            compares = MEASURES[one["measure"]].compares  # which has a sign, where a question with a number has none
            value = abs(one["value"]) if compares else one["value"]
            found[f"{one['measure']}: {', '.join(one['names'])}"].append(value / row["value"])
    return {name: {"n": len(some), "median ratio": statistics.median(some)} for name, some in sorted(found.items())}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--answers", type=Path, help="those of tiny_accuracy (runs/accuracy/NAME.jsonl)")
    given = parser.parse_args()
    if given.store is None:
        print("give a store of `m3d data prepare` whose records have evidence; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, None)
    model = m3d.load(folder)
    cases = stored(given.store, given.split, preprocess=model.processor.preprocess)
    reading = by_family(row for case in tqdm(cases, unit="scan") for row in read(model, case))
    path = given.answers or WORK / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    result = {
        "command": "python benchmarks/evidence.py",
        "model": name,
        "fingerprint": fingerprint(folder),
        "scans": len(cases),
        **machine_facts(),
        "reading": reading,
        "measuring": ratios(map(json.loads, lines)),
    }
    with atomic_path(RESULTS / f"evidence_{name}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for family, row in reading.items():
        print(f"{family:12} {row['n']:4}  {row['true values']:.2f} with true values, {row['not seen']:.2f} without")
    for measure, row in result["measuring"].items():
        print(f"{measure:50} {row['n']:4}  {row['median ratio']:.2f} of the truth")


if __name__ == "__main__":
    main()
