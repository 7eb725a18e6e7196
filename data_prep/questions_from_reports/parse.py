"""Read what a language model says: JSON in fences or prose, letters with or without dots, and refusals.

Tolerant about form, strict about meaning: what cannot be understood for certain is `Unreadable` and asked again, or one
entry of it is turned down with a reason.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_prep.questions_from_reports.questions import LETTERS, TOPICS, Question, Rejected

__all__ = ["Unreadable", "read_answers", "read_questions", "read_verdicts", "sounds_refused"]

LONGEST = 100_000
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z0-9]*\s*\n?(.*?)```", re.DOTALL)
_LETTERED = re.compile(r"^\(?([A-Da-d])[.):]\s+")
_LETTER = re.compile(r"^\(?([A-Da-dXx])(?:[.):\s]|$)")
_REFUSAL = re.compile(
    r"^\W*(?:i\W?m (?:very |really )?sorry|i am (?:very |really )?sorry|sorry\b|i apologi[sz]e|"
    r"i\W?m (?:unable|not able)|i am (?:unable|not able)|i (?:can\W?t|cannot|can not|won\W?t|will not)\b|"
    r"as an ai\b|unfortunately,? i\b)",
    re.IGNORECASE,
)


class Unreadable(ValueError):
    """A reply that cannot be used; the message says why, in words for the model that is asked again."""


def sounds_refused(text: str) -> bool:
    """Whether a reply without usable JSON is the model's way of saying no."""
    return _REFUSAL.match(_THOUGHT.sub("", text).strip()) is not None


def read_questions(text: str) -> tuple[list[Question], list[Rejected]]:
    """The questions of a reply, at most one a topic, and what was turned down or left out.

    Raises:
        Unreadable: There is no JSON of that form, or nothing usable in it.
    """
    content = _find(text, lambda found: isinstance(found.get("questions"), list))
    kept: dict[str, Question] = {}
    turned_down: list[Rejected] = []
    for entry in content["questions"]:
        topic = _topic(entry)
        try:
            question = _question(entry)
        except ValueError as error:
            turned_down.append(Rejected(stage="write", topic=topic, reason=f"malformed: {error}"))
            continue
        if question.topic in kept:
            turned_down.append(Rejected(stage="write", topic=topic, reason="a second one of the topic"))
        else:
            kept[question.topic] = question
    skipped = _skipped(content)
    if not kept and not skipped:
        problem = turned_down[0].reason if turned_down else "it holds no question"
        raise Unreadable(problem)
    told = {one.topic for one in turned_down} | set(kept)
    for topic in TOPICS:
        if topic not in told:
            why = skipped.get(topic)
            reason = f"left out by the model: {why}" if why else "left out by the model"
            turned_down.append(Rejected(stage="write", topic=topic, reason=reason))
    return [kept[topic] for topic in TOPICS if topic in kept], turned_down


def read_verdicts(text: str) -> dict[str, tuple[bool, str]]:
    """Of each topic judged: whether to keep it, and why not.

    Raises:
        Unreadable: There is no JSON of that form.
    """
    content = _find(text, lambda found: isinstance(found.get("verdicts"), list))
    verdicts: dict[str, tuple[bool, str]] = {}
    for entry in content["verdicts"]:
        topic = _topic(entry)
        if topic is None or not isinstance(entry.get("keep"), bool):
            continue
        kept, why = entry["keep"], " ".join(str(entry.get("why") or "").split())
        verdicts[topic] = (kept and verdicts.get(topic, (True, ""))[0], why)
    if not verdicts:
        raise Unreadable('"verdicts" holds no entry with a topic and "keep": true or false')
    return verdicts


def read_answers(text: str, questions: Sequence[Question]) -> dict[str, int | None]:
    """Of each topic answered, the option's number, None for X.

    Raises:
        Unreadable: There is no JSON of that form.
    """
    content = _find(text, lambda found: isinstance(found.get("answers"), dict))
    by_topic = {question.topic: question for question in questions}
    answers: dict[str, int | None] = {}
    for name, said in content["answers"].items():
        question = by_topic.get(str(name).strip().lower())
        if question is None or not isinstance(said, str):
            continue
        if said.strip().upper() == "X":
            answers[question.topic] = None
            continue
        number = _number(said, question.options)
        if number is not None:
            answers[question.topic] = number
    if not answers:
        raise Unreadable('"answers" gives no letter A, B, C, D or X for any of the topics')
    return answers


def _find(text: str, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first JSON object of the wanted form: the whole reply, in a fence, or amid prose."""
    text = _THOUGHT.sub("", text[:LONGEST]).strip()
    if not text:
        raise Unreadable("the reply was empty")
    whole = []
    for content in _objects(text):
        whole.append(content is not None)
        if content is not None and fits(content):
            return content
    raise Unreadable("the JSON lacks the keys asked for" if whole and all(whole) else "no complete JSON object in it")


def _objects(text: str) -> Iterator[dict[str, Any] | None]:
    """Every outermost object, None for a brace that none begins at."""
    decoder = json.JSONDecoder()
    for part in (*_FENCE.findall(text), text):
        start = part.find("{")
        tries = 0
        while start >= 0 and tries < 50:
            tries += 1
            try:
                content, end = decoder.raw_decode(part, start)
            except (ValueError, RecursionError):
                end = start + 1
                yield None
            else:
                if isinstance(content, dict):
                    yield content
            start = part.find("{", end)


def _topic(entry: Any) -> str | None:  # noqa: ANN401 - whatever a model wrote
    named = entry.get("topic") if isinstance(entry, dict) else None
    topic = named.strip().lower() if isinstance(named, str) else None
    return topic if topic in TOPICS else None


def _question(entry: Any) -> Question:  # noqa: ANN401 - whatever a model wrote
    topic = _topic(entry)
    if topic is None:
        raise ValueError("no topic of the five")
    question, options = entry.get("question"), entry.get("options")
    if isinstance(options, dict) and sorted(options) == list(LETTERS):
        options = [options[letter] for letter in LETTERS]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("the options are not a list of texts")
    if len(options) != len(LETTERS):
        raise ValueError(f"{len(options)} options instead of 4")
    cleaned = _without_letters([" ".join(option.split()) for option in options])
    choice = _number(entry.get("answer"), cleaned)
    if choice is None:
        raise ValueError("the answer is none of the options")
    return Question(topic=topic, question=" ".join(question.split()), options=cleaned, choice=choice)


def _without_letters(options: list[str]) -> tuple[str, ...]:
    """``A. liver`` to ``liver``, where all four are lettered in order: "C. difficile" is a name."""
    found = [_LETTERED.match(option) for option in options]
    lettered = [match[1].upper() for match in found if match]
    if lettered != list(LETTERS):
        return tuple(options)
    return tuple(option[match.end() :] for option, match in zip(options, found, strict=True) if match)


def _number(said: Any, options: Sequence[str]) -> int | None:  # noqa: ANN401 - whatever a model wrote
    """Which option is meant: by its words or by its letter; None where that is not certain."""
    if not isinstance(said, str):
        return None
    said = " ".join(said.split())
    same = [number for number, option in enumerate(options) if option.casefold() == said.casefold()]
    if same:
        return same[0] if len(same) == 1 else None
    letter = _LETTER.match(said)
    if letter is None or letter[1].upper() not in LETTERS:
        return None
    number = LETTERS.index(letter[1].upper())
    words = said[letter.end() :].strip().casefold()
    return number if not words or words == options[number].casefold() else None


def _skipped(content: dict[str, Any]) -> dict[str, str]:
    entries = content.get("skipped")
    found = {}
    for entry in entries if isinstance(entries, list) else ():
        topic = _topic(entry if isinstance(entry, dict) else {"topic": entry})
        if topic is not None:
            why = entry.get("why") if isinstance(entry, dict) else ""
            found[topic] = " ".join(str(why or "").split())
    return found
