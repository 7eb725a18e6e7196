"""Questions: open ones, and closed ones with lettered choices or with yes and no."""

import re
import string
from collections.abc import Sequence

from data_prep.record import NEEDS, Record
from m3d.tasks.base import Phrases, Rendered, ask, slot
from m3d.tasks.codecs import BoxCodec

LETTERS = string.ascii_uppercase
_YES_NO = "vqa.closed.yes_no"
_LETTER = re.compile(r"\s*\(?([A-Z])(?:[.):,](?!\w)|\s*$)")
_SAID = re.compile(
    r"\b(?:answer|choice|option)(?:\s+is\s+|\s*:\s*|\s+)(?:option\s+)?\(?([A-Z])(?=[.):,]|\s*$)", re.IGNORECASE
)


def letter_choices(options: Sequence[str]) -> str:
    """``A. first B. second``.

    Raises:
        ValueError: There are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, but only {len(LETTERS)} letters; ask it as an open question")
    return " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def write_choices(question: str, options: Sequence[str]) -> str:
    """The reference's form: ``question Choices: A. first B. second`` (REFERENCE A4)."""
    return Phrases()("vqa.closed", "prompt", question=question, choices=letter_choices(options))


class OpenVQA:
    """``vqa.open``: the question is asked as it stands."""

    name = "vqa.open"
    needs = NEEDS["vqa.open"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask the record's question."""
        return Rendered(record.prompt.text or slot(record, "question"), str(record.target.text))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The answer itself."""
        return text.strip()


class ClosedVQA:
    """``vqa.closed``: the target is one of the options; the answer says its letter and its text.

    Where the subtask is ``yes/no``, or the template ``m3d.vqa.closed.yes_no``, no letters are written, and the answer
    is the option alone: it is read back with its ``options``.
    """

    name = "vqa.closed"
    needs = NEEDS["vqa.closed"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask the record's question with its options."""
        options, choice = record.target.options, record.target.choice
        assert options is not None and choice is not None
        question = slot(record, "question")
        if record.subtask == "yes/no" or record.prompt.template == f"m3d.{_YES_NO}":
            return Rendered(ask(record, say, _YES_NO, question=question), options[choice])
        prompt = ask(record, say, self.name, question=question, choices=letter_choices(options))
        return Rendered(prompt, f"{LETTERS[choice]}. {options[choice]}", chosen=options[choice])

    def parse(self, text: str, codec: BoxCodec, *, options: Sequence[str] | None = None) -> int | None:
        """The index of the chosen option, None where the answer has no letter of its own.

        Given the ``options``, an answer that says one of them in words counts too, and a letter beyond them does not.
        """
        found = _LETTER.match(text) or _SAID.search(text)
        if found:
            choice = LETTERS.find(found.group(1))  # a small letter is an article, not a choice
            if 0 <= choice < (len(options) if options is not None else len(LETTERS)):
                return choice
        return _said_in_words(text, options or ())


def _said_in_words(text: str, options: Sequence[str]) -> int | None:
    """The one option that an answer is, or begins with."""
    said = _plain(text)
    plain = [_plain(option) for option in options]
    begun = [number for number, option in enumerate(plain) if option and f"{said} ".startswith(f"{option} ")]
    return max(begun, key=lambda number: len(plain[number]), default=None)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
