"""How a text becomes words, for the metrics whose libraries leave that to their callers.

Nothing here fetches anything. NLTK's own way of telling sentences apart (punkt) needs data that pip does not bring;
where they are not installed its rules work without them, and the name says so.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.record import Record
from m3d.bench.metrics.optional import require

__all__ = ["Words", "characters", "is_chinese", "plain_words", "squad_words", "treebank"]

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_PIECE = re.compile(rf"(?:(?<![a-z0-9])-)?\d+(?:\.\d+)?|[a-z][a-z0-9]*|[{_CHINESE}]")
# Every mark but the point of a decimal and the minus before a number: without them 3.5 is 35 and -5 is 5.
_MARK = re.compile(rf"(?!(?<![a-z])\.\d)(?!(?<!\w)-\.?\d)[{re.escape(string.punctuation)}]")
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Words:
    """A way of splitting, and its name for the variant of a metric."""

    name: str
    split: Callable[[str], list[str]]


def is_chinese(record: Record) -> bool:
    """Whether an entry's texts are Chinese, of whatever region."""
    return record.lang.partition("-")[0] in ("zh", "zho")


def characters(text: str) -> list[str]:
    """Chinese: every character by itself, numbers and Latin words whole and in lower case, no marks."""
    return _PIECE.findall(text.lower())


def squad_words(text: str) -> list[str]:
    """SQuAD's words: lower case, ASCII marks and English articles out; but a number keeps its point and its minus.

    Where nothing would be left, what was to go stays: an answer "A" is no article, and "+" is not "-".
    """
    words = _MARK.sub("", text.lower()).split()
    return [word for word in words if word not in _ARTICLES] or words or text.lower().split()


def treebank() -> Words:
    """NLTK's ``word_tokenize``: Penn Treebank words of one sentence after another, case and marks kept.

    Raises:
        ModuleNotFoundError: NLTK is not installed.
    """
    nltk = require("nltk", "bench")
    try:
        nltk.word_tokenize("")
    except LookupError:
        sentences, splitter = nltk.tokenize.PunktSentenceTokenizer(), nltk.tokenize.NLTKWordTokenizer()

        def split(text: str) -> list[str]:
            return [word for sentence in sentences.tokenize(text) for word in splitter.tokenize(sentence)]

        return Words("Treebank words, punkt without its data", split)
    return Words("Treebank words, punkt", nltk.word_tokenize)


def plain_words() -> Words:
    """As `treebank`, in lower case and without the words that are marks alone, as captions are scored."""
    full = treebank()

    def split(text: str) -> list[str]:
        return [word for word in full.split(text.lower()) if any(sign.isalnum() for sign in word)]

    return Words(f"{full.name}, lower case, no marks", split)
