"""How well an M3D-CLIP finds each scan's text among others', and each text's scan, beside chance.

    python benchmarks/retrieval_tiny.py CLIP_FOLDER STORE [STORE ...] [--split validation] [--task retrieval]

Every store is a pool of its own: in a mixed one, telling patients from phantoms would pass for finding a scan. Of n
scans, chance finds 5/n within five, and no model can do better than n/5 times that: read R@5 beside both. Intervals are
of 95 %, from a bootstrap over scans. Writes ``benchmarks/results/retrieval_tiny.json`` and prints the table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.atomic import atomic_path
from m3d.models.clip import load_pair
from m3d.recipes.checkpoints import fingerprint, model_folder
from m3d.recipes.pretrain_clip import embed
from m3d.train.cases import stored
from m3d.train.contrastive import partner_ranks
from m3d.train.pairs import PairCollator, paired

RESULT = Path(__file__).parent / "results" / "retrieval_tiny.json"
DRAWS = 2000


def recall(ranks: np.ndarray, k: int) -> dict[str, float]:
    """R@k with its interval, and as a multiple of chance."""
    hits, n = ranks <= k, len(ranks)
    drawn = np.random.default_rng(0).choice(hits, (DRAWS, n)).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    chance = min(1.0, k / n)
    return {
        "value": float(hits.mean()),
        "low": float(low),
        "high": float(high),
        "chance": chance,
        "times_chance": float(hits.mean() / chance),
    }


def examine(folder: Path, root: Path, split: str, task: str) -> dict[str, Any]:
    """Both directions over one store's split."""
    pair = load_pair(folder)
    cases = paired(stored(root, split, preprocess=pair.preprocess), (task,), str(root))
    volumes, texts, spread = embed(pair.model, PairCollator(pair.tokenizer), cases, task)
    similarity = volumes @ texts.T
    found: dict[str, Any] = {"n": len(cases), "token_spread": spread}
    for name, rows in (("volume_to_text", similarity), ("text_to_volume", similarity.T)):
        ranks = partner_ranks(rows).numpy()
        found[name] = {f"R@{k}": recall(ranks, k) for k in (1, 5, 10)}
        found[name] |= {"mean_rank": float(ranks.mean()), "median_rank": float(np.median(ranks))}
    return found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--task", default="retrieval")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    folder = model_folder(given.folder)
    pools = {root.name: examine(folder, root, given.split, given.task) for root in given.stores}
    facts = {"model": fingerprint(folder), "split": given.split, "task": given.task, "bootstrap": DRAWS, "pools": pools}
    with atomic_path(given.out) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("| pool | n | direction | R@1 | R@5 (95 % CI) | times chance | median rank |\n|---|---|---|---|---|---|---|")
    for name, pool in pools.items():
        for way in ("volume_to_text", "text_to_volume"):
            row = pool[way]
            five = row["R@5"]
            print(
                f"| {name} | {pool['n']} | {way.replace('_', ' ')} | {row['R@1']['value']:.2f} | {five['value']:.2f} "
                f"({five['low']:.2f}-{five['high']:.2f}) | {five['times_chance']:.1f} | {row['median_rank']:g} |"
            )


if __name__ == "__main__":
    main()
