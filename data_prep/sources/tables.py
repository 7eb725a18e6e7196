"""The tables that data sets come with, CSV and JSON: read whole, so that what is wrong is said with its file and row.

Part of m3d-lamed; import through `m3d`.

Rows are counted as a spreadsheet shows them: the header is row 1. A quoted line break does not start a row.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

__all__ = ["BadTable", "OnBadRow", "at_row", "read_csv", "read_json", "settle_rows"]

OnBadRow = Literal["error", "skip"]

logger = logging.getLogger(__name__)

_LONGEST_CELL = 2**24  # a report may be longer than the 128 KiB that csv allows by itself


class BadTable(ValueError):
    """A table that cannot be used as it is; the message names the file, the row and the remedy."""


def at_row(path: Path, row: int) -> str:
    """How a place in a table is written in errors."""
    return f"{path}, row {row}"


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Every row of a CSV file with its number, cells stripped; all columns are handed on, ``columns`` must be there.

    The file is UTF-8, with or without a byte order mark, or UTF-16 with one. Rows are read one at a time; blank ones
    are counted and left out.

    Raises:
        FileNotFoundError: There is no such file.
        BadTable: It is empty, not text, lacks a column, or a row has another number of cells.
    """
    encoding = _encoding(path)
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [cell.strip() for cell in next(rows, [])]
            _check_header(path, header, columns)
            yield from _rows(path, header, rows)
        except csv.Error as error:
            raise BadTable(f"{path}, near line {rows.line_num}: {error}; is a double quote left open?") from error
        except UnicodeError as error:
            raise BadTable(_not_text(path, encoding, f"near line {rows.line_num + 1}")) from error


def read_json(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: There is no such file.
        BadTable: It is not text, or not JSON.
    """
    encoding = _encoding(path)
    try:
        with path.open(encoding=encoding) as file:
            return _parse(path, file)
    except UnicodeError as error:
        raise BadTable(_not_text(path, encoding, "somewhere")) from error


def settle_rows(source: str, rejected: Sequence[str], *, on_bad_row: str) -> None:
    """Say which rows cannot be used (``file, row: why``): as an error, or as a warning where they may be skipped.

    Raises:
        BadTable: There are such rows, and ``on_bad_row`` is not ``skip``.
    """
    if not rejected:
        return
    more = f" (and {len(rejected) - 3} more)" if len(rejected) > 3 else ""
    said = f"{source}: {len(rejected)} rows cannot be used: {'; '.join(rejected[:3])}{more}"
    if on_bad_row != "skip":
        raise BadTable(f"{said}; correct them, or set on_bad_row: skip to go on without them")
    logger.warning("%s; they are left out", said)


def _parse(path: Path, file: TextIO) -> object:
    try:
        held: object = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadTable(f"{path}{line}: not JSON; was the download cut short?") from error
    return held


def _rows(path: Path, header: list[str], rows: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    found = False
    for number, cells in enumerate(rows, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise BadTable(
                f"{at_row(path, number)}: {len(cells)} cells under {len(header)} columns; "
                "put texts that hold commas in double quotes"
            )
        found = True
        yield number, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    if not found:
        raise BadTable(f"{path}: the table has a header and no rows; was the download cut short?")


def _encoding(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{_neighbour(path)}")
    with path.open("rb") as file:
        head = file.read(200)
    if not head.strip():
        raise BadTable(f"{path}: the file is empty; download it again")
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise BadTable(f"{path}: this is a compressed file or a spreadsheet; unpack it, or save it as CSV")
    if head.startswith(b"version https://git-lfs"):
        raise BadTable(f"{path}: this is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def _not_text(path: Path, encoding: str, where: str) -> str:
    return f"{path}, {where}: a byte that is not {encoding.removesuffix('-sig').upper()} text; save the file as UTF-8"


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor its folder {path.parent.name!r}); check the path"
    near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.iterdir()), n=1)
    return f"; did you mean {near[0]!r}?" if near else "; check the path"


def _check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise BadTable(f"{path}: the column {twice[0]!r} is there twice; rename one")
    lower = {name.lower(): name for name in header}
    for name in columns:
        if name not in header:
            close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
            hint = f"did you mean {lower[close[0]]!r}? rename it" if close else f"there are: {', '.join(header)}"
            raise BadTable(f"{path}: no column {name!r}; {hint}")
