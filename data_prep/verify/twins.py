"""What stands in two splits: patients, images, the same voxels, and reports that are nearly the same.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

from data_prep.verify.facts import ImageFacts, ReportText
from data_prep.verify.findings import Finding
from data_prep.verify.words import words_of

__all__ = ["LONG", "check_patients", "check_reports", "check_volumes", "jaccard", "shingles"]

LONG = 20  # words from which on two equal reports are no coincidence
_SHINGLE = 5
_PERMUTATIONS = 128
_SLACK = 0.1  # the sketch looks a little wider; what it finds is measured exactly
Shingles = frozenset[tuple[str, ...]]


def check_patients(images: Mapping[str, ImageFacts]) -> Iterator[Finding]:
    """Patients and images in more than one split."""
    seen: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    blamed: set[tuple[str, str]] = set()
    numbers: dict[tuple[str, str], str] = {}
    for image_id, facts in images.items():
        prefix = f"{image_id.partition('/')[0]}/"  # preparation puts the data set before patient and image
        for owner in facts.patients:
            numbers[owner] = owner[1].removeprefix(prefix)
            for split, where in facts.splits.items():
                seen[owner].setdefault(split, where)
    for (dataset, patient), splits in seen.items():
        if len(splits) > 1:
            blamed.add((dataset, patient))
            message = f"patient {patient!r} of {dataset} is in {_joined(splits)}; put a patient's images into one split"
            yield Finding("error", "patients", f"patient {patient}", message)
    for image_id, facts in images.items():
        if len(facts.splits) > 1 and not blamed & set(facts.patients):
            message = f"the image is in {_joined(facts.splits)}; put it into one split"
            yield Finding("error", "patients", f"image {image_id}", message)
    yield from _check_namesakes({owner: seen[owner] for owner in seen if owner not in blamed}, numbers)


def _check_namesakes(
    seen: Mapping[tuple[str, str], Mapping[str, str]], numbers: Mapping[tuple[str, str], str]
) -> Iterator[Finding]:
    """One patient's number in two data sets and splits: one person, or a number that both use; one finding a pair."""
    owners: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for owner in seen:
        owners[numbers[owner]].append(owner)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for number, shared in owners.items():
        for one, other in combinations(shared, 2):
            places = {**seen[one], **seen[other]}
            if len(places) > 1:
                whose = dict.fromkeys(seen[one], one[0]) | dict.fromkeys(seen[other], other[0])
                told = {split: f"{where}, {whose[split]}" for split, where in places.items()}
                found[one[0], other[0]].append(f"patient id {number!r} is in {_joined(told)}")
    for (first, second), messages in found.items():
        more = f" (and {len(messages) - 1} more of {first} and {second})" if len(messages) > 1 else ""
        message = f"{messages[0]}{more}; if it is one patient, choose one split"
        yield Finding("warning", "patients", f"data sets {first} and {second}", message)


def check_volumes(images: Mapping[str, ImageFacts], digests: Mapping[str, str | None]) -> Iterator[Finding]:
    """Images with the same voxels, in the store or in the scans it was made from."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image_id, facts in images.items():
        for kind, value in (("stored voxels", digests.get(image_id)), ("scan", facts.scan_sha256)):
            if value:
                groups[kind, value].append(image_id)
    told: set[frozenset[str]] = set()
    for (kind, _), ids in groups.items():
        if len(ids) < 2 or frozenset(ids) in told:
            continue
        told.add(frozenset(ids))
        splits = {split for image_id in ids for split in images[image_id].splits}
        named = ", ".join(f"{image_id} ({'/'.join(images[image_id].splits)})" for image_id in ids[:6])
        message = f"the same {kind} under {len(ids)} ids: {named}; keep one"
        yield Finding("error" if len(splits) > 1 else "warning", "volumes", f"image {ids[0]}", message)


def check_reports(texts: Iterable[ReportText], *, threshold: float = 0.8) -> Iterator[Finding]:
    """Reports that stand in two splits as they are, then those whose five-word shingles agree to ``threshold``."""
    by_words: dict[tuple[str, ...], dict[str, ReportText]] = defaultdict(dict)
    for report in texts:
        by_words[words_of(report.text)].setdefault(report.split, report)
    for words, places in by_words.items():
        for one, other in combinations(places.values(), 2):
            if one.image_id != other.image_id:
                yield _same_report(one, other, "the same text as", len(words))
    people = {
        words: places for words, places in by_words.items() if words and not all(r.by_rule for r in places.values())
    }
    if len({split for places in people.values() for split in places}) < 2:
        return
    yield from _check_similar(people, threshold)


def _check_similar(texts: Mapping[tuple[str, ...], Mapping[str, ReportText]], threshold: float) -> Iterator[Finding]:
    """Search splits from the smallest, each in those before it, so that the largest is never indexed."""
    from datasketch import MinHash, MinHashLSH

    by_split: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for words, places in texts.items():
        for split in places:
            by_split[split].append(words)
    order = sorted(by_split, key=lambda split: (len(by_split[split]), split))
    wide = max(threshold - _SLACK, 0.1)
    indices: dict[str, MinHashLSH] = {}
    best: dict[tuple[str, tuple[str, ...], str], tuple[float, tuple[str, ...]]] = {}
    for split in order:
        own = MinHashLSH(threshold=wide, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        encoded = ([" ".join(shingle).encode() for shingle in shingles(words)] for words in by_split[split])
        sketches = MinHash.generator(encoded, num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        for words, sketch in zip(by_split[split], sketches, strict=True):
            for other, index in indices.items():
                for found in index.query(sketch):
                    alike = jaccard(shingles(words), shingles(found))
                    if found != words and alike >= max(threshold, best.get((other, found, split), (0.0, ()))[0]):
                        best[other, found, split] = (alike, words)
            if split != order[-1]:
                own.insert(words, sketch)
        indices[split] = own
    for (other, found, split), (alike, words) in best.items():
        length = min(len(found), len(words))
        yield _same_report(texts[found][other], texts[words][split], f"{alike:.0%} the same as", length)


def shingles(words: tuple[str, ...]) -> Shingles:
    """Every five words in a row; all of them where there are fewer."""
    return frozenset(words[start : start + _SHINGLE] for start in range(max(len(words) - _SHINGLE + 1, 1)))


def jaccard(one: Shingles, other: Shingles) -> float:
    """Shared shingles as a part of all."""
    together = one | other
    return len(one & other) / len(together) if together else 1.0


def _same_report(one: ReportText, other: ReportText, how: str, length: int) -> Finding:
    weak = length < LONG or (one.by_rule and other.by_rule)
    why = "; both are made by rule" if one.by_rule and other.by_rule else "; short texts may well agree"
    message = (
        f"the text of {one.image_id} ({one.split}) is {how} that of {other.image_id} ({other.split}, {other.where})"
        f"{why if weak else '; is it one patient? Keep one, or put both into one split'}"
    )
    return Finding("warning" if weak else "error", "reports", one.where, message)


def _joined(places: Mapping[str, str]) -> str:
    return " and ".join(f"{split} ({where})" for split, where in places.items())
