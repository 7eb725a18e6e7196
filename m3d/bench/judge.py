"""How much of the truth an answer holds, from 0 to 100, as a language model judges it (arXiv 2404.00578, figure 5).

``judge.jsonl`` has a line a sample and is all that a rerun needs; ``judge_ledger.jsonl`` a line a call; ``judge.json``
what came of it.
"""

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.atomic import atomic_path
from data_prep.questions_from_reports.asking import Asker, Patience, Unreached
from data_prep.questions_from_reports.endpoints import AskedTooMuch, Endpoint, EndpointError, Reply
from data_prep.questions_from_reports.ledger import AppendLog, Prices, Spending
from m3d.bench.judge_cache import VerdictCache
from m3d.bench.judge_row import TEXT_TASKS, Answer, Verdict, read_answers, verdict_row, warn_of_others
from m3d.bench.judge_summary import ROWS, SUMMARY, summarise
from m3d.bench.judge_words import PROMPT_SHA256, NoScore, ask_again, ask_for_score, read_score

__all__ = ["Judging", "judge"]

LEDGER = "judge_ledger.jsonl"
DOWN_AFTER = 5  # contents in a row that could not be judged because nobody answered
Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How answers are judged. ``out`` is the folder of the results (the run's own), ``cache`` that of all verdicts."""

    tasks: Sequence[str] = TEXT_TASKS
    out: Path | None = None
    cache: Path | None = None
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


def judge(folder: Path, *, endpoint: Endpoint, job: Judging | None = None, tell: Tell | None = None) -> dict[str, Any]:
    """Judge what is not judged yet; ``tell`` hears how many of how many are. Gives what ``judge.json`` then holds.

    What was finished stays finished, whatever ends the run; the next run asks for the rest only.

    Raises:
        FileNotFoundError: The folder is not scored yet.
        ValueError: The folder is judged by another model or with other prompts.
        EndpointError: The endpoint cannot be used, or stopped answering.
    """
    job = job or Judging()
    began, out = time.monotonic(), job.out or folder
    everything = read_answers(folder, job.tasks)
    warn_of_others(folder, job.tasks, everything)
    chosen = [one for one in everything if one.task in job.tasks][: job.limit]
    with AppendLog(out / ROWS) as rows, AppendLog(out / LEDGER) as ledger:
        if job.restart:
            rows.clear()
            ledger.clear()
        _agree(out / ROWS, rows.rows, endpoint)
        run = _Run(chosen, rows=rows, ledger=ledger, endpoint=endpoint, job=job, tell=tell)
        try:
            asyncio.run(run())
        finally:
            kept = [row for one in everything if (row := run.judged(one)) is not None]
            _write_rows(out / ROWS, kept)
    summary = {
        **summarise(kept, model=endpoint.model, kind=endpoint.kind),
        "unjudged": sum(one.task in job.tasks and run.judged(one) is None for one in everything),
        "unreached": run.unreached,
        "spent": _spent(run.spending, job.prices),
        "seconds": round(time.monotonic() - began, 3),
    }
    with atomic_path(out / SUMMARY) as temporary:
        content = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(f"{content}\n", encoding="utf-8")
    return summary


def _agree(path: Path, rows: Sequence[Mapping[str, Any]], endpoint: Endpoint) -> None:
    """Scores of two judges are not mixed in one file."""
    for row in rows:
        if row.get("model") != endpoint.model:
            other = f"by {row.get('model')!r}, not {endpoint.model!r}"
        elif row.get("prompt_sha256") != PROMPT_SHA256:
            other = "with other prompts than today's"
        else:
            continue
        raise ValueError(f"{path} was judged {other}; use --out for a second judge, or --force to start over")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a sample, in the samples' order, however often the job was stopped."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows)


def _spent(spending: Spending, prices: Prices | None) -> dict[str, Any]:
    cost = None if prices is None else prices.of(spending.prompt_tokens, spending.completion_tokens)
    return {
        "calls": spending.calls,
        "failed_calls": spending.failed,
        "unmetered_calls": spending.unmetered,
        "prompt_tokens": spending.prompt_tokens,
        "completion_tokens": spending.completion_tokens,
        "price_in": None if prices is None else prices.prompt,
        "price_out": None if prices is None else prices.completion,
        "cost": cost,
    }


class _Run:
    """One run: every content is asked once, however many samples share it."""

    def __init__(
        self,
        samples: Sequence[Answer],
        *,
        rows: AppendLog,
        ledger: AppendLog,
        endpoint: Endpoint,
        job: Judging,
        tell: Tell | None,
    ) -> None:
        self.samples, self.rows, self.endpoint, self.job = samples, rows, endpoint, job
        self.tell = tell or (lambda done, total: None)
        self.spending = Spending.of(ledger.rows)
        self.asker = Asker(endpoint, ledger, job.patience, job.prices, spending=self.spending)
        self.cache = None if job.cache is None else VerdictCache(job.cache)
        self.unreached: dict[str, str] = {}
        self._rows = {(row.get("id"), row.get("sight")): row for row in rows.rows}
        self._finished, self._silent = 0, 0

    def judged(self, one: Answer) -> dict[str, Any] | None:
        """What came of a sample; None where it, or its present texts, were not judged yet."""
        row = self._rows.get(one.name)
        return row if row is not None and row.get("key") == self._key(one) else None

    async def __call__(self) -> None:
        """Judge what is not, so many contents at a time."""
        waiting = self._answer_what_is_known()
        places = asyncio.Semaphore(self.job.concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for key, alike in waiting.items():
                    await places.acquire()
                    task = group.create_task(self._ask(key, alike))
                    task.add_done_callback(lambda _: places.release())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            with contextlib.suppress(RuntimeError):  # a loop that is being torn down
                await self.endpoint.close()

    def _answer_what_is_known(self) -> dict[str, list[Answer]]:
        """Judge what needs no asking; the rest by content."""
        waiting: dict[str, list[Answer]] = defaultdict(list)
        for one in self.samples:
            key = self._key(one)
            if self.judged(one) is not None:
                self._finished += 1
            elif not one.answer:
                self._keep(one, Verdict(score=0.0), key=key, source="empty")
            elif self.cache is not None and (known := self.cache.get(key)) is not None:
                self._keep(one, known, key=key, source="cache")
            else:
                waiting[key].append(one)
        self.tell(self._finished, len(self.samples))
        return waiting

    async def _ask(self, key: str, alike: Sequence[Answer]) -> None:
        first, *others = alike
        try:
            verdict = await self._verdict(first)
        except Unreached as error:
            self._missed(alike, str(error))
            return
        self._silent = 0
        if self.cache is not None:
            self.cache.put(key, verdict, model=self.endpoint.model)
        self._keep(first, verdict, key=key, source="asked")
        for one in others:
            self._keep(one, Verdict(score=verdict.score, raw=verdict.raw), key=key, source="cache")

    async def _verdict(self, one: Answer) -> Verdict:
        """Ask until a reply holds a score; what was wrong is told with each further try, which has another seed."""
        messages, replies = ask_for_score(one.reference, one.answer), list[Reply]()
        for attempt in range(self.job.reasks + 1):
            try:
                reply = await self.asker.ask(messages, report=one.id, stage="judge", seed=self.job.seed + attempt)
            except AskedTooMuch as error:
                return _verdict(None, f"refusal: {error}", replies)
            replies.append(reply)
            try:
                return _verdict(read_score("" if reply.refused else reply.text), reply.text, replies)
            except NoScore as error:
                messages = ask_again(messages, reply.text, str(error))
        return _verdict(None, f"refusal: {reply.refused}" if reply.refused else reply.text, replies)

    def _keep(self, one: Answer, verdict: Verdict, *, key: str, source: str) -> None:
        row = verdict_row(one, verdict, model=self.endpoint.model, key=key, source=source)
        self.rows.append(row)
        self._rows[one.name] = row
        self._finished += 1
        self.tell(self._finished, len(self.samples))

    def _missed(self, alike: Sequence[Answer], reason: str) -> None:
        self.unreached |= {f"{one.id} ({one.sight})": reason for one in alike}
        self._silent += 1
        if self._silent >= DOWN_AFTER:
            raise EndpointError(
                f"{self.endpoint.model} could not be reached {DOWN_AFTER} times in a row ({reason}); see to the "
                "endpoint and run again: what is judged is kept"
            )

    def _key(self, one: Answer) -> str:
        return one.key(f"{self.endpoint.kind}/{self.endpoint.model}")


def _verdict(score: float | None, raw: str, replies: Sequence[Reply]) -> Verdict:
    return Verdict(
        score=score,
        raw=raw,
        attempts=len(replies),
        prompt_tokens=_total([reply.prompt_tokens for reply in replies]),
        completion_tokens=_total([reply.completion_tokens for reply in replies]),
    )


def _total(tokens: Sequence[int | None]) -> int | None:
    counted = [number for number in tokens if number is not None]
    return sum(counted) if len(counted) == len(tokens) else None
