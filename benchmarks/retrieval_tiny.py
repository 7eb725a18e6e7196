"""How well an M3D-CLIP finds each scan's text among others', and each text's scan, beside chance.

    python benchmarks/retrieval_tiny.py --clip runs/tiny/clip/model STORE [STORE ...] [--among train]

Every data set of every store is a pool of its own: in a mixed one, telling patients from phantoms would pass for
finding a scan. Of n scans, chance finds 5/n within five, and no model can do better than n/5 times that: read R@5
beside both. Where a split is small, ``--among`` looks for its scans among those of another split as well, which are
candidates and are not asked for (those of the training split have been learned from, as have their texts). Ties count
against the model. Intervals are of 95 %, from a bootstrap over scans. Writes
``benchmarks/results/retrieval_tiny.json`` and prints the table.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.atomic import atomic_path
from m3d.bench.bootstrap import RESAMPLES, SEED, estimate, summed
from m3d.bench.metrics.retrieval import WITHIN, MeanOfPool, ranks, standard_metrics
from m3d.models.clip import Pair, load_pair
from m3d.recipes.checkpoints import fingerprint, model_folder
from m3d.recipes.pretrain_clip import embed
from m3d.train.cases import TrainingCase, stored
from m3d.train.pairs import PairCollator, paired
from m3d.train.spread import Moments

RESULT = Path(__file__).parent / "results" / "retrieval_tiny.json"
WAYS = {"volume_to_text": "image to text", "text_to_volume": "text to image"}


def measured(metric: MeanOfPool, asked: int) -> dict[str, float | None]:
    """A mean over the first scans with its interval, chance, and how many times chance it is."""
    scans = [f"{number:09d}" for number in range(asked)]
    found = estimate(metric, summed(metric.rows[:asked], scans))
    assert found.value is not None and metric.chance is not None
    times = {"chance": metric.chance, "times_chance": found.value / metric.chance}
    return {"value": found.value, "low": found.low, "high": found.high, **times}


def scores(similarity: Tensor, asked: int | None = None) -> dict[str, Any]:
    """R@k, MRR and ranks of both directions; text i is volume i's: ``(n, n)``, rows are volumes.

    The first ``asked`` are looked for among all n.
    """
    n = len(similarity)
    asked = n if asked is None else asked
    matrix = similarity.numpy()
    metrics = {one.name: one for one in standard_metrics(matrix, [str(number) for number in range(n)], "all")}
    found: dict[str, Any] = {"n": asked, "candidates": n}
    for (way, words), places in zip(WAYS.items(), ranks(matrix), strict=True):
        names = [*(f"R@{k}" for k in WITHIN), "MRR"]
        found[way] = {name: measured(metrics[f"{name} {words}, pool all"], asked) for name in names}
        own = torch.from_numpy(places[:asked]).double()
        found[way] |= {"mean_rank": own.mean().item(), "median_rank": own.quantile(0.5).item()}
    return found


def pools_of(stores: Sequence[Path], split: str, task: str, pair: Pair) -> dict[str, list[TrainingCase]]:
    """The scans with a text, by store and data set; a store of one data set has its own name.

    Raises:
        ValueError: Two stores have one name, or a pool has a single scan, which anyone finds.
    """
    pools: dict[str, list[TrainingCase]] = {}
    for root in stores:
        by_dataset: dict[str, list[TrainingCase]] = defaultdict(list)
        for case in paired(stored(root, split, preprocess=pair.preprocess), (task,), str(root)):
            by_dataset[case.image.dataset].append(case)
        for dataset, cases in by_dataset.items():
            name = root.name if len(by_dataset) == 1 else f"{root.name}/{dataset}"
            if name in pools:
                raise ValueError(f"two stores are called {name}: rename one, the result could not tell them apart")
            if len(cases) < 2:
                raise ValueError(f"{root}: one scan of {dataset} in split {split}; anyone finds it")
            pools[name] = cases
    return pools


Seen = tuple[Tensor, Tensor, Moments]


def examine(own: Seen, *others: Seen) -> dict[str, Any]:
    """Both directions over a pool, and the ``others`` among which it is searched; see `embed`."""
    volumes, texts, moments = zip(own, *others, strict=True)
    similarity = torch.cat(volumes) @ torch.cat(texts).T
    return {**scores(similarity, len(own[0])), "token_spread": Moments.of(moments).spread()}


def table(pools: Mapping[str, Mapping[str, Any]]) -> str:
    """The pools as Markdown."""
    names = [*(f"R@{k}" for k in WITHIN), "MRR"]
    lines = [
        f"| pool | n | direction | {' | '.join(names)} | R@5 / chance | median rank |",
        "|---" * (len(names) + 5) + "|",
    ]
    for pool, found in pools.items():
        for way in WAYS:
            row = found[way]
            cells = [f"{row[name]['value']:.2f} ({row[name]['low']:.2f} to {row[name]['high']:.2f})" for name in names]
            times = f"{row['R@5']['times_chance']:.1f} (at most {1 / row['R@5']['chance']:.1f})"
            told = f"| {pool} | {found['n']} of {found['candidates']} | {way.replace('_', ' ')} | {' | '.join(cells)} "
            lines.append(f"{told}| {times} | {row['median_rank']:g} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stores", type=Path, nargs="*", help="each a pool: OpenKBP, phantoms that were not learned from"
    )
    parser.add_argument("--clip", type=Path, help="a folder of pretrain_clip")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--among", help="a split whose scans are candidates too, in pools of their own")
    parser.add_argument("--task", default="retrieval")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.clip is None or not given.stores:
        print("give --clip FOLDER and the stores to search in; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder = model_folder(given.clip)
    pair = load_pair(folder)
    collate = PairCollator(pair.tokenizer)
    pools = pools_of(given.stores, given.split, given.task, pair)
    more = pools_of(given.stores, given.among, given.task, pair) if given.among is not None else {}
    found: dict[str, Any] = {}
    for name, cases in tqdm(pools.items(), unit="pool"):
        own, *others = (embed(pair.model, collate, some, given.task) for some in (cases, more.get(name)) if some)
        found[name] = examine(own)
        if others:
            found[f"{name} among {given.among}"] = examine(own, *others)
    result = {
        "command": "python benchmarks/retrieval_tiny.py",
        "model": fingerprint(folder),
        "split": given.split,
        "task": given.task,
        "bootstrap": {"over": "scans", "resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        "pools": found,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(given.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
