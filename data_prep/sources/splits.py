"""Which part of the data an image belongs to, where its data set does not say: by patient, the same on every machine.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from data_prep.sources.base import SPLITS, Entry

__all__ = ["DEFAULT_SHARES", "check_patients", "check_shares", "split_by_hash", "split_named"]

DEFAULT_SHARES: Mapping[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
_WORDS = {
    "train": ("train", "training", "tr", "trn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "ts", "te", "tst"),
}
_NAMED = {word: split for split, words in _WORDS.items() for word in words}


def check_shares(shares: Mapping[str, float], where: str) -> None:
    """Refuse shares that are not of our splits or do not add up to 1."""
    unknown = sorted(set(shares) - set(SPLITS))
    if unknown:
        raise ValueError(f"{where}: split has no {unknown[0]!r}; its shares are of {', '.join(SPLITS)}")
    if any(share < 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"{where}: the shares of split must add up to 1, got {dict(shares)}")


def split_by_hash(patient_id: str, shares: Mapping[str, float]) -> str:
    """The split of a patient: its hash, as a fraction, falls into one of the shares laid end to end.

    It depends on the patient alone, so more patients move nobody.
    """
    at = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8]) / 2**64
    end = 0.0
    for split in SPLITS:
        end += shares.get(split, 0.0)
        if at < end:
            return split
    return next(split for split in reversed(SPLITS) if shares.get(split, 0.0) > 0)  # sums fall short by rounding


def split_named(word: str, where: str) -> str:
    """What a data set calls a split ("val", "imagesTs"...), in our words."""
    split = _NAMED.get(word.strip().lower())
    if split is None:
        raise ValueError(f"{where}: split {word!r} is not known; write train, validation or test")
    return split


def check_patients(entries: Iterable[Entry], where: str) -> None:
    """Refuse a patient who is in two splits."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(f"{entry.dataset}/{entry.patient_id}", entry)
        if first.split != entry.split:
            raise ValueError(
                f"{where}: patient {entry.patient_id} is in {first.split} ({first.image_id}) and in {entry.split} "
                f"({entry.image_id}); put all scans of a patient into one split"
            )
