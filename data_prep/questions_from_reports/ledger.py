"""Files that only grow, one whole line at a time, so that a job killed at any moment goes on where it was.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["AppendLog", "Prices", "Spending"]

log = logging.getLogger(__name__)


class AppendLog:
    """A file of JSON lines: read whole when it is opened, then only appended to.

    A last line that a kill left without its end is cut off. The file is locked as long as it is open, where the system
    can: two jobs that append to one file would pay twice for the same answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open(path)
        try:
            _lock(self._file, path)
            self.rows = self._recover()
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line so that it outlives a crash of the machine, not only of the program."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget every line."""
        self._file.seek(0)
        self._file.truncate(0)
        self.rows = []

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _recover(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: the last line was not finished; it is dropped and done again", self.path)
            self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        rows = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}:{number}: not a JSON object; restore the file or remove that line")
            rows.append(row)
        return rows


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a million tokens cost, in whatever currency."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(price) and price >= 0 for price in (self.prompt, self.completion)):
            raise ValueError(f"prices={self.prompt},{self.completion} must be two numbers that are not negative")

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of one call."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Spending:
    """The sums of a ledger of calls. ``cost`` is None where no call had a price."""

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cost: float | None = None

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Add up the lines of a ledger."""
        spending = cls()
        for row in rows:
            spending.add(row)
        return spending

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one call; a call that failed, or whose server told no tokens, has none."""
        self.calls += 1
        if row["outcome"] not in ("answer", "refusal"):
            self.failed += 1
            return
        if row["prompt_tokens"] is None or row["completion_tokens"] is None:
            self.unmetered += 1
            return
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        if row["cost"] is not None:
            self.cost = (self.cost or 0.0) + row["cost"]


def _open(path: Path) -> BufferedRandom:
    path.touch()
    return path.open("r+b")


def _lock(file: BufferedRandom, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{path}: another job is writing to it; wait for its end or use another folder") from None
