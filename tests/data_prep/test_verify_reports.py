"""Reports that stand nearly alike in two splits are found, exactly and quickly."""

import random
import time

import pytest

from data_prep.verify.facts import ReportText
from data_prep.verify.twins import check_reports, jaccard, shingles
from data_prep.verify.words import words_of


def report_text(number, split, text, by_rule=False):
    return ReportText(f"records.jsonl:{number}", f"image-{number}", split, text, by_rule)


def sentence(rng, length=40):
    return " ".join(rng.choice(WORDS) for _ in range(length))


WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "or")]


def test_jaccard_of_shingles_by_hand():
    one, other = words_of("a b c d e f"), words_of("A b, c d e g.")
    assert shingles(one) == {("a", "b", "c", "d", "e"), ("b", "c", "d", "e", "f")}
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(1 / 3)
    assert jaccard(shingles(words_of("a b")), shingles(words_of("a b"))) == 1.0
    assert words_of("两肺纹理 clear, masses") == ("两", "肺", "纹", "理", "clear", "masse")


def test_the_threshold_is_exact():
    words = sentence(random.Random(0), 44).split()  # 40 shingles
    changed = [*words[:-4], "x", "x", "x", "x"]  # 4 shingles of each are the other's no more: 36 / 44 = 0.818
    texts = [report_text(1, "train", " ".join(words)), report_text(2, "test", " ".join(changed))]
    assert len(list(check_reports(texts, threshold=0.81))) == 1
    assert list(check_reports(texts, threshold=0.82)) == []


def test_planted_twins_among_many_reports_are_all_found_quickly():
    rng = random.Random(1)
    train = [sentence(rng) for _ in range(1500)]
    planted = [" ".join([*text.split()[:-1], "changed"]) for text in train[::50]]  # 35 of 37 shingles shared
    test = [*planted, *(sentence(rng) for _ in range(300))]
    texts = [report_text(n, "train", text) for n, text in enumerate(train)]
    texts += [report_text(10_000 + n, "test", text) for n, text in enumerate(test)]
    started = time.monotonic()
    findings = list(check_reports(texts))
    assert time.monotonic() - started < 20
    assert {one.where for one in findings} == {f"records.jsonl:{10_000 + n}" for n in range(len(planted))}
    assert {one.severity for one in findings} == {"error"}


def test_reports_made_by_rule_are_not_near_duplicates_of_each_other():
    text = sentence(random.Random(2))
    texts = [report_text(1, "train", f"{text} 12"), report_text(2, "test", f"{text} 13")]
    assert len(list(check_reports(texts))) == 1
    by_rule = [ReportText(one.where, one.image_id, one.split, one.text, True) for one in texts]
    assert list(check_reports(by_rule)) == []
