"""Scores that a judge gave, kept by content, so that no run asks again what any run has asked.

References and answers are kept as a hash only; what the judge replied is kept as it is, in a file for its owner alone.
"""

import json
import logging
from pathlib import Path
from typing import Any

from m3d.bench.judge_row import Verdict

__all__ = ["VerdictCache"]

log = logging.getLogger(__name__)
FILE = "judge.jsonl"


class VerdictCache:
    """A file of verdicts in ``folder``; several jobs may read it and append to it at the same time.

    Each line is written at once, so jobs do not mix theirs; a line that a kill cut short is passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)
        content = self.path.read_bytes()
        self._cut = bool(content) and not content.endswith(b"\n")
        self._known = {key: verdict for line in content.splitlines() for key, verdict in self._read(line)}

    def get(self, key: str) -> Verdict | None:
        """The verdict on a content, without what it once took; None where nobody asked."""
        return self._known.get(key)

    def put(self, key: str, verdict: Verdict, *, model: str) -> None:
        """Keep a score. A refusal is not kept: another run may have better luck."""
        if verdict.score is None:
            return
        line = json.dumps({"key": key, "score": verdict.score, "raw": verdict.raw, "model": model}, ensure_ascii=False)
        with self.path.open("ab", buffering=0) as file:
            file.write(b"\n" * self._cut + line.encode() + b"\n")
        self._cut = False
        self._known[key] = Verdict(score=verdict.score, raw=verdict.raw)

    def _read(self, line: bytes) -> list[tuple[str, Verdict]]:
        """The verdict in a line; none where the line is broken."""
        try:
            row: Any = json.loads(line)
            key, score, raw = str(row["key"]), float(row["score"]), str(row["raw"])
        except (ValueError, TypeError, LookupError):
            log.info("%s: a broken line is passed over", self.path)
            return []
        return [(key, Verdict(score=score, raw=raw))] if 0 <= score <= 100 else []
