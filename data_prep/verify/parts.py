"""The store's indexes against its parts, of which they were made: records that were lost or altered since, images too.

A part is written last, when an image is whole; ``records.jsonl`` and ``images.jsonl`` hold what the parts hold, so that
a difference means that someone, or a disk, has changed one of them.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.verify.findings import Finding
from data_prep.verify.folder import TEMPORARY
from data_prep.verify.gather import Gathered, digest

__all__ = ["check_parts"]

FOLDER, RECORDS, INDEX = "parts", "records.jsonl", "images.jsonl"
_AGAIN = "run the same `m3d data prepare` again"
Lines = Mapping[str, tuple[int, int]]


def check_parts(root: Path, gathered: Gathered) -> Iterator[Finding]:
    """Every image of the index with its part, then the parts that no image of the index has."""
    for image_id, row in gathered.rows.items():
        inside = f"{FOLDER}/{image_id}.json"
        try:
            part = json.loads((root / inside).read_text(encoding="utf-8"))
            image, records = dict(part["image"]), {str(record["id"]): record for record in part["records"]}
        except FileNotFoundError:
            yield _error(INDEX, f"image {image_id!r} has no part {inside}; {_AGAIN}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield _error(inside, f"cannot be used ({error or type(error).__name__}); delete it and {_AGAIN}")
        else:
            yield from _check_row(inside, row, image)
            yield from _check_records(inside, image_id, gathered.lines.get(image_id, {}), records)
    for path in sorted((root / FOLDER).rglob("*.json")):
        inside = path.relative_to(root / FOLDER).as_posix()
        if inside.removesuffix(".json") not in gathered.rows and not TEMPORARY.fullmatch(path.name):
            message = f"{INDEX} has no such image; {_AGAIN}, or delete the part if its source no longer lists it"
            yield _error(f"{FOLDER}/{inside}", message)


def _check_row(inside: str, row: Mapping[str, int], image: Mapping[str, Any]) -> Iterator[Finding]:
    differing = [key for key in {**row, **image} if key not in image or row.get(key) != digest(image[key])]
    if differing:
        yield _error(inside, f"{INDEX} says something else in {', '.join(differing)}; {_AGAIN}")


def _check_records(inside: str, image_id: str, lines: Lines, records: Mapping[str, Any]) -> Iterator[Finding]:
    """One finding each for what is lost, what was added and what was altered."""
    lost = [identity for identity in records if identity not in lines]
    if lost:
        message = f"{len(lost)} of its {len(records)} records are not in {RECORDS}, such as {lost[0]!r}; {_AGAIN}"
        yield _error(inside, message)
    added = [identity for identity in lines if identity not in records]
    if added:
        message = f"{len(added)} records of image {image_id!r} are not in {inside}, such as {added[0]!r}; {_AGAIN}"
        yield _error(f"{RECORDS}:{lines[added[0]][0]}", message)
    altered = [one for one, (_, said) in lines.items() if one in records and digest(records[one]) != said]
    if altered:
        message = f"{len(altered)} records of image {image_id!r} differ from {inside}, such as {altered[0]!r}; {_AGAIN}"
        yield _error(f"{RECORDS}:{lines[altered[0]][0]}", message)


def _error(where: str, message: str) -> Finding:
    return Finding("error", "parts", where, message)
