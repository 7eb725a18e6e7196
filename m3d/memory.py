"""How much memory a program may still take: what the machine has free, or less where a container is given less."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

__all__ = ["available_memory"]

ROOT = Path("/sys/fs/cgroup")
FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of control groups, of version 2 and of version 1."""


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be taken without swapping; a control group's file cache counts as free."""
    free = int(psutil.virtual_memory().available)
    for limit, used in FILES:
        most, taken = _number(root / limit), _number(root / used)
        if most is not None and taken is not None:
            free = min(free, most - taken + _cache((root / limit).parent / "memory.stat"))
    return max(free, 0)


def _number(path: Path) -> int | None:
    """A limit; None where there is no such file, or no limit."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # version 2 writes "max"
        return None


def _cache(path: Path) -> int:
    """Bytes of files that the kernel may drop."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = dict(line.rsplit(" ", 1) for line in lines if " " in line)
    return int(found.get("total_inactive_file", found.get("inactive_file", "0")))
