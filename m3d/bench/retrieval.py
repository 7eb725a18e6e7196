"""Image-text retrieval: which of a pool's texts is this scan's, and which scan is this text's (M3D-Bench, task 1).

`run_retrieval` embeds the records that were chosen; `score_retrieval` ranks them in pools, of what was embedded and
without the model. Pools are drawn (`draw_pools`: once, by a fixed seed, the smaller in the larger) or given by name: of
the paper's, records of M3D-Cap say in ``meta["subsets"]`` that they are of test100, test500, test1k or hard_test, and
`subset_pools` gathers them by the names that a config has for them. A pool's name stands in the names of its metrics.

A pool's candidates stay while patients' queries are resampled, so an interval says how sure the mean over queries is
*in this pool*. Ties count against the model. Records of the same text are ties by definition: they share one vector,
for a batch that pads differently changes the last bits. So are records of the same image. `ceiling` says what ties
leave to be reached.

The blind twin is always shown another patient's scan (`shuffled`), whatever twin the run's other tasks have: vectors
are there already, so nothing is embedded for it. One that is shown no voxel would have one vector for all scans, and
say nothing: ties throughout.
"""

# n = records of a pool, E = width of the embedding

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.record import Record
from m3d.bench.bootstrap import SEED, difference, estimate, summed
from m3d.bench.embeddings import Asked, ClipEmbedder, Embedded, Embedder, Vectors, embed_records, read_embedded
from m3d.bench.metrics.base import Floats, ProtocolName
from m3d.bench.metrics.retrieval import WAYS, WITHIN, MeanOfPool, MedianRank, pool_metrics
from m3d.inference.load import pick_device

__all__ = ["SIZES", "draw_pools", "retrieval_samples", "run_retrieval", "score_retrieval", "shuffled", "subset_pools"]

SIZES = (100, 500, 1000, 2000)
TASK, TWIN = "retrieval", "shuffled"
Pools = Mapping[str, Sequence[str]]


def run_retrieval(
    asked: Sequence[Asked],
    clip: Path | str | Embedder,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    batch: int = 8,
    device: str = "auto",
) -> None:
    """Embed scans and texts into ``out/retrieval``; what is there already is not done again.

    ``asked`` are the records that were chosen, each with its scan; of one scan there may be several. ``clip`` is a
    folder of ``pretrain_clip``, read to ``device``, or any `Embedder`. See `embed_records`.
    """
    embedder = ClipEmbedder.load(clip, pick_device(device)) if isinstance(clip, Path | str) else clip
    embed_records(asked, embedder, out, shard=shard, batch=batch)


# -- pools and the blind twin ---------------------------------------------------------------------------------------


def draw_pools(ids: Sequence[str], sizes: Sequence[int] = SIZES, *, seed: int = SEED) -> dict[str, list[str]]:
    """Record ids by pool, the smaller in the larger; of fewer records than the largest size, all are a pool too."""
    order = np.random.default_rng(seed).permutation(len(ids))
    known = sorted(ids)
    wanted = {size for size in sizes if size <= len(ids)} | {min(len(ids), max(sizes))}
    return {str(size): sorted(known[place] for place in order[:size]) for size in sorted(wanted)}


def subset_pools(records: Iterable[Record], subsets: Mapping[str, str]) -> dict[str, list[str]]:
    """Record ids by pool, as `score_retrieval` takes them; ``subsets`` are by pool: ``{"100": "test100"}``.

    Raises:
        ValueError: Fewer than two records are of a subset.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for subset in record.meta.get("subsets") or ():
            members[subset].append(record.id)
    for pool, subset in subsets.items():
        if len(members[subset]) < 2:
            known = ", ".join(sorted(name for name, ids in members.items() if ids)) or "none"
            raise ValueError(
                f"pool {pool}: {len(members[subset])} of the records are of subset {subset!r} (there are: {known}); "
                "ask more of them, or leave the pool out"
            )
    return {pool: sorted(members[subset]) for pool, subset in subsets.items()}


def shuffled(seeing: Embedded, *, seed: int = SEED) -> Embedded:
    """Each scan as that of another patient; of the same only where one patient has more than half of all.

    Scans stand in a circle, patients in random order, and pass their vectors on by as many places as the patient with
    the most scans has. Those that could not be embedded stand aside.
    """
    first = {image: place for place, image in reversed(list(enumerate(seeing.image_ids)))}
    mine: dict[str, list[int]] = defaultdict(list)
    for place in sorted(first.values()):
        if np.isfinite(seeing.scans[place]).all():
            mine[seeing.patients[place]].append(place)
    names = sorted(mine)
    order = [place for turn in np.random.default_rng(seed).permutation(len(names)) for place in mine[names[turn]]]
    n, most = len(order), max(map(len, mine.values()), default=0)
    step = most if 2 * most <= n else n // 2
    given = {place: order[(turn + step) % n] for turn, place in enumerate(order)}
    shown = (first[image] for image in seeing.image_ids)
    return replace(seeing, scans=seeing.scans[[given.get(place, place) for place in shown]])


# -- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The pools of a run, of one sight: metrics by pool, and which text stands first for each image."""

    embedded: Embedded
    metrics: Mapping[str, Sequence[MeanOfPool]]
    first: Mapping[str, str]


def score_retrieval(
    out: Path, protocol: ProtocolName = "standard", *, pools: Pools | None = None, twin: bool = True
) -> dict[str, Any]:
    """The entry of ``metrics.json`` for retrieval, from what `run_retrieval` left; no record's id is in it.

    ``pools`` gives record ids by name, such as `subset_pools`; where there are none, pools are drawn. Without ``twin``
    there is no blind twin beside. ``protocol`` "m3d" names directions IR (images look for texts) and TR, as the
    released code does. What it computes is of whole vectors; the released loader also shortens texts that are too long
    at random, which nobody can repeat.

    Raises:
        FileNotFoundError, ValueError: Nothing was embedded, or not all, or a pool names records that are not there.
    """
    seeing = read_embedded(out)
    chosen = _chosen(seeing.ids, pools)
    one = _ranked(seeing, chosen, protocol)
    other = _ranked(shuffled(seeing), chosen, protocol) if twin else None
    patient = dict(zip(seeing.ids, seeing.patients, strict=True))
    metrics = {}
    for pool in chosen:
        for number, metric in enumerate(one.metrics[pool]):
            blinded = None if other is None else other.metrics[pool][number]
            metrics[metric.name] = _entry(metric, blinded, [patient[record] for record in metric.ids])
    failed = [failure for failure in seeing.failures if failure is not None]
    return {
        "n": len(seeing.ids),
        "patients": len(set(seeing.patients)),
        "n_failed": len(failed),
        "failures": dict(sorted(Counter(failure.partition(":")[0] for failure in failed).items())),
        "seconds": round(seeing.seconds, 3),
        "embedder": dict(seeing.about["embedder"]),
        "blind": TWIN if twin else None,
        "pools": {pool: _pool_facts(seeing, ids) for pool, ids in chosen.items()},
        "metrics": metrics,
    }


def retrieval_samples(
    out: Path, protocol: ProtocolName = "standard", *, pools: Pools | None = None, twin: bool = True
) -> list[dict[str, Any]]:
    """Lines of ``samples.jsonl`` for both sights; ``text`` is the one that stands first in the largest pool.

    Without the median rank: the rows of that one are as long as its pool.
    """
    seeing = read_embedded(out)
    chosen = _chosen(seeing.ids, pools)
    views = {"seeing": seeing} | ({"blind": shuffled(seeing)} if twin else {})
    return [row for sight, view in views.items() for row in _rows(sight, _ranked(view, chosen, protocol))]


def _chosen(ids: Sequence[str], pools: Pools | None) -> dict[str, list[str]]:
    if not pools:
        return draw_pools(ids)
    known = set(ids)
    for name, wanted in pools.items():
        if missing := sorted(set(wanted) - known):
            raise ValueError(f"pool {name}: {len(missing)} of its records were not embedded, such as {missing[0]}")
        if len(wanted) < 2 or len(set(wanted)) < len(wanted):
            raise ValueError(f"pool {name}: it needs two records or more, and each of them once")
    return {name: sorted(wanted) for name, wanted in pools.items()}


def _ranked(embedded: Embedded, pools: Pools, protocol: ProtocolName) -> _Ranked:
    place = {record: number for number, record in enumerate(embedded.ids)}
    words = embedded.words
    if protocol == "standard":  # one vector a text
        alike: dict[str, int] = {}
        words = words[[alike.setdefault(text, number) for number, text in enumerate(embedded.texts)]]
    metrics: dict[str, Sequence[MeanOfPool]] = {}
    first: dict[str, str] = {}
    for pool, ids in sorted(pools.items(), key=lambda item: len(item[1])):
        chosen = [place[record] for record in ids]
        matrix = similarities(embedded.scans[chosen], words[chosen])
        metrics[pool] = pool_metrics(protocol, matrix, ids, pool)
        best = matrix.argmax(axis=1).tolist()
        first |= {record: embedded.texts[chosen[text]] for record, text in zip(ids, best, strict=True)}
    return _Ranked(embedded, metrics, first)


def similarities(scans: Vectors, texts: Vectors) -> Floats:
    """Cosines of all scans (rows) with all texts, ``-inf`` where either has no vector: ``(n, E), (n, E) -> (n, n)``.

    What is equal is multiplied once: a product's last bits can depend on its place in the matrix, and equal vectors
    would not tie. In float64, for in float32 vectors that differ would.
    """
    (scans_once, to_scan), (texts_once, to_text) = _distinct(scans), _distinct(texts)
    with np.errstate(invalid="ignore"):
        product = scans_once @ texts_once.T
    product[~np.isfinite(product)] = -np.inf
    return np.asarray(product[np.ix_(to_scan, to_text)])


def _distinct(vectors: Vectors) -> tuple[Floats, npt.NDArray[np.int64]]:
    found, place = np.unique(vectors, axis=0, return_inverse=True)
    return found.astype(np.float64), place.reshape(-1)


def _entry(metric: MeanOfPool, blinded: MeanOfPool | None, patients: Sequence[str]) -> dict[str, Any]:
    seeing = summed(metric.rows, patients)
    value = estimate(metric, seeing)
    entry = {"variant": metric.variant, "better": metric.better, "unit": metric.unit, **value.to_dict()}
    if blinded is not None:
        other = summed(blinded.rows, patients)
        entry |= estimate(metric, other).to_dict("blind") | difference(metric, seeing, other).to_dict("gain")
    entry["chance"] = metric.chance
    if metric.better == "higher" and metric.chance and value.value is not None:
        entry["times_chance"] = value.value / metric.chance
    return entry | {"groups": {}}


def _pool_facts(embedded: Embedded, ids: Sequence[str]) -> dict[str, Any]:
    """Size and duplicates, and which records they are, by a hash: ids may name patients.

    No model passes `ceiling`, the R@k that ties of identical texts and of records of one image leave.
    """
    columns = zip(embedded.texts, embedded.image_ids, embedded.patients, strict=True)
    rows = dict(zip(embedded.ids, columns, strict=True))
    texts, images, patients = zip(*(rows[record] for record in ids), strict=True)
    counted = [(some, Counter(some)) for some in (texts, images)]
    alike = [[counts[one] for one in some] for some, counts in counted]
    return {
        "n": len(ids),
        "patients": len(set(patients)),
        "distinct_texts": len(set(texts)),
        "distinct_images": len(set(images)),
        "share_their_text": sum(count > 1 for count in alike[0]),
        "share_their_image": sum(count > 1 for count in alike[1]),
        "ceiling": {
            f"R@{k} {way}": sum(count <= k for count in counts) / len(ids)
            for way, counts in zip(WAYS, alike, strict=True)
            for k in WITHIN
        },
        "ids_sha256": hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest(),
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
