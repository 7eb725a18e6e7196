"""What a record's words give away or get wrong: class names nobody knows, and answers that stand in the question.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from data_prep.record import Record
from data_prep.terms import Terms
from data_prep.verify.facts import asked_for, same_name
from data_prep.verify.findings import Finding

__all__ = ["Vocabulary", "check_words", "count_words", "words_of"]

# an ideograph is a word of its own
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_SIDES = ("left", "right")
_SAY_NOTHING = {("yes",), ("no",)}
_SHORTEST_IN_PATH = 4
_TYPO = 0.85


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation; plurals in ``s`` as singulars."""
    words = _WORD.findall(text.casefold())
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    )


def count_words(text: str) -> int:
    """How many words a text has; an ideograph counts as one."""
    return len(_WORD.findall(text))


@dataclass
class Vocabulary:
    """The names of structures that an index (by data set) and a term dictionary know."""

    used: Counter[str] = field(default_factory=Counter)
    terms: Terms = field(default_factory=lambda: Terms(()))
    _found: dict[str, str | None] = field(default_factory=dict)

    def add(self, names: Iterable[str]) -> None:
        """Note the names of one image."""
        self.used.update(names)

    def term(self, name: str) -> str | None:
        """The dictionary's name for what ``name`` says, None where it has none."""
        if name not in self._found:
            try:
                self._found[name] = self.terms.find(name).name
            except ValueError:
                self._found[name] = None
        return self._found[name]

    def knows(self, name: str) -> bool:
        """Whether an image or the dictionary has the name."""
        return name in self.used or self.term(name) is not None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compare with."""
        return not self.used and not self.terms

    def one_thing(self, first: str, second: str) -> bool:
        """Whether two names mean the same structure."""
        if same_name(first, second):
            return True
        return self.term(first) is not None and self.term(first) == self.term(second)

    def check_used(self, where: str) -> Iterator[Finding]:
        """Names of labels that look like a misspelling of another, more common one, or that no dictionary has."""
        for name, times in sorted(self.used.items()):
            if self.term(name) is not None:
                continue
            close = _meant(name, [*self.terms, *(other for other, often in self.used.items() if often > times)])
            if close is not None:
                message = (
                    f"{name!r} names a label in {times} image(s); did you mean {close!r}? Correct it at the source"
                )
                yield Finding("error", "names", where, f"{message} and prepare again")
            elif self.terms:
                message = f"{name!r} ({times} image(s)) is no term of the dictionary; check its spelling, or add a term"
                yield Finding("warning", "names", where, message)


def check_words(
    record: Record, where: str, vocabulary: Vocabulary, names: Mapping[int, str] | None
) -> Iterator[Finding]:
    """What is wrong with a record's class names, and whether its words tell the answer."""
    yield from _check_names(record, where, vocabulary, names)
    yield from _check_answers(record, where)


def _check_names(
    record: Record, where: str, vocabulary: Vocabulary, names: Mapping[int, str] | None
) -> Iterator[Finding]:
    named = list(dict.fromkeys(one.name for one in (*(record.target.masks or ()), *(record.target.boxes or ()))))
    asked = asked_for(record)
    spoken = list(dict.fromkeys([*asked, *(box.name for box in record.target.boxes or () if box.name)]))
    if names is None:
        spoken += [mask.name for mask in record.target.masks or () if mask.name and mask.name not in spoken]
    if not vocabulary.empty:
        for name in spoken:
            if not vocabulary.knows(name):
                yield Finding("error", "names", where, _unknown(name, vocabulary, names))
    if record.task == "reg" or not asked or not named:
        return
    for name in named:
        if name and _all_known(vocabulary, [name, *asked]) and not _any_one(vocabulary, name, asked):
            message = (
                f"asks for {', '.join(map(repr, asked))}, but the target is {name!r}; correct the slot or the target"
            )
            yield Finding("error", "names", where, message)


def _all_known(vocabulary: Vocabulary, names: Iterable[str]) -> bool:
    """Whether all names are known, or there is no telling; an unknown one is a finding of its own."""
    return vocabulary.empty or all(vocabulary.knows(name) for name in names)


def _any_one(vocabulary: Vocabulary, name: str, others: Iterable[str]) -> bool:
    return any(vocabulary.one_thing(name, other) for other in others)


def _unknown(name: str, vocabulary: Vocabulary, names: Mapping[int, str] | None) -> str:
    here = list(names.values()) if names else []
    close = next(filter(None, (difflib.get_close_matches(name, some, 1) for some in (here, [*vocabulary.used]))), [])
    close = close or difflib.get_close_matches(name, [*vocabulary.terms], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "correct it, or add it to the term dictionary"
    known = f"; this image has {', '.join(here[:8])}" if here and not close else ""
    return f"no image and no dictionary knows the class {name!r}{known}; {hint}"


def _meant(name: str, others: list[str]) -> str | None:
    """A name that differs in a letter or two of one word ("livr"), not in a whole word ("upper", "lower") or number."""
    words = words_of(name)
    for other in others:
        theirs = words_of(other)
        if len(theirs) != len(words):
            continue
        pairs = [(one, two) for one, two in zip(words, theirs, strict=True) if one != two]
        if len(pairs) == 1 and _misspelt(*pairs[0]):
            return other
    return None


def _misspelt(one: str, other: str) -> bool:
    if min(len(one), len(other)) < _SHORTEST_IN_PATH or re.search(r"\d", one + other):
        return False
    return difflib.SequenceMatcher(None, one, other).ratio() >= _TYPO


def _check_answers(record: Record, where: str) -> Iterator[Finding]:
    told = words_of(" ".join(_told(record)))
    paths = [(media.path, words_of(media.path)) for media in record.media]
    for kind, answer, rivals in _answers(record):
        words = words_of(answer)
        if not words or words in _SAY_NOTHING or all(word.isdigit() for word in words):
            continue
        if _stands_in(words, told) and not any(_stands_in(words_of(rival), told) for rival in rivals):
            message = (
                f"the {kind} {answer!r} stands in the question or description itself; reword it, or drop the record"
            )
            yield Finding("error", "answers", where, message)
        for path, parts in paths:
            if len("".join(words)) >= _SHORTEST_IN_PATH and _stands_in(words, parts):
                message = f"the {kind} {answer!r} stands in the path {path!r}; never show file names to a model"
                yield Finding("warning", "answers", where, message)


def _told(record: Record) -> list[str]:
    """What the prompt says beside its template; for ``reg`` the description is the answer."""
    slots = record.prompt.slots
    keys = ("question",) if record.task == "reg" else ("question", "description")
    return [record.prompt.text or "", *(str(slots[key]) for key in keys if key in slots)]


def _answers(record: Record) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What must not be told, with what may be told beside it: a question may well name all of its options."""
    target = record.target
    if target.options is not None and target.choice is not None:
        right = target.options[target.choice]
        yield "right option", right, tuple(option for option in target.options if option != right)
    by_description = record.task in ("rec.box3d", "rec.box2d", "seg.sem") and "description" in record.prompt.slots
    if record.task in ("seg.ref", "reg") or by_description:
        names = dict.fromkeys(one.name for one in (*(target.masks or ()), *(target.boxes or ())))
        for name in filter(None, names):
            yield "class name", name, ()


def _stands_in(words: tuple[str, ...], text: tuple[str, ...]) -> bool:
    """Whether the words follow each other in the text; a side may stand apart ("the kidney on the left")."""
    if len(words) > 1 and words[0] in _SIDES and words[0] in text:
        words = words[1:]
    length = len(words)
    return any(text[start : start + length] == words for start in range(len(text) - length + 1))
