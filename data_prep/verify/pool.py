"""Spread work over the cores of this machine, in order.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

__all__ = ["spread"]

WORTH_A_POOL = 64  # below that, starting processes costs more than it saves
Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None) -> Iterator[Result]:
    """The result for each item, in their order; ``workers`` None takes every core once there is enough to do.

    Raises:
        OSError: A process was killed.
    """
    wanted = workers or (_num_cores() if len(items) >= WORTH_A_POOL else 1)
    if wanted == 1:
        yield from map(work, items)
        return
    try:
        with ProcessPoolExecutor(min(wanted, max(len(items), 1)), mp_context=get_context("spawn")) as pool:
            yield from pool.map(work, items, chunksize=max(1, min(16, len(items) // (4 * wanted))))
    except BrokenProcessPool as error:
        raise OSError("a worker was killed, probably for want of memory; use fewer (--workers 1)") from error


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
