"""Answers a second of M3D-Bench, beside the released way of asking: one question at a time, the scan encoded for each.

    python benchmarks/bench_speed.py STORE [--scans 2] [--questions 32] [--rounds 3]

Two ways, in turn within each round, on the same questions of the same scans. ``apart``: as the released scripts ask,
batch 1, the image encoded anew for every question. ``together``: as ``m3d bench run`` asks, the image looked at
once, its place in the language model kept, questions in batches, answers and masks written to disk. Both answer
with what they measure first, and draw. Writes ``benchmarks/results/bench_speed.json``.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from tiny_accuracy import RESULTS, machine_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from m3d.bench.cases import BenchCase, find_cases
from m3d.bench.config import BenchConfig, TaskConfig
from m3d.bench.predictions import gather
from m3d.bench.run import ask_cases
from m3d.inference.scan import Scan
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3

KINDS = ("vqa.closed", "vqa.open", "rec.box3d", "reg", "seg.sem")
TOKENS = 160


def apart(model: m3d.M3D, cases: Sequence[BenchCase]) -> list[str]:
    """Every question with its scan, encoded for it."""
    said = []
    for case in cases:
        prepared = case.open().prepared(model.processor.preprocess)
        for record in case.records:
            scan = Scan.of_prepared(model.id, model.model, model.processor, prepared)
            prompt = render(TASKS, record, codec=Frac3()).prompt
            said.append(scan.ask(prompt, max_new_tokens=TOKENS).text)
    return said


def together(model: m3d.M3D, cases: Sequence[BenchCase], config: BenchConfig) -> list[str]:
    """As the benchmark asks, in the order of the records."""
    with tempfile.TemporaryDirectory() as folder:
        ask_cases(model, cases, config, Path(folder), progress=lambda some: some)
        found = gather(Path(folder))
    return [found[record.id, "seeing"].text for case in cases for record in case.records]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--model", default="m3d-tiny")
    parser.add_argument("--scans", type=int, default=2)
    parser.add_argument("--questions", type=int, default=32, help="of each scan, or as many as there are")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.store is None:
        print("give a store of `m3d data prepare`; nothing measured")
        return
    torch.set_flush_denormal(True)
    model = m3d.load(given.model)
    config = BenchConfig(
        tasks={task: TaskConfig(max_new_tokens=TOKENS) for task in KINDS},
        split=given.split,
        blind=None,
        likelihoods=False,
        batch=given.batch,
        most_scans=given.scans,
    )
    cases = [
        BenchCase(case.stored, case.records[:: max(1, len(case.records) // given.questions)][: given.questions])
        for case in find_cases(config, given.store, model.processor.preprocess)
    ]
    asked = sum(len(case.records) for case in cases)
    rates: dict[str, list[float]] = {"apart": [], "together": []}
    alike = 0
    for _ in tqdm(range(given.rounds), unit="round"):
        began = time.perf_counter()
        one = apart(model, cases)
        between = time.perf_counter()
        other = together(model, cases, config)
        rates["apart"].append(asked / (between - began))
        rates["together"].append(asked / (time.perf_counter() - between))
        alike = sum(a == b for a, b in zip(one, other, strict=True))
    ratios = [fast / slow for fast, slow in zip(rates["together"], rates["apart"], strict=True)]
    result = {
        "command": f"python benchmarks/bench_speed.py STORE --scans {given.scans} --questions {given.questions}",
        "model": model.id,
        "scans": len(cases),
        "answers": asked,
        "batch": given.batch,
        "rounds": given.rounds,
        **machine_facts(),
        "answers a second": {way: [round(rate, 3) for rate in some] for way, some in rates.items()},
        "together / apart": {"median": statistics.median(ratios), "rounds": [round(ratio, 3) for ratio in ratios]},
        "answers alike": alike,
    }
    with atomic_path(RESULTS / "bench_speed.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for way, some in rates.items():
        print(f"{way:9} {statistics.median(some):7.2f} answers a second")
    print(f"together / apart: {statistics.median(ratios):.2f}; {alike} of {asked} answers are the same")


if __name__ == "__main__":
    main()
