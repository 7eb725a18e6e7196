"""Masks by prompts of every kind on the OpenKBP validation patients, as M3D-Bench asks for them.

    python benchmarks/prompt_kinds.py STORE --scans PATH/openkbp [--model NAME_OR_FOLDER] [--limit N]

``m3d bench run configs/bench/prompts.yaml``, then ``m3d bench score``, judged on the scans' own grid; a run that was
stopped goes on. STORE is that of ``m3d data prepare configs/data/openkbp.yaml``. The answers stay in
``runs/prompt_kinds/``; the result is ``benchmarks/results/bench_prompts_NAME.json``, of a run with ``--limit``
``bench_prompts_few_NAME.json``.
"""

import argparse
import json
from pathlib import Path

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
from tiny_accuracy import folder_and_name, machine_facts

from data_prep.atomic import atomic_path
from m3d.cli.main import main as command
from m3d.recipes.checkpoints import fingerprint

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "prompt_kinds"
CONFIG = "configs/bench/prompts.yaml"


def main() -> None:
    """Ask, score, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--scans", type=Path, help="the folder of OpenKBP itself")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--name", help="what the result is called; the folder's name if not given")
    parser.add_argument("--limit", type=int, help="only the first patients")
    parser.add_argument("--workers", default="1", help="processes that judge masks")
    given = parser.parse_args()
    if given.store is None or given.scans is None:
        print("give a store of `m3d data prepare` and --scans PATH/openkbp; nothing measured")
        return
    folder, name = folder_and_name(given.model, given.name)
    out = WORK / f"{name}-{fingerprint(folder)[:8]}{f'-first-{given.limit}' if given.limit else ''}"
    scans = json.dumps({"kind": "openkbp", "root": str(given.scans.absolute())})
    words = ["--model", str(folder), "--data", str(given.store), "--out", str(out), f"scans={scans}"]
    words += [f"most_scans={given.limit}"] if given.limit else []
    for step in (["run", CONFIG, *words], ["score", str(out), "--workers", given.workers]):
        if code := command(["bench", *step]):
            raise SystemExit(code)
    limit = f" --limit {given.limit}" if given.limit else ""
    result = {
        "command": f"python benchmarks/prompt_kinds.py STORE --scans PATH/openkbp{limit}",
        **json.loads((out / "metrics.json").read_text(encoding="utf-8")),
        **machine_facts(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / f"bench_prompts_{'few_' if given.limit else ''}{name}.json"
    with atomic_path(kept) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(f"kept in {kept}")


if __name__ == "__main__":
    main()
