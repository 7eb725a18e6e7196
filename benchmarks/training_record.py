"""What it took to train a model, stage by stage: steps, wall time, learning curves, from what the stages wrote.

    python benchmarks/training_record.py configs/tiny/chain.yaml root=PATH

It reads the manifests, ``losses.jsonl`` and ``evaluations.jsonl`` of the chain's outputs and trains nothing. Losses are
means over twentieths of a stage; wall time is that of all steps, what else the machine did meanwhile included. Writes
``benchmarks/results/training_NAME.json``, NAME being that of the merged model, and ``docs/learning_NAME.png``; a CLIP
stage, which stands beside that model, has ``training_clip.json``. A stage whose output is no longer there keeps its row
of that file, with the commit that trained it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import matplotlib as mpl
from tiny_accuracy import HOME, RESULTS, machine_facts

from data_prep.atomic import atomic_path
from m3d.config import load_config
from m3d.recipes.chain import Config, load
from m3d.recipes.checkpoints import read_manifest

POINTS = 20
UNWATCHED = ("step", "epoch", "seconds", "memory_gib", "lr", "grad_norm")


def rows_of(path: Path) -> list[dict[str, float]]:
    """The lines of a log, none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def curve(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means of the losses over twentieths of a stage, at the step where each ends."""
    names = dict.fromkeys(name for row in rows for name in row)
    watched = [name for name in names if "/" not in name and name not in UNWATCHED]
    points = []
    for number in range(POINTS):
        some = rows[number * len(rows) // POINTS : (number + 1) * len(rows) // POINTS]
        if some:
            means = {name: [row[name] for row in some if name in row] for name in watched}
            point = {name: round(sum(values) / len(values), 4) for name, values in means.items() if values}
            points.append({"step": some[-1]["step"], **point})
    return points


def stage_of(name: str, link: Any) -> dict[str, Any]:
    """What a trained stage's output says.

    Raises:
        FileNotFoundError: It is not done.
    """
    output = Path(link.output)
    manifest = read_manifest(output)
    if manifest is None or not manifest.get("final"):
        raise FileNotFoundError(f"{output}: this stage is not done; run the chain first")
    losses, judged = rows_of(output / "losses.jsonl"), rows_of(output / "evaluations.jsonl")
    found = {"name": output.name, "stage": name, "commit": manifest["commit"], "steps": len(losses)}
    found |= {"batch": link.optim.batch, "bf16": link.optim.bf16, "wall_seconds": manifest["wall_seconds"]}
    evaluations = [
        {key.removeprefix("eval_"): round(value, 4) for key, value in row.items() if key != "epoch"} for row in judged
    ]
    return found | {"curve": curve(losses), "evaluations": evaluations}


def stages_of(links: Sequence[tuple[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A row for every trained stage; that of an ``earlier`` record where its output is gone.

    Raises:
        FileNotFoundError: A stage is not done and has no row.
    """
    kept = {row["name"]: row for row in earlier}
    rows = []
    for name, link in links:
        output = Path(link.output)
        gone = not output.is_dir() and output.name in kept
        rows.append(kept[output.name] if gone else stage_of(name, link))
    return rows


def picture(stages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses of every stage: lines for training, points for the patients and phantoms that it did not learn from."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3.2), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages, strict=True):
        for number, name in enumerate(key for key in stage["curve"][0] if key not in ("step", "loss")):
            colour = f"C{number}"
            seen = [(point["step"], point[name]) for point in stage["curve"] if name in point]
            judged = [(point["step"], point[name]) for point in stage["evaluations"] if name in point]
            axis.plot(*zip(*seen, strict=True), color=colour, label=name)
            if judged:
                axis.plot(*zip(*judged, strict=True), "o", color=colour)
        axis.set(title=stage["name"], xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="the chain's config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as the chain was given, such as root=PATH")
    given = parser.parse_args()
    links = list(load(load_config(Config, given.chain, given.overrides)))
    merged = next(Path(link.output).name for name, link in links if name == "merge")
    path = RESULTS / f"training_{merged}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else []
    trained = [(name, link) for name, link in links if name not in ("merge", "take_words", "pretrain_clip")]
    stages = stages_of(trained, earlier)
    chain = Path(given.chain)
    shown = chain.absolute().relative_to(HOME) if chain.absolute().is_relative_to(HOME) else chain.name
    result = {"model": merged, "command": f"m3d train {shown} root=PATH", **machine_facts(), "stages": stages}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    picture(stages, HOME / "docs" / f"learning_{merged}.png")
    for link in (link for name, link in links if name == "pretrain_clip" and Path(link.output).is_dir()):
        beside = json.dumps(stage_of("pretrain_clip", link), indent=1, allow_nan=False)
        with atomic_path(RESULTS / "training_clip.json") as temporary:
            temporary.write_text(f"{beside}\n", encoding="utf-8")
    for stage in stages:
        print(f"{stage['name']:16} {stage['steps']:5} steps  {stage['wall_seconds'] / 60:6.1f} min")


if __name__ == "__main__":
    main()
