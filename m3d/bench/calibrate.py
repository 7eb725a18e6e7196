"""What a model gives away of structures that certainly are, or are not, in the scans of a store, and how a fit does.

Certainly there is what has a label on the model's grid. Certainly not there is a label without voxels, where the store
says that labels are complete (phantoms), and what no scan of the store shows. A clinical contour that is missing is
neither, and is not asked for.

A scan's answers are a line of ``answers.jsonl``, on disk before the next scan is looked at, so that what was stopped
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.store import Store, StoredImage, file_sha256
from m3d.bench.cases import BenchCase
from m3d.bench.reliability import measures
from m3d.inference.load import M3D
from m3d.inference.presence import Presence, Signs, fit, signs_of
from m3d.inference.scan import Scan
from m3d.train.cases import StoredCase, stored

__all__ = ["Answers", "Asked", "ask_scans", "certain", "check_splits", "fit_to", "judge"]

Progress = Callable[[Iterable[StoredCase]], Iterable[StoredCase]]


@dataclass(frozen=True)
class Asked:
    """A structure that was asked for: whether it certainly is in the scan, and what the model gave away."""

    patient: str
    name: str
    there: bool
    signs: Signs


class Answers:
    """A file of answers, a scan a line, after a line that says whose they are; what a stop cut off is dropped.

    ``anew`` begins the file again where it holds answers of another model, or about other data.

    Raises:
        ValueError: It does, and ``anew`` is not given.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, anew: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.is_file() else b""
        kept = kept[: kept.rfind(b"\n") + 1]
        first, *lines = kept.splitlines() or [b""]
        if first and json.loads(first) != about:
            if not anew:
                raise ValueError(f"{path} holds answers of another model or about other data; remove it first")
            kept, lines = b"", []
        self.lines: dict[str, list[Asked]] = {}
        for line in map(json.loads, lines):
            self.lines[line["scan"]] = [Asked(**one | {"signs": Signs(**one["signs"])}) for one in line["asked"]]
        path.write_bytes(kept or json.dumps(about).encode() + b"\n")
        self._path = path

    def add(self, scan: str, asked: Sequence[Asked]) -> None:
        """Keep what a scan was asked, in memory and on disk."""
        self.lines[scan] = list(asked)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"scan": scan, "asked": [asdict(one) for one in asked]}, ensure_ascii=False) + "\n")


def check_splits(stores: Sequence[Path], fitted: str, judged: str) -> None:
    """See that every store has scans to fit to and others to judge on; reads their indices alone.

    Raises:
        ValueError: A store has no such split, has a patient in both, or is given twice.
    """
    first: dict[str, Path] = {}
    for store in stores:
        other = first.setdefault(file_sha256(store / "images.jsonl"), store)
        if other is not store:
            raise ValueError(f"{store} holds the same scans as {other}; give one of them")
        patients: dict[str, set[str]] = {}
        for image in Store(store).images.values():
            patients.setdefault(image.split, set()).add(image.patient_id)
        for split in (fitted, judged):
            if split not in patients:
                known = ", ".join(sorted(patients)) or "none at all"
                raise ValueError(f"{store}: no image is in split {split!r}; it has {known}")
        if both := patients[fitted] & patients[judged]:
            raise ValueError(
                f"{store}: {len(both)} of its patients are in {fitted!r} and in {judged!r}; "
                "a fit is judged on patients it has not seen: prepare the store with splits by patient"
            )


def certain(image: StoredImage, *, never: Sequence[str] = ()) -> dict[str, bool]:
    """Which structures certainly are (True) or are not (False) in a stored scan; ``never`` are in no scan.

    Raises:
        BadScan: The labels cannot be read.
    """
    there = set(np.unique(image.labels()).tolist())
    known = {name: value in there for value, name in image.names.items() if value in there or image.complete}
    return {**known, **dict.fromkeys(never, False)}


def ask_scans(
    model: M3D,
    store: Path,
    split: str,
    answers: Answers,
    *,
    never: Sequence[str] = (),
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[Asked]:
    """Ask for all that is certain of the scans of a split, those that have not been asked yet; all answers.

    A scan is known by its id and by the SHA-256 of its store's index: another store may have one of the same id.

    Raises:
        ValueError: The store was prepared for another model, or has no such split.
        BadScan: A file of it is broken; the message names it.
    """
    cases = stored(store, split, preprocess=model.processor.preprocess)[:limit]
    show = progress or (lambda some: tqdm(some, unit="scan", desc=f"{store.name} {split}"))
    index = file_sha256(store / "images.jsonl")
    keys = {case.id: f"{index}/{case.id}" for case in cases}
    for case in show([case for case in cases if keys[case.id] not in answers.lines]):
        known = certain(case.image, never=never)
        answers.add(keys[case.id], list(_ask(model, case, known)))
    return [asked for key in keys.values() for asked in answers.lines[key]]


def _ask(model: M3D, case: StoredCase, known: Mapping[str, bool]) -> Iterator[Asked]:
    if not known:
        return
    prepared = BenchCase(case, ()).open().prepared(model.processor.preprocess)
    scan = Scan.of_prepared(model.id, model.model, model.processor, prepared)
    for (name, there), signs in zip(known.items(), signs_of(scan, list(known)), strict=True):
        yield Asked(case.image.patient_id, name, there, signs)


def judge(presence: Presence, asked: Sequence[Asked]) -> dict[str, Any]:
    """How the probabilities of a fit do: `reliability.measures` of all, and by structure how many are called there."""
    said = [presence.probability(one.name, one.signs) for one in asked]
    found = measures(said, [one.there for one in asked], [one.patient for one in asked])
    structures: dict[str, Any] = {}
    for name in dict.fromkeys(one.name for one in asked):
        own = [(value, one.there) for value, one in zip(said, asked, strict=True) if one.name == name]
        structures[name] = {
            "there": sum(there for _, there in own),
            "of these called there": sum(value >= 0.5 for value, there in own if there),
            "not there": sum(not there for _, there in own),
            "of these called not there": sum(value < 0.5 for value, there in own if not there),
        }
    return found | {"structures": structures}


def fit_to(asked: Sequence[Asked], *, weights: str, stores: Sequence[Path], split: str) -> Presence:
    """Fit to answers, and say to what: stores by name, no path, no date; ``weights`` are told by their SHA-256.

    Raises:
        ValueError: All of them are there, or none is.
    """
    there = [one.there for one in asked]
    facts = {
        "weights_sha256": weights,
        "stores": [store.absolute().name for store in stores],
        "split": split,
        "patients": len({one.patient for one in asked}),
        "there": sum(there),
        "not there": len(there) - sum(there),
    }
    return fit([one.name for one in asked], [one.signs for one in asked], there, facts)
