"""Image-text retrieval: which of a pool's texts is this scan's, and which scan is this text's (M3D-Bench, task 1).

`run_retrieval` embeds; `score_retrieval` draws pools and ranks, of what was embedded and without the model.

A pool is drawn once, by a fixed seed, and the smaller lies in the larger. Its candidates stay while patients' queries
are resampled, so an interval says how sure the mean over queries is *in this pool*. Ties count against the model, and
records of the same text are ties by definition: they share one vector, for a batch that pads differently changes the
last bits. `ceiling` says what ties leave to be reached.

The blind twin is ``shuffled`` unless one of ``zeros`` was run. Shuffled, each image shows the volume of another
patient, whose vector is there already: nothing is embedded for it. Of zeros, all volumes are black and have one vector:
image to text is then exactly chance, and text to image ties throughout, which counts as the last rank.
"""

# n = records of a pool, E = width of the embedding

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from m3d.bench.bootstrap import SEED, Estimate, difference, estimate, summed
from m3d.bench.embeddings import ClipEmbedder, Embedded, Embedder, Vectors, embed_records, has, read_embedded
from m3d.bench.metrics.base import Floats, ProtocolName
from m3d.bench.metrics.retrieval import WAYS, WITHIN, MeanOfPool, MedianRank, pool_metrics
from m3d.inference.load import pick_device
from m3d.train.cases import TrainingCase

__all__ = ["SIZES", "Blind", "draw_pools", "retrieval_samples", "run_retrieval", "score_retrieval", "shuffled"]

SIZES = (100, 500, 1000, 2000)
TASK = "retrieval"
Blind = Literal["shuffled", "zeros"]
Pools = Mapping[str, Sequence[str]]


def run_retrieval(
    cases: Sequence[TrainingCase],
    clip: Path | str | Embedder,
    out: Path,
    *,
    blind: Blind | None = None,
    shard: tuple[int, int] = (0, 1),
    task: str = TASK,
    batch: int = 8,
    device: str = "auto",
) -> None:
    """Embed scans and texts into ``out/retrieval``; what is there already is not done again.

    ``clip`` is a folder of ``pretrain_clip``, or any `Embedder`. With ``blind`` "zeros" the volumes are black; for
    "shuffled" the vectors are those of the run that sees, so it is that run.
    """
    embedder = ClipEmbedder.load(clip, pick_device(device)) if isinstance(clip, Path | str) else clip
    sight: Literal["seeing", "zeros"] = "zeros" if blind == "zeros" else "seeing"
    embed_records(cases, embedder, out, task=task, sight=sight, shard=shard, batch=batch)


# -- pools and blind twins ------------------------------------------------------------------------------------------


def draw_pools(ids: Sequence[str], sizes: Sequence[int] = SIZES, *, seed: int = SEED) -> dict[str, list[str]]:
    """Record ids by pool, the smaller in the larger; of fewer records than the largest size, all are a pool too."""
    order = np.random.default_rng(seed).permutation(len(ids))
    known = sorted(ids)
    wanted = {size for size in sizes if size <= len(ids)} | {min(len(ids), max(sizes))}
    return {str(size): sorted(known[place] for place in order[:size]) for size in sorted(wanted)}


def shuffled(seeing: Embedded, *, seed: int = SEED) -> Embedded:
    """Each image with the volume of another patient; of the same only where one patient has more than half of all.

    Records stand in a circle, patients in random order, and pass their volume on by as many places as the patient with
    the most records has.
    """
    mine: dict[str, list[int]] = defaultdict(list)
    for place, patient in enumerate(seeing.patients):
        mine[patient].append(place)
    names = sorted(mine)
    order = [place for turn in np.random.default_rng(seed).permutation(len(names)) for place in mine[names[turn]]]
    n, most = len(order), max(map(len, mine.values()))
    step = most if 2 * most <= n else n // 2
    scans, given = np.empty_like(seeing.scans), np.roll(order, -step)
    scans[order] = seeing.scans[given]
    return replace(seeing, scans=scans)


def similarities(embedded: Embedded, *, one_vector_a_text: bool) -> Floats:
    """Cosines of all scans (rows) with all texts, ``-inf`` where either has no vector: ``(n, n)``.

    What is equal is multiplied once: a product's last bits can depend on its place in the matrix, and equal vectors
    would not tie.
    """
    words = embedded.words
    if one_vector_a_text:
        first: dict[str, int] = {}
        words = words[[first.setdefault(text, place) for place, text in enumerate(embedded.texts)]]
    scans, to_scan = _distinct(embedded.scans)
    texts, to_text = _distinct(words)
    with np.errstate(invalid="ignore"):
        product = scans @ texts.T
    product[~np.isfinite(product)] = -np.inf
    return np.asarray(product[to_scan][:, to_text])


def _distinct(vectors: Vectors) -> tuple[Floats, npt.NDArray[np.int64]]:
    found, place = np.unique(vectors, axis=0, return_inverse=True)
    return found.astype(np.float64), place.reshape(-1)


# -- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The pools of a run, of one sight: metrics by pool, and which text stands first for each image."""

    embedded: Embedded
    metrics: Mapping[str, Sequence[MeanOfPool]]
    first: Mapping[str, str]


def score_retrieval(
    out: Path,
    protocol: ProtocolName = "standard",
    *,
    sizes: Sequence[int] = SIZES,
    pools: Pools | None = None,
    blind: Blind | None = None,
) -> dict[str, Any]:
    """The entry of ``metrics.json`` for retrieval, from what `run_retrieval` left.

    ``pools`` gives record ids by name in place of pools that are drawn, as the paper's test subsets. ``protocol`` "m3d"
    names directions IR (images look for texts) and TR, as the released code does. What it computes is of whole vectors;
    the released loader also shortens texts that are too long at random, which nobody can repeat.

    Raises:
        FileNotFoundError, ValueError: Nothing was embedded, or not all, or a pool names records that are not there.
    """
    seeing = read_embedded(out)
    chosen = _checked(seeing.ids, pools) if pools is not None else draw_pools(seeing.ids, sizes)
    twin = blind or ("zeros" if has(out, "zeros") else "shuffled")
    one, other = (_ranked(view, chosen, protocol) for view in (seeing, _blind(out, seeing, twin)))
    patient = dict(zip(seeing.ids, seeing.patients, strict=True))
    metrics = {}
    for pool in chosen:
        for metric, blinded in zip(one.metrics[pool], other.metrics[pool], strict=True):
            metrics[metric.name] = _entry(metric, blinded, [patient[record] for record in metric.ids])
    failed = [failure for failure in seeing.failures if failure is not None]
    return {
        "n": len(seeing.ids),
        "patients": len(set(seeing.patients)),
        "n_failed": len(failed),
        "failures": dict(sorted(Counter(failure.partition(":")[0] for failure in failed).items())),
        "seconds": round(seeing.seconds, 3),
        "embedder": dict(seeing.about["embedder"]),
        "blind": twin,
        "pools": {pool: _pool_facts(seeing, ids) for pool, ids in chosen.items()},
        "metrics": metrics,
    }


def retrieval_samples(
    out: Path,
    protocol: ProtocolName = "standard",
    *,
    sizes: Sequence[int] = SIZES,
    pools: Pools | None = None,
    blind: Blind | None = None,
) -> list[dict[str, Any]]:
    """Lines of ``samples.jsonl`` for both sights; ``text`` is the one that stands first in the largest pool.

    Without the median rank: the rows of that one are as long as its pool.
    """
    seeing = read_embedded(out)
    chosen = _checked(seeing.ids, pools) if pools is not None else draw_pools(seeing.ids, sizes)
    twin = blind or ("zeros" if has(out, "zeros") else "shuffled")
    views = {"seeing": seeing, "blind": _blind(out, seeing, twin)}
    return [row for sight, view in views.items() for row in _rows(sight, _ranked(view, chosen, protocol))]


def _blind(out: Path, seeing: Embedded, blind: Blind) -> Embedded:
    if blind not in ("shuffled", "zeros"):
        raise ValueError(f"blind={blind!r} is not known; use shuffled or zeros")
    return shuffled(seeing) if blind == "shuffled" else read_embedded(out, "zeros")


def _checked(ids: Sequence[str], pools: Pools) -> dict[str, list[str]]:
    known = set(ids)
    for name, wanted in pools.items():
        if missing := sorted(set(wanted) - known):
            raise ValueError(f"pool {name}: {len(missing)} of its records were not embedded, such as {missing[0]}")
        if len(wanted) < 2 or len(set(wanted)) < len(wanted):
            raise ValueError(f"pool {name}: it needs two records or more, and each of them once")
    return {name: sorted(wanted) for name, wanted in pools.items()}


def _ranked(embedded: Embedded, pools: Pools, protocol: ProtocolName) -> _Ranked:
    place = {record: number for number, record in enumerate(embedded.ids)}
    whole = similarities(embedded, one_vector_a_text=protocol == "standard")
    metrics: dict[str, Sequence[MeanOfPool]] = {}
    first: dict[str, str] = {}
    for pool, ids in sorted(pools.items(), key=lambda item: len(item[1])):
        chosen = [place[record] for record in ids]
        matrix = whole[np.ix_(chosen, chosen)]
        metrics[pool] = pool_metrics(protocol, matrix, ids, pool)
        best = matrix.argmax(axis=1).tolist()
        first |= {record: embedded.texts[chosen[text]] for record, text in zip(ids, best, strict=True)}
    return _Ranked(embedded, metrics, first)


def _entry(metric: MeanOfPool, blinded: MeanOfPool, patients: Sequence[str]) -> dict[str, Any]:
    seeing, other = summed(metric.rows, patients), summed(blinded.rows, patients)
    value = estimate(metric, seeing)
    entry = {
        "variant": metric.variant,
        "better": metric.better,
        "unit": metric.unit,
        **_numbers(value),
        "n": value.n,
        "patients": value.patients,
        **_numbers(estimate(metric, other), "blind"),
        **_numbers(difference(metric, seeing, other), "gain"),
        "chance": metric.chance,
    }
    if metric.better == "higher" and metric.chance and value.value is not None:
        entry["times_chance"] = value.value / metric.chance
    return entry | {"groups": {}}


def _numbers(found: Estimate, name: str = "") -> dict[str, float | None]:
    low, high = (f"{name}_low", f"{name}_high") if name else ("low", "high")
    return {name or "value": found.value, low: found.low, high: found.high}


def _pool_facts(embedded: Embedded, ids: Sequence[str]) -> dict[str, Any]:
    """Size, ids and duplicates; `ceiling` is the R@k that no model can pass, for ties of identical texts."""
    rows = dict(zip(embedded.ids, zip(embedded.texts, embedded.patients, strict=True), strict=True))
    texts, patients = (Counter(rows[record][column] for record in ids) for column in (0, 1))
    alike = [texts[rows[record][0]] for record in ids]
    return {
        "n": len(ids),
        "patients": len(patients),
        "distinct_texts": len(texts),
        "share_their_text": sum(count > 1 for count in alike),
        "ceiling": {f"R@{k} {WAYS[0]}": sum(count <= k for count in alike) / len(ids) for k in WITHIN},
        "ids": list(ids),
    }


def _rows(sight: str, ranked: _Ranked) -> list[dict[str, Any]]:
    statistics: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for metric in (one for metrics in ranked.metrics.values() for one in metrics):
        if not isinstance(metric, MedianRank):
            for record, row in zip(metric.ids, metric.rows.tolist(), strict=True):
                statistics[record][metric.name] = row
    view = ranked.embedded
    names = zip(view.ids, view.image_ids, view.patients, view.texts, view.failures, strict=True)
    return [
        {
            "id": record,
            "sight": sight,
            "task": TASK,
            "subtask": "",
            "image_id": image,
            "patient_id": patient,
            "group": "",
            "failure": failure,
            "text": ranked.first.get(record, "") if failure is None else "",
            "reference": text,
            "statistics": statistics[record],
        }
        for record, image, patient, text, failure in names
        if record in statistics
    ]
