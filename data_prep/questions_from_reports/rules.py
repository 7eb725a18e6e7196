"""Questions from a report without any model: words of a vocabulary, negation, and distractors nobody mentioned.

Crude and honest (``derivation: report-rules/1``): only what a report says plainly is asked about, in fixed wordings,
and an option counts as false because the report, which is taken to be complete, has no word of it. What is negated,
doubtful or past is never an answer, nor a distractor.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.questions_from_reports.filters import fault
from data_prep.questions_from_reports.progress import Summary, export, question_row, reject_row
from data_prep.questions_from_reports.questions import TOPICS, Question, Rejected
from data_prep.questions_from_reports.reports import Report

__all__ = ["METHOD", "by_rules", "write_by_rules"]

METHOD = "report-rules/1"
_ASIDE = 3  # distractors
_VOWEL = re.compile(r"^[aeiou]")
_HEADING = re.compile(r":[ \t]*\n\s*")  # what stands below "Comparison:" belongs to it
_SENTENCE_END = re.compile(r"[.;!](?:\s|$)|(?<=\w\?)\s")  # "Liver mass? No", but "? mass in the liver"
_UNCOUNTED = {
    "atrophy", "fatty infiltration", "cirrhosis", "consolidation", "atelectasis", "emphysema", "bronchiectasis",
    "wall thickening", "calcification", "enlargement", "hydronephrosis", "diverticula", "perforation",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The words of ``vocabulary.yaml`` as patterns, by category and name."""

    words: Mapping[str, Mapping[str, re.Pattern[str]]]
    places: Mapping[str, Mapping[str, re.Pattern[str]]]
    kin: Mapping[str, str]
    sites: Mapping[str, frozenset[str]]
    before: re.Pattern[str]
    after: re.Pattern[str]
    contrast: re.Pattern[str]


@dataclass(frozen=True)
class Clause:
    """A piece of a report that one negation can reach, with what it plainly says."""

    organs: Sequence[str] = ()
    findings: Sequence[str] = ()
    places: Sequence[tuple[str, str]] = ()


@dataclass
class Reading:
    """What a report says, and what it mentions at all, plainly or not."""

    clauses: list[Clause] = field(default_factory=list)
    mentioned: dict[str, set[str]] = field(default_factory=dict)


def by_rules(report: Report, *, seed: int = 0) -> tuple[list[Question], list[Rejected]]:
    """At most one question a topic, and why there is none for the others."""
    if report.lang != "en":
        return [], [Rejected(stage="input", reason=f"the rules read English only, this report is {report.lang!r}")]
    if not report.text.strip():
        return [], [Rejected(stage="input", reason="the report is empty")]
    reading = _read(report.text)
    kept, rejected = [], []
    for topic in TOPICS:
        rng = random.Random(f"{seed}/{report.id}/{topic}")
        found = list(_ASK[topic](reading, rng))
        good = [question for question in found if fault(question) is None]
        if good:
            question = rng.choice(good)
            kept.append(question.shuffled(f"{seed}/{report.id}/{topic}/options")[0])
        else:
            reason = fault(found[0]) if found else "the report does not say it plainly enough"
            rejected.append(Rejected(stage="rules", topic=topic, reason=str(reason)))
    return kept, rejected


def write_by_rules(reports: Sequence[Report], out: Path, *, seed: int = 0) -> Summary:
    """Write ``questions.jsonl`` and ``rejects.jsonl`` of all reports."""
    summary, rows = Summary(reports=len(reports)), []
    provenance = {"method": METHOD, "generator": METHOD, "seed": seed, "check": None}
    for report in reports:
        questions, rejected = by_rules(report, seed=seed)
        row = {
            "questions": [question_row(report, question, provenance) for question in questions],
            "rejects": [reject_row(report, one) for one in rejected],
        }
        summary.count(row)
        rows.append(row)
    export(out, rows)
    return summary


@functools.cache
def vocabulary() -> Vocabulary:
    """The shipped words."""
    raw: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8"))
    findings = raw["abnormality"]
    words = {
        "plane": {name: _pattern(said) for name, said in raw["plane"].items()},
        "phase": {name: _pattern(said) for name, said in raw["phase"].items()},
        "organ": {name: _pattern([re.escape(name), *said]) for name, said in raw["organ"].items()},
        "abnormality": {name: _pattern([re.escape(name), *entry["say"]]) for name, entry in findings.items()},
    }
    return Vocabulary(
        words=words,
        places={kind: {name: _pattern(said) for name, said in some.items()} for kind, some in raw["location"].items()},
        kin={name: entry["kin"] for name, entry in findings.items()},
        sites={name: frozenset(entry["in"]) for name, entry in findings.items()},
        **{name: re.compile("|".join(raw["not_stated"][name])) for name in ("before", "after", "contrast")},
    )


def _pattern(said: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(said)})(?!\w)")


def _read(text: str) -> Reading:
    known, lowered = vocabulary(), " ".join(_HEADING.sub(": ", text.lower()).replace("\n", " . ").split())
    reading = Reading()
    for category, words in known.words.items():
        reading.mentioned[category] = {name for name, pattern in words.items() if pattern.search(lowered)}
    reading.mentioned["location"] = {
        name for places in known.places.values() for name, pattern in places.items() if pattern.search(lowered)
    }
    for sentence in _SENTENCE_END.split(lowered):
        start = 0
        for turn in [*known.contrast.finditer(sentence), None]:
            end = len(sentence) if turn is None else turn.start()
            reading.clauses.append(_clause(sentence[start:end], known))
            start = end if turn is None else turn.end()
    return reading


def _clause(text: str, known: Vocabulary) -> Clause:
    """What a clause states; findings that a negation or a doubt reaches are left out, the organs stay."""
    text = known.words["phase"]["non-contrast"].sub(" ", text)  # "without contrast" denies no finding
    before, afters = known.before.search(text), list(known.after.finditer(text))
    first = len(text) if before is None else before.start()
    last = afters[-1].start() if afters else -1

    def plain(pattern: re.Pattern[str]) -> bool:
        return any(last < match.start() < first for match in pattern.finditer(text))

    findings = [name for name, pattern in known.words["abnormality"].items() if plain(pattern)]
    organs = [name for name, pattern in known.words["organ"].items() if pattern.search(text)]
    places = [(kind, name) for kind, some in known.places.items() for name, one in some.items() if one.search(text)]
    return Clause(organs, findings, places)


def _plane(reading: Reading, rng: random.Random) -> Iterator[Question]:
    yield from _only_one("plane", "In which plane do the images lie?", reading, rng)


def _phase(reading: Reading, rng: random.Random) -> Iterator[Question]:
    yield from _only_one("phase", "Which contrast phase does the scan show?", reading, rng)


def _only_one(topic: str, question: str, reading: Reading, rng: random.Random) -> Iterator[Question]:
    """Where a scan has one of the kind; a report of several says nothing about this one."""
    said = reading.mentioned[topic]
    others = [name for name in vocabulary().words[topic] if name not in said]
    if len(said) == 1:
        yield from _question(topic, question, next(iter(said)), others, rng)


def _organ(reading: Reading, rng: random.Random) -> Iterator[Question]:
    for organ, finding in _pairs(reading):
        elsewhere = {one for one, other in _pairs(reading) if other == finding} - {organ}
        free = set(vocabulary().sites[finding]) - reading.mentioned["organ"]
        if not elsewhere:
            yield from _question("organ", f"Which organ shows {_article(finding)}?", organ, sorted(free), rng)


def _abnormality(reading: Reading, rng: random.Random) -> Iterator[Question]:
    known = vocabulary()
    taken = {known.kin[name] for name in reading.mentioned["abnormality"]}
    for organ, finding in _pairs(reading):
        others = {other for one, other in _pairs(reading) if one == organ} - {finding}
        free: dict[str, str] = {}
        for name in rng.sample(sorted(known.kin), len(known.kin)):
            if organ in known.sites[name] and known.kin[name] not in taken:
                free.setdefault(known.kin[name], name)
        if not others:
            yield from _question(
                "abnormality", f"Which abnormality does the {organ} show?", finding, sorted(free.values()), rng
            )


def _location(reading: Reading, rng: random.Random) -> Iterator[Question]:
    for clause in reading.clauses:
        if len(clause.findings) != 1 or len({name for _, name in clause.places}) != 1:
            continue
        finding, (kind, place) = clause.findings[0], clause.places[0]
        told = [name for one in reading.clauses if finding in one.findings for _, name in one.places]
        free = [name for name in vocabulary().places[kind] if name not in reading.mentioned["location"]]
        if set(told) == {place}:
            yield from _question("location", f"In which {kind} is the {finding}?", place, free, rng)


def _pairs(reading: Reading) -> list[tuple[str, str]]:
    """One organ and one finding of a clause, where they can only belong together."""
    pairs = []
    for clause in reading.clauses:
        if len(clause.organs) == 1 and len(clause.findings) == 1:
            pair = (clause.organs[0], clause.findings[0])
            if pair[0] in vocabulary().sites[pair[1]] and pair not in pairs:
                pairs.append(pair)
    return pairs


def _question(topic: str, question: str, answer: str, others: Sequence[str], rng: random.Random) -> Iterator[Question]:
    if len(others) >= _ASIDE:
        yield Question(topic=topic, question=question, options=(answer, *rng.sample(list(others), _ASIDE)), choice=0)


def _article(name: str) -> str:
    if name in _UNCOUNTED:
        return name
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


_ASK = {"plane": _plane, "phase": _phase, "organ": _organ, "abnormality": _abnormality, "location": _location}
