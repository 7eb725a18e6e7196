"""The job: many reports at once through the pipeline, each finished one kept at once, the rest left for the next run.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.questions_from_reports.asking import Asker, Patience, Unreached
from data_prep.questions_from_reports.endpoints import Endpoint, EndpointError
from data_prep.questions_from_reports.ledger import Prices, Spending
from data_prep.questions_from_reports.pipeline import Pipeline
from data_prep.questions_from_reports.progress import Folder, Summary, export, question_row
from data_prep.questions_from_reports.prompts import Prompts, load_prompts
from data_prep.questions_from_reports.reports import Report

__all__ = ["METHOD", "Job", "write_questions"]

METHOD = "llm-vqa/1"
Tell = Callable[[Summary], None]
DOWN_AFTER = 5  # reports in a row that could not be reached


@dataclass(frozen=True, kw_only=True)
class Job:
    """How questions are written; the first block is what the answers depend on and is kept with them."""

    prompts: Prompts = field(default_factory=load_prompts)
    seed: int = 0
    reasks: int = 2

    concurrency: int = 8
    patience: Patience = field(default_factory=Patience)
    prices: Prices | None = None
    limit: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.reasks < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"concurrency={self.concurrency}, limit={self.limit}, reasks={self.reasks}: the first two begin at 1, "
                "the last at 0"
            )

    def settings(self, endpoint: Endpoint) -> dict[str, Any]:
        """What would make two runs differ."""
        return {
            "method": METHOD,
            "generator": endpoint.model,
            "reached": endpoint.kind,
            "prompt_version": self.prompts.version,
            "template_sha256": self.prompts.sha256,
            "seed": self.seed,
            "reasks": self.reasks,
        }


def write_questions(
    reports: Sequence[Report],
    out: Path,
    *,
    endpoint: Endpoint,
    job: Job | None = None,
    tell: Tell | None = None,
) -> Summary:
    """Write questions for every report that ``out`` does not hold yet; ``tell`` hears of each finished one.

    Whatever ends the run, a full folder of what is finished is left behind, and the next run asks for the rest only.

    Raises:
        ValueError: The folder holds questions of another model, wording or seed.
        EndpointError: The endpoint cannot be used, or stopped answering.
    """
    job = job or Job()
    names = [report.id for report in reports]
    if len(set(names)) != len(names):
        raise ValueError(f"{len(names) - len(set(names))} reports share an id; each needs its own")
    with Folder(out, settings=job.settings(endpoint), restart=job.restart) as folder:
        run = _Run(reports=reports, folder=folder, endpoint=endpoint, job=job, tell=tell or (lambda summary: None))
        try:
            asyncio.run(run())
        finally:
            export(out, run.finished())
        return run.summary


class _Run:
    """One run of a job; the summary counts what earlier runs finished as well."""

    def __init__(
        self,
        *,
        reports: Sequence[Report],
        folder: Folder,
        endpoint: Endpoint,
        job: Job,
        tell: Tell,
    ) -> None:
        self.reports, self.folder, self.endpoint, self.job, self.tell = reports, folder, endpoint, job, tell
        self.asker = Asker(endpoint, folder.ledger, job.patience, job.prices, spending=Spending.of(folder.ledger.rows))
        self.pipeline = Pipeline(asker=self.asker, prompts=job.prompts, seed=job.seed, reasks=job.reasks)
        self.provenance = {
            "method": METHOD,
            "generator": endpoint.model,
            "reached": endpoint.kind,
            "prompt_version": job.prompts.version,
            "template_sha256": job.prompts.sha256,
            "seed": job.seed,
        }
        self.summary = Summary(reports=len(reports), spending=self.asker.spending)
        for row in self.finished():
            self.summary.count(row)
        self._silent = 0

    def finished(self) -> Iterator[dict[str, Any]]:
        """What came of the reports so far, in their order."""
        return (row for report in self.reports if (row := self.folder.finished(report)) is not None)

    async def __call__(self) -> None:
        """Ask about every report that is not finished, so many at a time."""
        places = asyncio.Semaphore(self.job.concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for report in self.reports[: self.job.limit]:
                    if self.folder.finished(report) is None:
                        await places.acquire()
                        task = group.create_task(self._one(report))
                        task.add_done_callback(lambda _: places.release())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            with contextlib.suppress(RuntimeError):  # a loop that is being torn down
                await self.endpoint.close()

    async def _one(self, report: Report) -> None:
        try:
            checked, rejected = await self.pipeline(report)
        except Unreached as error:
            self._missed(report, str(error))
            return
        self._silent = 0
        rows = [question_row(report, one.question, {**self.provenance, "check": one.check}) for one in checked]
        self.folder.finish(report, rows, rejected)
        row = self.folder.finished(report)
        assert row is not None
        self.summary.count(row)
        self.tell(self.summary)

    def _missed(self, report: Report, reason: str) -> None:
        self.summary.unfinished[report.id] = reason
        self.tell(self.summary)
        self._silent += 1
        if self._silent >= DOWN_AFTER:
            raise EndpointError(
                f"{self.endpoint.model} could not be reached for {DOWN_AFTER} reports in a row ({reason}); "
                "see to the endpoint and run again: what is finished is kept"
            )
