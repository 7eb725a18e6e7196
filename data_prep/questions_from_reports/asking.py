"""Ask an endpoint until it answers: waits that grow, waits that the server asked for, and a line in the ledger a call.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.questions_from_reports.endpoints import AskedTooMuch, Endpoint, EndpointError, Reply, TryAgain
from data_prep.questions_from_reports.ledger import AppendLog, Prices, Spending

__all__ = ["Asker", "Patience", "Unreached"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often to ask again and how long to wait (seconds) between; a server that asks for more is left alone."""

    retries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_told: float = 600.0

    def __post_init__(self) -> None:
        if self.retries < 0 or min(self.first_wait, self.longest_wait, self.longest_told) < 0:
            raise ValueError(f"retries={self.retries} and the waits must not be negative")

    def wait(self, attempt: int) -> float:
        """Before attempt number ``attempt`` + 1: doubled each time, and never the same for all who wait."""
        return min(self.longest_wait, self.first_wait * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


class Unreached(Exception):
    """An endpoint did not answer however often it was asked; a later run may have better luck."""


@dataclass
class Asker:
    """One endpoint as many reports share it: when it asks one of them to wait, all do."""

    endpoint: Endpoint
    ledger: AppendLog
    patience: Patience = field(default_factory=Patience)
    prices: Prices | None = None
    spending: Spending = field(default_factory=Spending)
    _free_at: float = 0.0

    async def ask(self, messages: Sequence[Mapping[str, str]], *, report: str, stage: str, seed: int) -> Reply:
        """The reply to a conversation.

        Raises:
            Unreached: No attempt was answered.
            AskedTooMuch, EndpointError: As the endpoint says; asking again is of no use.
        """
        reason = ""
        for attempt in range(self.patience.retries + 1):
            await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            began = time.monotonic()
            try:
                reply = await self.endpoint.chat(messages, seed=seed)
            except TryAgain as error:
                reason = str(error)
                self._note(report, stage, attempt, reason, began)
                await self._rest(error, attempt)
                continue
            except (AskedTooMuch, EndpointError) as error:
                self._note(report, stage, attempt, type(error).__name__, began)
                raise
            self._note(report, stage, attempt, "answer" if reply.refused is None else "refusal", began, reply)
            return reply
        raise Unreached(f"no answer in {self.patience.retries + 1} attempts, at last: {reason}")

    async def _rest(self, error: TryAgain, attempt: int) -> None:
        if error.wait is not None and error.wait > self.patience.longest_told:
            raise EndpointError(f"the endpoint asks to wait {error.wait:.0f} s ({error}); run again later to go on")
        if attempt == self.patience.retries:
            return
        wait = self.patience.wait(attempt)
        if error.wait is not None:
            wait = max(wait, error.wait)
            self._free_at = max(self._free_at, time.monotonic() + error.wait)
        log.info("%s; asking again in %.1f s", error, wait)
        await asyncio.sleep(wait)

    def _note(
        self, report: str, stage: str, attempt: int, outcome: str, began: float, reply: Reply | None = None
    ) -> None:
        """A line a call: who asked and what it took, never what was said."""
        used = (None, None) if reply is None else (reply.prompt_tokens, reply.completion_tokens)
        cost = None
        if self.prices is not None and used[0] is not None and used[1] is not None:
            cost = self.prices.of(used[0], used[1])
        row = {
            "report_id": report,
            "stage": stage,
            "attempt": attempt + 1,
            "outcome": outcome,
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "cost": cost,
            "seconds": round(time.monotonic() - began, 3),
        }
        self.ledger.append(row)
        self.spending.add(row)
