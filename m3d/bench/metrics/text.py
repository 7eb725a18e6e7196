"""What is said beside what should have been: BLEU, ROUGE, METEOR, CIDEr, exact match, token F1.

From the libraries that papers use (extra ``bench``), none of which is given a network or Java. Chinese is compared by
characters. BERTScore is in `m3d.bench.metrics.embedded`; what a report says of the patient, in
`m3d.bench.metrics.clinical`.
"""

# n samples, R resamples

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from m3d.bench.metrics.base import Floats, Metric, ProtocolName, Sample, mean
from m3d.bench.metrics.bleu import CorpusBleu, released_bleu
from m3d.bench.metrics.optional import require
from m3d.bench.metrics.per_sample import PerSample, TextScore, by_language
from m3d.bench.metrics.words import characters, is_chinese, plain_words, squad_words, treebank

__all__ = [
    "Cider",
    "exact_match",
    "meteor",
    "released_meteor",
    "released_rouge",
    "rouge",
    "text_metrics",
    "token_f1",
]

_ROUGE = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}
_CHINESE = "Chinese by characters"


def text_metrics(protocol: ProtocolName = "standard") -> tuple[Metric, ...]:
    """The metrics of a text: those of the released evaluation, or all that need no model.

    Raises:
        ModuleNotFoundError: A library of the extra ``bench`` is missing; the message has the pip command.
    """
    if protocol == "m3d":
        return (released_bleu(), released_rouge(), released_meteor())
    corpus = (CorpusBleu(order) for order in (1, 2, 3, 4))
    return (*corpus, rouge("rouge1"), rouge("rougeL"), meteor(), Cider(), exact_match(), token_f1())


def rouge(kind: Literal["rouge1", "rougeL"]) -> PerSample:
    """F1 of words (ROUGE-1), or of the longest common subsequence of words (ROUGE-L)."""
    score = by_language(_rouge_f1(kind), _rouge_f1(kind, _Characters()))
    return PerSample(_ROUGE[kind], f"rouge-score, F1, mean of samples, no stemming, {_CHINESE}", score)


def released_rouge() -> PerSample:
    """ROUGE-1 as ``evaluate`` gives it by default; its words are ASCII, so Chinese counts 0."""
    english = _rouge_f1("rouge1")
    return PerSample(
        "ROUGE-1", "as evaluate's rouge: rouge-score, F1, mean of samples, no stemming", by_language(english, english)
    )


def meteor() -> PerSample:
    """METEOR as NLTK computes it, with synonyms where NLTK finds WordNet; it looks them up by a word's *stem*.

    Its penalty for fragments knows no brief texts: one chunk of m words costs ``.5 / m^3``. One word that is exactly
    right scores .5, two score .9375; of one-word answers no model can have more than .5.
    """
    words, (thesaurus, matches) = treebank(), _thesaurus()
    score = by_language(_meteor(words.split, thesaurus), _meteor(characters, thesaurus))
    return PerSample("METEOR", f"nltk, {matches}, alpha .9, beta 3, gamma .5, {words.name}, {_CHINESE}", score)


def released_meteor() -> PerSample:
    """METEOR as ``evaluate`` calls NLTK: to the digit where NLTK's WordNet and punkt are installed, else as named."""
    words, (thesaurus, matches) = treebank(), _thesaurus()
    english = _meteor(words.split, thesaurus)
    variant = f"as evaluate's meteor: nltk, {matches}, alpha .9, beta 3, gamma .5, {words.name}"
    return PerSample("METEOR", variant, by_language(english, english))


def exact_match() -> PerSample:
    """Whether the words are the same, as SQuAD compares them (see `squad_words` for what numbers keep)."""
    score = by_language(_same(squad_words), _same(_characters_or_marks))
    return PerSample("exact match", f"SQuAD, numbers keep point and minus, {_CHINESE}", score)


def token_f1() -> PerSample:
    """F1 of the words that are shared, whatever their order, as SQuAD counts them."""
    score = by_language(_overlap(squad_words), _overlap(_characters_or_marks))
    return PerSample("token F1", f"SQuAD, mean of samples, numbers keep point and minus, {_CHINESE}", score)


class Cider:
    """CIDEr, from 0 to 10: how alike two texts are in what is rare among the references.

    Rare is what few references *of the samples given* hold, so a value belongs to its set of samples. What all of them
    hold weighs nothing: with one reference, or the same reference throughout, every answer scores 0. A text of one word
    has no pairs, triples and fours: exactly right it scores 2.5 at most.
    """

    name = "CIDEr"
    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = None

    def __init__(self) -> None:
        self._cider = require("pycocoevalcap.cider.cider", "bench").Cider
        self._words = plain_words()
        self.variant = f"pycocoevalcap (CIDEr-D, times 10), 1 to 4 words, {self._words.name}, {_CHINESE}"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The score of each sample among these: ``(n, 1)``."""
        said = {number: [self._joined(sample.said, sample)] for number, sample in enumerate(samples)}
        references = {number: [self._joined(sample.reference, sample)] for number, sample in enumerate(samples)}
        if not any(text for (text,) in references.values()):
            return np.zeros((len(samples), 1))
        _, scores = self._cider().compute_score(references, said)
        return np.asarray(scores, dtype=np.float64).reshape(-1, 1)

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean: ``(R, 1), (R,) -> (R,)``."""
        return mean(sums, counts)

    def _joined(self, text: str, sample: Sample) -> str:
        return " ".join(characters(text) if is_chinese(sample.record) else self._words.split(text))


@dataclass(frozen=True)
class _Characters:
    """What rouge-score asks to split Chinese."""

    def tokenize(self, text: str) -> list[str]:
        return characters(text)


@dataclass(frozen=True)
class _NoSynonyms:
    """Stands where NLTK looks for WordNet."""

    def synsets(self, word: str) -> list[Any]:
        del word
        return []


def _rouge_f1(kind: str, tokenizer: _Characters | None = None) -> TextScore:
    scorer = require("rouge_score.rouge_scorer", "bench").RougeScorer([kind], use_stemmer=False, tokenizer=tokenizer)

    def score(said: str, reference: str) -> float:
        return float(scorer.score(reference, said)[kind].fmeasure)

    return score


def _thesaurus() -> tuple[Any, str]:
    """WordNet, or what stands in its place, and what then matches."""
    wordnet = require("nltk.corpus", "bench").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoSynonyms(), "exact and stem, no WordNet"
    return wordnet, "exact, stem and WordNet"


def _meteor(split: Callable[[str], list[str]], thesaurus: Any) -> TextScore:  # noqa: ANN401
    single = require("nltk.translate.meteor_score", "bench").single_meteor_score

    def score(said: str, reference: str) -> float:
        return float(single(split(reference), split(said), wordnet=thesaurus, alpha=0.9, beta=3, gamma=0.5))

    return score


def _characters_or_marks(text: str) -> list[str]:
    return characters(text) or text.lower().split()


def _same(split: Callable[[str], list[str]]) -> TextScore:
    def score(said: str, reference: str) -> float:
        return float(split(said) == split(reference))

    return score


def _overlap(split: Callable[[str], list[str]]) -> TextScore:
    def score(said: str, reference: str) -> float:
        ours, theirs = split(said), split(reference)
        shared = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * shared / (len(ours) + len(theirs))

    return score
