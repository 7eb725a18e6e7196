"""What a verification finds, and what each of its checks means.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

__all__ = ["CHECKS", "Finding", "Findings", "Report", "Severity"]

Severity = Literal["error", "warning"]
SCHEMA: Final = "m3d.verify/1"
CHECKS: Mapping[str, str] = {
    "schema": "every line is a valid record (records.jsonl) or image (images.jsonl); all faults of a line are told",
    "content": "there are records, and not every scan was refused",
    "ids": "no two records share an id",
    "repeats": "no record stands under two ids (one that differs in its origin, kind or meta only: a warning)",
    "order": "the entries of an image are consecutive lines (warning)",
    "agreement": "all lines about an image, and images.jsonl, name one patient and the same media",
    "index": "images.jsonl lists the images of the records; one without any record is a warning",
    "parts": "records.jsonl and images.jsonl say of an image what its part (parts/) says, and no image is lost",
    "tasks": "every task is known, and its prompt and answer can be rendered",
    "files": "every image and mask exists and can be read whole; pickles are refused",
    "checksums": "images and masks have the bytes that preparation wrote (sha256 in images.jsonl)",
    "arrays": "shape and number type of the voxels are what the record says",
    "values": "no NaN or infinity, nothing outside 0..1 where the unit is norm01",
    "blank": "no image has one value only; one of 99.9 % background is a warning",
    "labels": "every label in a mask has a name, and records call it by that name",
    "empty": "a structure that a record draws or boxes has voxels; one that is said to be absent has none",
    "boxes": "a box is that of its mask, or of one connected part of it, to less than a voxel",
    "names": "class names are known, no two labels share one, and what is asked for is what the target names",
    "answers": "the answer does not stand in the question or description (in a file's path: a warning)",
    "patients": "no patient and no image is in two splits",
    "volumes": "no two images have the same voxels (within one split: a warning)",
    "reports": "no report stands, as it is or nearly so, in two splits (short or rule-made ones: a warning)",
    "leftovers": "no temporary files, and none that nothing refers to (warning)",
    "rejects": "what preparation refused, by reason (warning)",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; ``where`` is a file with its line, or an image, and ``message`` ends with a remedy."""

    severity: Severity
    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class Findings:
    """Collects findings: counts all, keeps the first ``limit`` of each check; an ``allowed`` check only warns."""

    limit: int = 100
    allowed: Collection[str] = ()
    kept: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, Severity]] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Count it, and keep it while there is room."""
        assert finding.check in CHECKS, finding
        if finding.check in self.allowed:
            finding = Finding("warning", finding.check, finding.where, finding.message)
        so_far = self.counts[finding.check, "error"] + self.counts[finding.check, "warning"]
        if so_far < self.limit or self.counts[finding.check, finding.severity] == 0:
            self.kept.append(finding)
        self.counts[finding.check, finding.severity] += 1

    def error(self, check: str, where: str, message: str) -> None:
        """Add what must be mended."""
        self.add(Finding("error", check, where, message))

    def warn(self, check: str, where: str, message: str) -> None:
        """Add what should be looked at."""
        self.add(Finding("warning", check, where, message))


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome: findings in the order of the checks, how many of each, what was looked at and what was not."""

    source: str
    findings: tuple[Finding, ...]
    counts: Mapping[tuple[str, Severity], int]
    looked_at: Mapping[str, int]
    skipped: Mapping[str, str]
    seconds: float

    def count(self, severity: Severity, check: str | None = None) -> int:
        """How many findings there are, of one check or of all."""
        return sum(n for (name, kind), n in self.counts.items() if kind == severity and check in (None, name))

    def of(self, check: str) -> list[Finding]:
        """The kept findings of a check, errors first."""
        return sorted((one for one in self.findings if one.check == check), key=lambda one: one.severity)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be."""
        return self.count("error") == 0

    @property
    def summary(self) -> str:
        """One line: what was looked at and what came of it."""
        seen = ", ".join(f"{number:,} {what}" for what, number in self.looked_at.items())
        verdict = f"{self.count('error'):,} errors, {self.count('warning'):,} warnings"
        return f"{self.source}: {seen}; {verdict}; {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, schema ``m3d.verify/1``."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "ok": self.ok,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "looked_at": dict(self.looked_at),
            "checks": {
                check: {
                    "meaning": meaning,
                    "errors": self.count("error", check),
                    "warnings": self.count("warning", check),
                    **({"skipped": self.skipped[check]} if check in self.skipped else {}),
                    "findings": [asdict(one) for one in self.of(check)],
                }
                for check, meaning in CHECKS.items()
            },
            "seconds": round(self.seconds, 2),
        }

    def to_markdown(self, examples: int = 10) -> str:
        """A page to keep beside the data."""
        lines = [f"# Verification of {self.source}", "", self.summary, ""]
        lines += ["| check | errors | warnings | meaning |", "|---|---:|---:|---|"]
        for check, meaning in CHECKS.items():
            note = f" Not looked at: {self.skipped[check]}." if check in self.skipped else ""
            errors, warnings = self.count("error", check), self.count("warning", check)
            lines.append(f"| {check} | {errors} | {warnings} | {meaning}.{note} |")
        for check in CHECKS:
            found = self.of(check)
            if found:
                total = self.count("error", check) + self.count("warning", check)
                more = [f"- ... and {total - examples} more"] if total > examples else []
                lines += ["", f"## {check}", ""]
                lines += [f"- {one.severity}: `{one.where}` {one.message}" for one in found[:examples]] + more
        return "\n".join(lines) + "\n"
