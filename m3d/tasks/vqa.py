"""Questions: open ones, and closed ones with lettered choices."""

import re
from collections.abc import Sequence

from data_prep.record import Record
from m3d.tasks.base import Phrases, Rendered
from m3d.tasks.codecs import BoxCodec

LETTERS = "ABCDEFGHIJ"


def write_choices(question: str, options: Sequence[str]) -> str:
    """The reference's form: ``question Choices: A. first B. second`` (REFERENCE A4)."""
    lettered = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question} Choices: {lettered}"


class OpenVQA:
    """``vqa.open``: the question is asked as it stands."""

    name = "vqa.open"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask the record's question."""
        return Rendered(str(record.slots["question"]), str(record.target["text"]))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The answer itself."""
        return text.strip()


class ClosedVQA:
    """``vqa.closed``: the target is one of the options; the answer says its letter and its text."""

    name = "vqa.closed"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask the record's question with its options."""
        options, choice = record.target["options"], record.target["choice"]
        prompt = write_choices(str(record.slots["question"]), options)
        return Rendered(prompt, f"{LETTERS[choice]}. {options[choice]}")

    def parse(self, text: str, codec: BoxCodec) -> int | None:
        """The index of the chosen option, or None where the answer does not begin with a letter of its own."""
        found = re.match(rf"\s*\(?([{LETTERS}])(?:[.):,\s]|$)", text)
        return LETTERS.index(found.group(1)) if found else None
