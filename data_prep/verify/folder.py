"""What lies in a store's folder beside its data: leftovers of a job that was stopped, and the list of refused scans.

Parts that no image belongs to are lost images, not leftovers: `data_prep.verify.parts` finds them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_prep.verify.findings import Finding

__all__ = ["TEMPORARY", "check_leftovers", "check_rejects", "num_refused"]

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\..+")  # as `data_prep.atomic` names them
_KEPT = ("images", "masks")


def check_leftovers(root: Path, *, known: Collection[str]) -> Iterator[Finding]:
    """Temporary files, and files of images that the index does not have (``known``: paths inside the root)."""
    stray: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            continue
        inside = path.relative_to(root).as_posix()
        if TEMPORARY.fullmatch(path.name):
            message = "is a temporary file of a job that was stopped; delete it once no job writes here"
            yield Finding("warning", "leftovers", inside, message)
        elif (folder := inside.partition("/")[0]) in _KEPT and inside not in known:
            stray[folder] += 1
            first.setdefault(folder, inside)
    for folder, number in stray.items():
        message = f"{number} file(s) under {folder}/ belong to no image of images.jsonl; run `m3d data prepare` again"
        yield Finding("warning", "leftovers", first[folder], message)


def check_rejects(path: Path) -> Iterator[Finding]:
    """How many scans were refused, by reason."""
    if not path.is_file():
        return
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number, row in _rejects(path):
        if row is None:
            yield Finding("warning", "rejects", f"{path.name}:{number}", "is no JSON object; prepare again")
            continue
        text = str(row.get("reason") or row.get("error") or row.get("message") or "no reason given")
        kind = _without_particulars(text)
        reasons[kind] += 1
        examples.setdefault(kind, f"{row.get('image_id') or row.get('file') or f'line {number}'}: {text}")
    for kind, number in reasons.most_common():
        message = f"{number} refused, such as {examples[kind]}; mend the source, then run `m3d data prepare` again"
        yield Finding("warning", "rejects", path.name, message)


def num_refused(path: Path) -> int:
    """How many scans were refused; a record that was dropped from one that was not is none."""
    if not path.is_file():
        return 0
    return sum(row is not None and row.get("what") != "record" for _, row in _rejects(path))


def _rejects(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every line with its number; None where it is no JSON object."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else None


def _without_particulars(text: str) -> str:
    """A reason without paths and numbers, so that equal reasons are counted together."""
    return re.sub(r"\S*/\S*|-?\d[\d.,]*", "*", text)
