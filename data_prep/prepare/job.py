"""What is done to every scan of a store, and how a finished image is told from one that other settings made.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from data_prep.derived import KINDS
from data_prep.preprocess import Preprocess
from data_prep.sources.base import Entry
from data_prep.store import FORMAT, Kept

__all__ = ["Job", "check_kinds", "image_id"]

RULES = 2  # raise it when the same input gives other files


@dataclass(frozen=True, kw_only=True)
class Job:
    """``kept`` is the type in which [0, 1] is stored; ``derive``, which truths are derived from masks and header."""

    preprocess: Preprocess
    kept: Kept = "uint8"
    derive: tuple[str, ...] = KINDS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kept not in get_args(Kept):
            raise ValueError(f"kept={self.kept!r} is none of {', '.join(get_args(Kept))}")
        check_kinds(self.derive)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in ``store.json``."""
        return {
            "format": FORMAT,
            "rules": RULES,
            "preprocess": self.preprocess.to_dict(),
            "kept": self.kept,
            "derive": list(self.derive),
            "seed": self.seed,
        }

    def fingerprint(self, entry: Entry) -> str:
        """Changes whenever the settings, the entry's files or its own drafts do."""
        files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in entry.files if path.exists()]
        said = [dataclasses.asdict(draft) for draft in entry.drafts]
        named = [entry.dataset, entry.license, entry.image_id, entry.patient_id, entry.split]
        whole = [self.to_dict(), named, entry.derive, files, said, _plain(entry.read)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def check_kinds(derive: object) -> tuple[str, ...]:
    """The kinds of derived truth that a config asks for.

    Raises:
        ValueError: It is no list of known kinds.
    """
    if not isinstance(derive, (list, tuple)):
        raise ValueError(f"derive: {derive!r} is no list; write [{', '.join(KINDS)}], or [] for none")
    unknown = [str(kind) for kind in derive if kind not in KINDS]
    if unknown:
        raise ValueError(f"derive: {', '.join(unknown)} cannot be derived; known: {', '.join(KINDS)}")
    return tuple(derive)


def _plain(value: object) -> object:
    """What a reader was told, without the places of files: a data set that has moved is still the same."""
    if isinstance(value, partial):
        return [value.func.__qualname__, _plain(value.args), _plain(value.keywords)]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value):
        return {name: _plain(one) for name, one in vars(value).items() if name != "root"}
    return getattr(value, "__qualname__", str(value))


def image_id(entry: Entry) -> str:
    """``<data set>/<image>``, safe as a path on every system; unique within a store."""
    dataset = re.sub(r"[^a-z0-9]+", "-", entry.dataset.lower()).strip("-")
    image = re.sub(r"[^A-Za-z0-9._-]+", "_", entry.image_id).strip("._")
    if not dataset or not image:
        raise ValueError(f"{entry.dataset!r}/{entry.image_id!r}: nothing in it can be a file's name")
    return f"{dataset}/{image}"
