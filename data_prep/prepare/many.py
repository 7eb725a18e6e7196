"""All entries of all sources: what is done already is found, the rest is worked off, and the parts become one store.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from data_prep.atomic import atomic_path
from data_prep.prepare.job import Job, image_id
from data_prep.prepare.one import Outcome, finished, part_path, prepare_entry
from data_prep.prepare.runners import Local, Runner
from data_prep.sources.base import Entry
from data_prep.sources.splits import check_patients
from data_prep.store import INDEXES

__all__ = ["Summary", "merge_entries", "prepare"]

Progress = Callable[[Sequence[Entry], Iterator[Outcome]], Iterator[Outcome]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a preparation has done.

    ``stale`` counts parts of images that the sources no longer list, ``warned`` images with something to beware of.
    """

    images: int
    found: int
    prepared: int
    rejected: int
    dropped: int
    stale: int
    warned: int
    seconds: float
    tasks: Counter[str] = field(default_factory=Counter)


def prepare(
    entries: Iterable[Entry],
    job: Job,
    root: Path | str,
    *,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Prepare every entry that is not there yet, then write the store's indexes; run it again to continue.

    Args:
        entries: What the sources list; entries of one image (reports here, questions there) are taken together.
        job: The settings. A store that others made is refused.
        root: The store's folder, made if missing.
        runner: Where the work is done; in this process if not given.
        progress: Wraps the outcomes, to show how far it is.

    Raises:
        ValueError: There is no entry, two claim one image, a patient is in two splits, or the folder holds a store of
            other settings.
    """
    root, begun = Path(root), time.monotonic()
    together = merge_entries(entries)
    if not together:
        raise ValueError(f"{root}: no image to prepare; give the config a source that lists some")
    check_patients(together, str(root))
    _open(root, job)
    todo = [entry for entry in together if not finished(entry, job=job, root=root)]
    if todo:  # what follows replaces files, so an interrupted store must not open as a whole one
        for name in INDEXES:
            (root / name).unlink(missing_ok=True)
    outcomes = (runner or Local()).map(partial(prepare_entry, job=job, root=root), todo)
    rejected = _work(todo, outcomes, root, progress)
    return _assemble(root, together, rejected, len(todo), begun)


def merge_entries(entries: Iterable[Entry]) -> list[Entry]:
    """All entries by image id; those of one image become one, with the drafts of all.

    Raises:
        ValueError: Two entries of an image disagree about its files, patient or split.
    """
    found: dict[str, Entry] = {}
    folded: dict[str, str] = {}  # what a file system that does not tell cases apart would see
    for entry in entries:
        identity = image_id(entry)
        other = folded.setdefault(identity.lower(), identity)
        if other != identity:
            raise ValueError(
                f"images {other!r} and {identity!r} differ in case only, which not every disk can tell apart"
            )
        known = found.get(identity)
        found[identity] = entry if known is None else _joined(known, entry)
    return [found[identity] for identity in sorted(found)]


def _joined(first: Entry, second: Entry) -> Entry:
    for name in ("image_id", "files", "patient_id", "split"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(
                f"{first.dataset}/{first.image_id} is listed twice, with {name} {getattr(first, name)} and "
                f"{getattr(second, name)}; give one of them another id, or remove it"
            )

    return dataclasses.replace(first, drafts=(*first.drafts, *second.drafts))


def _open(root: Path, job: Job) -> None:
    """Make the folder or find it as this job has left it; what a killed run half-wrote is removed."""
    path, settings = root / "store.json", job.to_dict()
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if differ:
            raise ValueError(
                f"{root}: a store of other settings ({', '.join(differ)} differ); choose another output, or delete it"
            )
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"{root}: holds files and is no store; choose an empty folder")
    for folder in ("images", "masks", "parts"):
        for leftover in (root / folder).rglob(".*"):  # `atomic_path` names what is not whole yet like this
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    job.preprocess.write(root)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _work(todo: Sequence[Entry], outcomes: Iterator[Outcome], root: Path, progress: Progress | None) -> list[Outcome]:
    """Run through the outcomes; a reject is on disk as soon as it is known."""
    rejected = []
    with (root / "rejects.jsonl").open("w", encoding="utf-8") as file:
        for outcome in progress(todo, outcomes) if progress else outcomes:
            if outcome.error is not None:
                rejected.append(outcome)
                _say(file, _reject(outcome))
                file.flush()
    return rejected


def _assemble(root: Path, entries: Sequence[Entry], rejected: Sequence[Outcome], todo: int, begun: float) -> Summary:
    """Write the indexes from the parts, sorted by image: the same files whoever did the work, in whatever order."""
    without = {outcome.image_id for outcome in rejected}
    identities = [identity for identity in map(image_id, entries) if identity not in without]
    rejects = [_reject(outcome) for outcome in sorted(rejected, key=lambda one: one.image_id)]
    tasks: Counter[str] = Counter()
    warned = 0
    with (
        atomic_path(root / "records.jsonl") as records_path,
        atomic_path(root / "images.jsonl") as images_path,
        records_path.open("w", encoding="utf-8", newline="\n") as records,
        images_path.open("w", encoding="utf-8", newline="\n") as images,
    ):
        for identity in identities:
            part = json.loads(part_path(root, identity).read_text(encoding="utf-8"))
            _say(images, part["image"])
            warned += bool(part["image"]["warnings"])
            for record in sorted(part["records"], key=lambda record: str(record["id"])):
                _say(records, record)
                tasks[record["task"]] += 1
            rejects += [{"image_id": identity, "what": "record", **one} for one in part["dropped"]]
    with atomic_path(root / "rejects.jsonl") as path, path.open("w", encoding="utf-8", newline="\n") as file:
        for reject in rejects:
            _say(file, reject)
    parts = sum(1 for _ in (root / "parts").rglob("*.json"))
    return Summary(
        images=len(identities),
        found=len(entries) - todo,
        prepared=todo - len(rejected),
        rejected=len(rejected),
        dropped=len(rejects) - len(rejected),
        stale=parts - len(identities),
        warned=warned,
        seconds=time.monotonic() - begun,
        tasks=tasks,
    )


def _reject(outcome: Outcome) -> dict[str, Any]:
    return {
        "image_id": outcome.image_id,
        "what": "image",
        "files": list(outcome.files),
        "error": outcome.error,
        "reason": outcome.reason,
    }


def _say(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
