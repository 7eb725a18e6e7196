"""Where the work of a preparation is done: in this process, in others on this machine, or on a Ray cluster.

All give the same files: a runner only maps a function over entries, each of which writes its own.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep.prepare.job import image_id
from data_prep.prepare.one import Outcome
from data_prep.sources.base import Entry

__all__ = ["Local", "RayCluster", "Runner"]

Work = Callable[[Entry], Outcome]


class Runner(Protocol):
    """Does the work on every entry; outcomes come in any order."""

    def map(self, work: Work, entries: Sequence[Entry]) -> Iterator[Outcome]:
        """The outcome of each entry, as it comes."""


@dataclass(frozen=True)
class Local:
    """So many processes of this machine; 0 works in this one."""

    workers: int = 0

    def map(self, work: Work, entries: Sequence[Entry]) -> Iterator[Outcome]:
        """The outcome of each entry; one that kills its process (out of memory, say) has an outcome too."""
        if self.workers < 1:
            yield from map(work, entries)
            return
        waiting = deque(entries)
        while waiting:
            begun: list[Entry] = []
            yield from _pooled(work, waiting, begun, self.workers)
            for suspect in begun:  # at work when a process died: each is tried again in a process of its own
                alone, dead = deque([suspect]), list[Entry]()
                yield from _pooled(work, alone, dead, 1)
                yield from map(_killed, dead)


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster (extra ``scale``); ``address`` None starts one on this machine, "auto" joins a running one.

    Every node must see the scans and the store under the same paths.
    """

    address: str | None = None
    workers: int = 2

    def map(self, work: Work, entries: Sequence[Entry]) -> Iterator[Outcome]:
        """The outcome of each entry, through ``ray.data``."""
        try:
            import ray
            import ray.data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Ray is needed here: pip install 'm3d-lamed[scale]'") from error
        started = not ray.is_initialized()
        if started:
            local: dict[str, Any] = {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, **({} if self.address else local))
        try:
            rows = ray.data.from_items([{"number": number} for number in range(len(entries))])
            done = rows.map(
                _Worker,  # type: ignore[arg-type]  # Ray makes one a process
                fn_constructor_args=(work, list(entries)),
                concurrency=self.workers,
            )
            for row in done.iter_rows():
                yield Outcome(**{**row, "files": tuple(row["files"])})
        finally:
            if started:
                ray.shutdown()


class _Worker:
    """One of the cluster's processes: it has the list, and is told numbers."""

    def __init__(self, work: Work, entries: Sequence[Entry]) -> None:
        self.work, self.entries = work, entries

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        outcome = self.work(self.entries[row["number"]])
        return {**vars(outcome), "files": list(outcome.files)}


def _pooled(work: Work, waiting: deque[Entry], begun: list[Entry], workers: int) -> Iterator[Outcome]:
    """Work off ``waiting`` until it is empty or a process dies; ``begun`` then holds what was being worked on."""
    running: dict[Future[Outcome], Entry] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    entry = waiting.popleft()
                    running[pool.submit(work, entry)] = entry
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    del running[future]
                    yield outcome
        except BrokenProcessPool:
            begun += list(running.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _killed(entry: Entry) -> Outcome:
    files = tuple(str(path) for path in entry.files)
    why = "the process that prepared it was killed, probably for want of memory; use fewer workers or a larger machine"
    return Outcome(image_id=image_id(entry), files=files, error="Killed", reason=why)
