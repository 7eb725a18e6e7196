"""Where each scan's own text stands among those of a pool, and each text's own scan: ranks, and what is made of them.

A rank is no affair of one answer: it is found among all of a pool, and then belongs to one record. So these metrics
carry their statistics with them, by record, and are made anew for every pool (`m3d.bench.retrieval`).
"""

# n = records of a pool, k = statistics of a metric, R = resamples

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from m3d.bench.metrics.base import Floats, ProtocolName, Sample, mean
from m3d.train.contrastive import partner_ranks

__all__ = [
    "PUBLISHED_WAYS",
    "WAYS",
    "WITHIN",
    "MeanOfPool",
    "MedianRank",
    "metric_named",
    "pool_metrics",
    "published_metrics",
    "ranks",
    "standard_metrics",
]

WITHIN = (1, 5, 10)
WAYS = ("image to text", "text to image")
PUBLISHED_WAYS = ("IR", "TR")  # rows and columns of S = I T^t, that is, image queries and text queries
STANDARD = "rank of the own partner among {n}, from 1; ties, and so identical texts, count against the model"
PUBLISHED = "released eval_itr: topk of S = I T^t, {way}, among {n}; ties as topk breaks them"
_NAME = re.compile(r"(R@\d+|MRR|median rank) (image to text|text to image|IR|TR), pool .+")


@dataclass(kw_only=True, eq=False)
class MeanOfPool:
    """A mean over a pool's records; ``rows`` (n, 1) are those of ``ids``, and of no other record is anything known.

    ``chance`` is what a model scores that ranks at random.
    """

    name: str
    variant: str = ""
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)
    chance: float | None = None
    ids: tuple[str, ...] = ()
    rows: Floats

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The rows of records of the pool, and NaN for others: ``(n, k)``."""
        place = {record: number for number, record in enumerate(self.ids)}
        none = np.full(self.rows.shape[1], np.nan)
        found = [self.rows[place[one.record.id]] if one.record.id in place else none for one in samples]
        return np.array(found).reshape(len(samples), self.rows.shape[1])

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean."""
        return mean(sums, counts)


class MedianRank(MeanOfPool):
    """The median rank; ``rows`` (n, n) say which rank a record has, so that their sum is the histogram of ranks."""

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """Of each histogram, the mean of the two ranks in the middle."""
        reached = sums.cumsum(axis=1)
        total = np.rint(counts)[:, None]
        low, high = ((reached > place).argmax(axis=1) for place in ((total - 1) // 2, total // 2))
        return np.where(counts > 0, (low + high) / 2 + 1, np.nan)


def ranks(similarity: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks of both directions from a matrix whose row i and column i belong together: ``(n, n) -> (n,), (n,)``.

    The first are those of rows (images that look for texts). What could not be embedded is ``-inf`` there: it ranks
    last for itself, and stands in nobody's way.
    """
    matrix = torch.from_numpy(np.ascontiguousarray(similarity))
    return partner_ranks(matrix).numpy(), partner_ranks(matrix.T).numpy()


def standard_metrics(similarity: npt.NDArray[np.floating], ids: Sequence[str], pool: str) -> list[MeanOfPool]:
    """R@k, MRR and median rank in both directions over a pool: ``(n, n)``, rows are images."""
    n, known = len(ids), tuple(ids)
    variant = STANDARD.format(n=n)
    metrics: list[MeanOfPool] = []
    for way, found in zip(WAYS, ranks(similarity), strict=True):
        for k in WITHIN:
            rows, chance = (found <= k).astype(np.float64)[:, None], min(1.0, k / n)
            name = f"R@{k} {way}, pool {pool}"
            metrics.append(MeanOfPool(name=name, variant=variant, chance=chance, ids=known, rows=rows))
        harmonic = math.fsum(1 / rank for rank in range(1, n + 1)) / n
        name, worst = f"MRR {way}, pool {pool}", (1 / n,)
        rows = 1 / found[:, None]
        metrics.append(MeanOfPool(name=name, variant=variant, worst=worst, chance=harmonic, ids=known, rows=rows))
        name, last = f"median rank {way}, pool {pool}", (0.0,) * (n - 1) + (1.0,)
        metrics.append(
            MedianRank(
                name=name, variant=variant, better="lower", worst=last, chance=(n + 1) / 2, ids=known,
                rows=np.eye(n)[found - 1],
            )
        )  # fmt: skip
    return metrics


def published_metrics(similarity: npt.NDArray[np.floating], ids: Sequence[str], pool: str) -> list[MeanOfPool]:
    """R@k of ``eval_itr``: IR are rows of ``(n, n)``, images that look for texts, and TR its columns.

    A pool of fewer than k, for which the released code ends with an error, has no R@k. What could not be embedded
    (``-inf``) counts as not found.
    """
    n, matrix = len(ids), torch.from_numpy(np.ascontiguousarray(similarity))
    lost = np.isneginf(np.diagonal(similarity))
    metrics = []
    for way, of, rows in zip(PUBLISHED_WAYS, ("rows", "columns"), (matrix, matrix.T), strict=True):
        for k in (k for k in WITHIN if k <= n):
            hits = (rows.topk(k, dim=1).indices == torch.arange(n)[:, None]).any(dim=1).numpy() & ~lost
            metrics.append(
                MeanOfPool(
                    name=f"R@{k} {way}, pool {pool}", variant=PUBLISHED.format(way=of, n=n), chance=k / n,
                    ids=tuple(ids), rows=hits.astype(np.float64)[:, None],
                )
            )  # fmt: skip
    return metrics


METRICS = {"standard": standard_metrics, "m3d": published_metrics}


def pool_metrics(
    protocol: ProtocolName, similarity: npt.NDArray[np.floating], ids: Sequence[str], pool: str
) -> list[MeanOfPool]:
    """The metrics of a pool by protocol."""
    if protocol not in METRICS:
        raise ValueError(f"protocol={protocol!r} is not known; use {' or '.join(METRICS)}")
    return METRICS[protocol](similarity, ids, pool)


def metric_named(name: str) -> MeanOfPool:
    """The metric of a name in ``metrics.json``, without its rows: to add up and reduce those of ``samples.jsonl``.

    Raises:
        KeyError: It is none of retrieval's.
    """
    known = _NAME.fullmatch(name)
    if known is None:
        raise KeyError(f"{name!r} is no retrieval metric; they are named like 'R@5 {WAYS[0]}, pool 100'")
    if known[1] == "median rank":
        return MedianRank(name=name, better="lower", worst=None, rows=np.zeros((0, 1)))
    return MeanOfPool(name=name, rows=np.zeros((0, 1)))
