"""Patterns of paths whose wildcards are remembered: what `*` stood for is the id of a scan, and finds its masks.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.label_files import stem_of

__all__ = ["Found", "fill", "find_scans", "natural_order"]

_PARTS = re.compile(r"(\*\*/|\*|\?|\[[^\]]+\])")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A path below the root, and what the wildcards stood for, as ``{id}``, ``{1}``, ``{2}``..."""

    path: Path
    relative: str
    id: str
    fields: Mapping[str, str]


def find_scans(root: Path, pattern: str) -> Iterator[Found]:
    """Files and folders that match, in natural order.

    The id is what the wildcards stood for, joined by ``_``: ``*/ct.nii.gz`` calls ``s01/ct.nii.gz`` "s01". Without
    wildcards it is the file's name. What cannot stand in an id becomes ``_``.
    """
    if pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
        raise ValueError(f"the pattern {pattern!r} must stay below root={root}; set root to the folder above")
    known = re.compile("".join(_as_regex(part) for part in _PARTS.split(pattern)))
    for path in sorted(set(root.glob(pattern)), key=lambda path: natural_order(path.relative_to(root).as_posix())):
        relative = path.relative_to(root).as_posix()
        match = known.fullmatch(relative)
        if match is None or any(part.startswith(".") for part in Path(relative).parts):
            continue
        end = len(relative) - len(path.name) + len(stem_of(path))  # `*.nii*` finds the suffix too: no part of an id
        spans = [match.span(number + 1) for number in range(len(match.groups()))]
        words = [relative[first : min(last, end)] if first >= 0 else "" for first, last in spans]
        raw = "_".join(word.strip("/").replace("/", "_") for word in words if word) or stem_of(path)
        fields = {str(number): word for number, word in enumerate(words, start=1)}
        name = re.sub(r"[^\w.-]+", "_", raw)
        yield Found(
            path=path, relative=relative, id=name, fields={"id": words[0] if len(words) == 1 else raw, **fields}
        )


def fill(pattern: str, fields: Mapping[str, str], *, other: Callable[[str], str] | None = None, what: str = "") -> str:
    """``pattern`` with its ``{id}``, ``{1}``... filled in; ``other`` says what becomes of names that are not there."""

    def word(match: re.Match[str]) -> str:
        name = match[1]
        if name in fields:
            return fields[name]
        if other is not None:
            return other(name)
        known = ", ".join(f"{{{one}}}" for one in fields)
        raise ValueError(f"{what} {pattern!r}: {{{name}}} is not known; known: {known}")

    return _FIELD.sub(word, pattern)


def natural_order(text: str) -> list[Any]:
    """Sort key that counts: ``pt_9`` before ``pt_10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _as_regex(part: str) -> str:
    if part == "**/":
        return r"(?:(.*)/)?"
    if part == "*":
        return r"([^/]*)"
    if part == "?":
        return r"([^/])"
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        return f"([{'^' if part[1] == '!' else ''}{part[1:-1].removeprefix('!')}])"
    return re.escape(part)
