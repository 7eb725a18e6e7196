"""What every written question must pass before a model looks at it again: rules on its wording alone.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from data_prep.questions_from_reports.questions import LETTERS, Question

__all__ = ["fault"]

SHORTEST, LONGEST, LONGEST_OPTION = 10, 300, 120
_NOTHING = re.compile(
    r"^(?:n/?a|none|null|nil|unknown|unclear|other|others|uncertain|undetermined|none of (?:the|these).*|"
    r"all of (?:the|these).*|both .* and .* above|(?:it )?(?:can ?not|can't) be .*|"
    r"not (?:mentioned|specified|stated|given|applicable|reported|provided|known|available|described|determined).*|"
    r"no (?:information|data)\b.*|[a-d] and [a-d]|[\W_]*)$",
    re.IGNORECASE,
)
_REPORT = re.compile(
    r"\b(?:reports?|reported|reporting|according to|radiologists?|dictat\w+|impression|(?:study|findings?) section|"
    r"(?:mention|document|stat)ed|described in|the text|the passage|the author)\b",
    re.IGNORECASE,
)
_ELSEWHERE = re.compile(
    r"\b(?:years? old|year-old|(?:patient|person)['\u2019]?s? (?:age|sex|gender|name|history)|history|symptoms?|"
    r"complain\w*|treatment|therapy|medications?|biops\w+|histolog\w+|recommend\w*|follow-?up|prognosis|"
    r"previous|prior|compared (?:to|with) (?:the )?(?:last|earlier)|laboratory)\b",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r"\b(?:of the following|following (?:is|are|organs?|structures?)|of these|options?)\b", re.IGNORECASE
)
_WORD = re.compile(r"[^\W_]+")
_COMMON = {
    "which", "what", "where", "there", "these", "those", "with", "that", "this", "from", "into", "scan", "image",
    "images", "shown", "seen", "visible", "present", "located", "side", "part", "organ", "finding", "abnormality",
    "phase", "plane", "contrast",
}  # fmt: skip


def fault(question: Question) -> str | None:
    """The first rule that a question breaks, in words; None where it passes."""
    for rule in _RULES:
        found = rule(question)
        if found is not None:
            return found
    return None


def _options(question: Question) -> str | None:
    if len(question.options) != len(LETTERS) or not 0 <= question.choice < len(question.options):
        return "four options with the answer among them are needed"
    empty = [option for option in question.options if _NOTHING.match(option.strip())]
    if empty:
        return f"an option says nothing: {empty[0]!r}"
    if len({_plain(option) for option in question.options}) != len(LETTERS):
        return "two options are the same"
    if max(map(len, question.options)) > LONGEST_OPTION:
        return f"an option is longer than {LONGEST_OPTION} characters"
    return None


def _wording(question: Question) -> str | None:
    if not SHORTEST <= len(question.question) <= LONGEST:
        return f"the question has {len(question.question)} characters, not {SHORTEST} to {LONGEST}"
    if not question.question.endswith("?"):
        return "the question does not end with '?'"
    if _LISTED.search(question.question):
        return "the question needs its options to make sense"
    return None


def _from_the_image(question: Question) -> str | None:
    text = " | ".join((question.question, *question.options))
    told = _REPORT.search(text)
    if told:
        return f"speaks of the report: {told[0]!r}"
    told = _ELSEWHERE.search(text)
    return f"not to be seen in the scan: {told[0]!r}" if told else None


def _given_away(question: Question) -> str | None:
    asked = f" {_plain(question.question)} "
    said = [f" {_plain(option)} " in asked for option in question.options]
    if said[question.choice] and not all(said):
        return "the question holds its answer"
    shared = [_stems(option) & _stems(question.question) for option in question.options]
    others = [words for number, words in enumerate(shared) if number != question.choice]
    if shared[question.choice] and not any(others):
        return f"only the answer repeats a word of the question: {min(shared[question.choice])!r}"
    return None


def _stands_out(question: Question) -> str | None:
    others = [len(option) for number, option in enumerate(question.options) if number != question.choice]
    length = len(question.answer)
    return "the answer stands out by its length" if length > 2 * max(others) and length > max(others) + 15 else None


_RULES: Sequence[Callable[[Question], str | None]] = (_options, _wording, _from_the_image, _given_away, _stands_out)


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _stems(text: str) -> set[str]:
    """Words that carry meaning, without a plural's s."""
    words = (word.removesuffix("s") for word in _WORD.findall(text.casefold()))
    return {word for word in words if len(word) > 3 and word not in _COMMON and f"{word}s" not in _COMMON}
