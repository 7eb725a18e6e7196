"""Text metrics: values counted by hand, the libraries' own corpus values, and what is known to go wrong."""

import importlib.util
import math
import random
import sys
import types

import nltk
import numpy as np
import pytest
import torch
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from sacrebleu.metrics import BLEU
from transformers import BertConfig, BertModel, BertTokenizer

from data_prep.record import Record
from m3d.bench.metrics import clinical, embedded
from m3d.bench.metrics.base import Sample
from m3d.bench.metrics.bleu import CorpusBleu, released_bleu
from m3d.bench.metrics.clinical import Clinical
from m3d.bench.metrics.embedded import BertScore
from m3d.bench.metrics.text import (
    Cider,
    exact_match,
    meteor,
    released_meteor,
    released_rouge,
    rouge,
    text_metrics,
    token_f1,
)
from m3d.bench.metrics.words import characters, squad_words, treebank

ALL = [*text_metrics("standard"), *text_metrics("m3d")]
NAMES = [f"{metric.name}{'' if number < 10 else ' of m3d'}" for number, metric in enumerate(ALL)]
VOLUME = {"image_id": "1", "kind": "volume", "path": "1.npy", "modality": "CT", "shape": (4, 4, 4), "axes": "DHW"}


def record(lang):
    return Record.model_validate(
        {
            "id": "rad/1/report",
            "image_id": "1",
            "patient_id": "1",
            "split": "test",
            "lang": lang,
            "source": {"dataset": "a reading room"},
            "media": [{**VOLUME, "intensity": {"unit": "HU"}}],
            "task": "report",
            "prompt": {"text": "What do you see?"},
            "target": {"text": "Nothing."},
        }
    )


RECORDS = {lang: record(lang) for lang in ("en", "zh", "zh-CN")}


def said(text, reference, lang="en"):
    return Sample(record=RECORDS[lang], said=text, reference=reference)


def total(metric, *samples):
    """The value of these samples together, through sums as the bootstrap has them."""
    rows = metric.statistics(samples)
    assert rows.shape[0] == len(samples)
    (value,) = metric.reduce(rows.sum(axis=0, keepdims=True), np.array([float(len(samples))]))
    return value


# Every metric


def test_each_protocol_has_its_metrics_and_every_one_is_named():
    assert [metric.name for metric in text_metrics()] == [
        *("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-1", "ROUGE-L", "METEOR", "CIDEr", "exact match", "token F1"),
    ]
    assert [metric.name for metric in text_metrics("m3d")] == ["BLEU-1", "ROUGE-1", "METEOR"]
    assert all(metric.variant.startswith("as evaluate's") for metric in text_metrics("m3d"))
    assert {metric.better for metric in ALL} == {"higher"}
    assert {metric.worst for metric in ALL} == {None}
    assert {metric.unit for metric in ALL} == {""}


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize(
    ("text", "reference"),
    [("", "a normal liver"), (" \n", "肝脏正常"), ("", ""), ("normal liver", ""), ("", "."), ("  ", "。")],
)
def test_no_text_on_either_side_counts_nothing(metric, lang, text, reference):
    assert total(metric, said(text, reference, lang)) == 0
    beside = (
        said("a normal left kidney", "a normal left kidney"),
        said("no mass in the liver", "no mass in the liver"),
    )
    with_it, without = total(metric, *beside, said(text, reference, lang)), total(metric, *beside)
    assert 0 < with_it <= without + 1e-9


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize(
    "text", ["?", "...", "。", "\uff0c\u3001\uff1b", "+", "\u200b", "🫁", "肝脏正常。", "CT值-5HU", "a" * 3000]
)
def test_any_text_is_judged_on_either_side(metric, lang, text):
    for sample in (said(text, "a normal liver", lang), said("a normal liver", text, lang), said(text, text, lang)):
        value = total(metric, sample)
        assert 0 <= value <= 1


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_of_no_samples_there_is_no_value(metric):
    rows = metric.statistics([])
    assert rows.shape[0] == 0
    assert np.isnan(metric.reduce(np.zeros((1, rows.shape[1])), np.zeros(1))).all()


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_resamples_are_reduced_together_as_they_are_one_by_one(metric):
    texts = ["no mass", "a small nodule in the left lung", "", "fluid around the right kidney is seen", "liver"]
    rows = metric.statistics([said(text, texts[number - 1]) for number, text in enumerate(texts)])
    weights = np.array([[1, 1, 1, 1, 1], [0, 2, 0, 3, 1], [0, 0, 5, 0, 0]], float)
    together = metric.reduce(weights @ rows, weights.sum(axis=1))
    alone = [metric.reduce(line[None] @ rows, line.sum(keepdims=True)).item() for line in weights]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


# BLEU


def test_bleu_counted_by_hand():
    sample = said("the cat sat on the mat", "the cat is on the mat")
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, none of 3 fours: smoothed, half a four
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 2 / 3]
    for order in (1, 2, 3, 4):
        expected = math.prod(precisions[:order]) ** (1 / order)
        assert total(CorpusBleu(order), sample) == pytest.approx(expected, rel=1e-12)


def test_bleu_of_a_corpus_is_not_the_mean_of_its_samples():
    samples = [said("no mass is seen", "no mass is seen"), said("liver", "spleen")]
    assert total(CorpusBleu(1), *samples) == pytest.approx(4 / 5)
    assert total(released_bleu(), *samples) == pytest.approx(1 / 2)


def test_bleu_punishes_brevity_and_an_answer_that_is_missing():
    assert total(CorpusBleu(1), said("liver", "normal liver")) == pytest.approx(math.exp(1 - 2))
    assert total(released_bleu(), said("liver", "normal liver")) == pytest.approx(math.exp(1 - 2))
    answered = said("no mass is seen", "no mass is seen")
    assert total(CorpusBleu(4), answered) == pytest.approx(1)
    assert total(CorpusBleu(4), answered, said("", "no free air here")) == pytest.approx(math.exp(1 - 8 / 4))


def test_bleu_4_of_texts_too_short_for_it_is_nothing():
    assert total(CorpusBleu(4), said("normal liver", "normal liver")) == 0
    assert total(CorpusBleu(2), said("normal liver", "normal liver")) == pytest.approx(1)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_of_sums_is_sacrebleus_of_the_corpus(order, lang):
    draw = random.Random(order)
    words = {
        "en": "no mass nodule of in the left right lung 3.5 cm , . ; Normal".split(),
        "zh": list("左右肺结节未见。3c"),
    }
    join = {"en": " ", "zh": ""}[lang]
    metric = CorpusBleu(order)
    peer = BLEU(max_ngram_order=order, tokenize={"en": "13a", "zh": "zh"}[lang])
    for _ in range(40):
        texts = [join.join(draw.choices(words[lang], k=draw.randint(0, 7))) for _ in range(2 * draw.randint(1, 6))]
        texts[1::2] = [join.join(draw.sample(text, len(text))) if draw.random() < 0.3 else text for text in texts[1::2]]
        ours, theirs = texts[::2], texts[1::2]
        value = total(metric, *(said(*both, lang) for both in zip(ours, theirs, strict=True)))
        assert value == pytest.approx(peer.corpus_score(ours, [theirs]).score / 100, abs=1e-9)


def test_bleu_of_chinese_is_by_characters_and_the_released_one_by_spaces():
    sample = said("左肺结节", "右肺结节", "zh-CN")
    assert total(CorpusBleu(1), sample) == pytest.approx(3 / 4)
    assert total(released_bleu(), sample) == 0
    both = (sample, said("left lung", "left lung"))
    assert total(CorpusBleu(1), *both) == pytest.approx(5 / 6)


def test_the_released_bleu_is_of_words_and_marks():
    assert total(released_bleu(), said("The liver is normal.", "The liver appears normal.")) == pytest.approx(4 / 5)
    assert total(released_bleu(), said("the liver", "The liver")) == pytest.approx(1 / 2)  # case is kept
    assert total(released_bleu(), said("liver liver liver", "the liver now")) == pytest.approx(1 / 3)  # clipped


# ROUGE


def test_rouge_counted_by_hand():
    sample = said("The left kidney.", "left kidney is normal")
    assert total(rouge("rouge1"), sample) == pytest.approx(2 * 2 / (3 + 4))
    assert total(rouge("rougeL"), sample) == pytest.approx(2 * 2 / (3 + 4))
    turned = said("kidney left", "left kidney is normal")
    assert total(rouge("rouge1"), turned) == pytest.approx(2 * 2 / (2 + 4))
    assert total(rouge("rougeL"), turned) == pytest.approx(2 * 1 / (2 + 4))
    assert total(rouge("rouge1"), said("nodules", "nodule")) == 0  # no stemming
    assert total(released_rouge(), sample, turned) == pytest.approx((4 / 7 + 4 / 6) / 2)


def test_rouge_of_chinese_is_by_characters_and_the_released_one_sees_none():
    sample = said("左肺结节。", "右肺结节3.5cm", "zh")
    assert characters("右肺结节3.5cm") == ["右", "肺", "结", "节", "3.5", "cm"]
    assert total(rouge("rouge1"), sample) == pytest.approx(2 * 3 / (4 + 6))
    assert total(rouge("rougeL"), said("节结肺", "肺结节", "zh")) == pytest.approx(1 / 3)
    assert total(released_rouge(), said("左肺结节", "左肺结节", "zh")) == 0


# METEOR


def test_meteor_of_one_word_that_is_right_is_a_half():
    assert total(meteor(), said("Liver", "liver")) == pytest.approx(0.5)
    assert total(released_meteor(), said("liver", "liver")) == pytest.approx(0.5)
    assert total(meteor(), said("right lung", "right lung")) == pytest.approx(1 - 0.5 / 2**3)
    assert total(meteor(), said("liver", "spleen")) == 0


def test_meteor_counted_by_hand():
    precision, recall = 4 / 5, 1
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    by_hand = mean * (1 - 0.5 * (2 / 4) ** 3)  # two chunks of four matches
    sample = said("small nodule in left lung", "small nodule left lung")
    assert total(meteor(), sample) == pytest.approx(by_hand)
    assert total(released_meteor(), sample) == pytest.approx(by_hand)
    assert total(meteor(), said("nodules", "nodule")) == pytest.approx(0.5)  # by its stem


def test_meteor_of_chinese_is_by_characters():
    assert total(meteor(), said("左肺结节。", "左肺结节", "zh")) == pytest.approx(1 - 0.5 / 4**3)
    assert total(released_meteor(), said("左肺结节", "左肺结节", "zh")) == pytest.approx(0.5)  # one word


def test_sentences_come_apart_with_or_without_punkt():
    assert treebank().split("No mass. The liver isn't large, 3.5 cm.") == [
        *("No", "mass", ".", "The", "liver", "is", "n't", "large", ",", "3.5", "cm", "."),
    ]


@pytest.mark.filterwarnings("ignore:The multilingual functions:UserWarning")
def test_meteor_says_whether_it_knows_synonyms(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    without = meteor()
    assert without.variant.startswith("nltk, exact and stem, no WordNet, ")
    assert "punkt without its data" in without.variant
    assert total(without, said("lump", "tumor")) == 0
    write_wordnet(tmp_path / "corpora" / "wordnet")
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    for metric in (meteor(), released_meteor()):
        assert "nltk, exact, stem and WordNet, " in metric.variant
        assert total(metric, said("lump", "tumor")) == pytest.approx(0.5)
        assert total(metric, said("spleen", "tumor")) == 0


def write_wordnet(folder):
    """A WordNet of two words for one thing, in the format of its version 3."""
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for kind in ("index.", "data."):
            (folder / f"{kind}{part}").write_text("")
        (folder / f"{part}.exc").write_text("")
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.body\t1\n")
    (folder / "data.noun").write_text("00000000 00 n 02 tumor 0 lump 0 000 | what grows where nothing should  \n")
    (folder / "index.noun").write_text("lump n 1 0 1 0 00000000  \ntumor n 1 0 1 0 00000000  \n")


# CIDEr


def test_cider_counted_by_hand():
    other = said("lungs are clear today", "lungs are clear today")
    # of the four lengths one has a match: one of two words, each as rare as the other, so a cosine of 1/2
    half = said("liver spleen", "liver kidney")
    rows = Cider().statistics([half, other])
    assert rows[0, 0] == pytest.approx(10 * (1 / 2) / 4)
    assert rows[1, 0] == pytest.approx(10)
    assert total(Cider(), half, other) == pytest.approx((10 / 8 + 10) / 2)


def test_cider_knows_no_rare_words_where_there_is_one_reference():
    sample = said("no mass in the liver", "no mass in the liver")
    assert total(Cider(), sample) == 0
    assert total(Cider(), sample, sample, sample) == 0
    assert total(Cider(), sample, said("", "")) > 0


def test_cider_belongs_to_its_set_of_samples():
    sample = said("liver spleen", "liver kidney")
    common = Cider().statistics([sample, said("", "liver cyst"), said("", "lungs are clear")])[0, 0]
    rare = Cider().statistics([sample, said("", "ascites"), said("", "lungs are clear")])[0, 0]
    # "liver" in two of three references weighs log(3/2), the others log 3
    one, three = math.log(3 / 2), math.log(3)
    assert common == pytest.approx(10 * one**2 / (one**2 + three**2) / 4)
    assert rare == pytest.approx(10 / 2 / 4)


def test_cider_of_one_word_that_is_right_is_a_quarter():
    assert Cider().statistics([said("Liver.", "liver"), said("", "spleen")])[0, 0] == pytest.approx(2.5)


def test_cider_of_chinese_is_by_characters():
    rows = Cider().statistics([said("左肺结节", "左肺结节", "zh"), said("肝脏", "肝脏", "zh")])
    assert rows[0, 0] == pytest.approx(10)
    assert rows[1, 0] == pytest.approx(10 * 2 / 4)  # two characters: no triples, no fours


# Exact match and token F1


@pytest.mark.parametrize(
    ("text", "reference", "same", "shared"),
    [
        ("The liver.", "liver", 1, 1),
        ("LIVER", "a liver", 1, 1),
        ("left kidney cyst", "kidney cyst", 0, 2 * 2 / (3 + 2)),
        ("kidney kidney", "kidney", 0, 2 * 1 / (2 + 1)),
        ("cyst kidney", "kidney cyst", 0, 1),
        ("spleen", "liver", 0, 0),
        ("3.5 mL", "35 mL", 0, 1 / 2),
        ("-5 HU", "5 HU", 0, 1 / 2),
        ("1,234 mL", "1234 ml.", 1, 1),
        ("+", "-", 0, 0),
        ("+", "+", 1, 1),
        ("A", "a", 1, 1),
        ("A", "the", 0, 0),
        ("...", "?", 0, 0),
    ],
)
def test_exact_match_and_token_f1_counted_by_hand(text, reference, same, shared):
    assert total(exact_match(), said(text, reference)) == same
    assert total(token_f1(), said(text, reference)) == pytest.approx(shared)


def test_exact_match_and_token_f1_of_chinese_are_by_characters():
    assert total(exact_match(), said("左肺。", "左肺", "zh")) == 1
    assert total(exact_match(), said("右肺", "左肺", "zh")) == 0
    assert total(token_f1(), said("左肺结节。", "右肺结节", "zh")) == pytest.approx(3 / 4)
    assert total(exact_match(), said("。", "。", "zh")) == 1


def test_squad_words_keep_what_makes_a_number():
    assert squad_words("An area of (-5.5) HU, T2-weighted; the 5-10 mm.") == [
        *("area", "of", "-5.5", "hu", "t2weighted", "510", "mm"),
    ]


# What is not installed


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("sacrebleu.metrics", lambda: CorpusBleu(4)),
        ("sacrebleu.metrics", released_bleu),
        ("rouge_score.rouge_scorer", lambda: rouge("rouge1")),
        ("nltk", meteor),
        ("pycocoevalcap.cider.cider", Cider),
        ("bert_score.utils", BertScore),
        ("nltk", text_metrics),
    ],
)
def test_a_missing_library_is_an_error_with_the_pip_command(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'm3d-lamed\[bench\]'"):
        make()


# BERTScore


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A BERT of three layers that knows nothing, in a folder that bert_score by itself would take for a T5."""
    folder = tmp_path_factory.mktemp("not_a_t5")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "mass", "liver", "left", "right", "lung", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    return folder


def matched_by_hand(folder, layer, text, reference):
    """Every token's best cosine in the other text, both ways; [CLS] and [SEP] are matched, but seek no match."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [
            model(**tokenizer(one, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
            for one in (text, reference)
        ]
    cosines = torch.nn.functional.cosine_similarity(states[0][:, None], states[1][None], dim=-1)
    precision, recall = cosines.max(dim=1).values[1:-1].mean(), cosines.max(dim=0).values[1:-1].mean()
    return (2 * precision * recall / (precision + recall)).item()


@pytest.mark.parametrize("layer", [1, 3])
def test_bert_score_is_the_match_of_tokens_after_its_layer(checkpoint, layer):
    metric = BertScore(checkpoint, layers=layer)
    pairs = [("no mass in left lung.", "liver mass"), ("right lung", "left lung no mass"), ("mass", "mass")]
    rows = metric.statistics([said(*both) for both in pairs])
    by_hand = [matched_by_hand(checkpoint, layer, *both) for both in pairs]
    np.testing.assert_allclose(rows[:, 0], by_hand, atol=1e-5)
    assert rows[2, 0] == pytest.approx(1, abs=1e-5)
    assert f"{checkpoint.name}, layer {layer} of 3, no idf" in metric.variant
    assert BertScore(checkpoint).variant == BertScore(checkpoint, layers=3).variant


def test_bert_score_of_no_text_is_nothing_and_of_long_and_strange_texts_something(checkpoint):
    metric = BertScore(checkpoint, layers=2, batch_size=2)
    nothing = [said("", "no mass"), said("no mass", " "), said("", "")]
    assert metric.statistics(nothing).tolist() == [[0.0]] * 3
    strange = [
        said("no mass " * 400, "no mass " * 400),
        said("肝脏", "肝脏", "zh"),
        said("...", "?"),
        said("\u200b", "lung"),
    ]
    rows = metric.statistics([*nothing, *strange])
    assert np.isfinite(rows).all()
    assert rows[3:5, 0] == pytest.approx([1, 1], abs=1e-5)
    assert rows[6, 0] == 0  # no token is left of it
    assert metric.reduce(np.array([[1.5]]), np.array([2.0])).tolist() == [0.75]


def test_bert_score_refuses_what_is_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        BertScore(tmp_path)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        BertScore(tmp_path)
    with pytest.raises(ValueError, match=r"layers=4 .* it has 3"):
        BertScore(checkpoint, layers=4)


def test_bert_score_without_a_folder_is_minilm_or_says_how_to_get_it(monkeypatch):
    if importlib.util.find_spec(embedded.MINILM) is not None:
        metric = BertScore()
        near, far = metric.statistics(
            [said("a mass in the liver", "a liver mass"), said("a mass in the liver", "yes")]
        )[:, 0]
        assert 1 > near > far
    monkeypatch.setattr(embedded, "MINILM", "not_installed_at_all")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'm3d-lamed\[bench,text\]'"):
        BertScore()


# RadEval


class SomeRadEval:
    """What RadEval 2.2 is called with, and gives: lists by key."""

    asked: tuple = ()

    def __init__(self, metrics, *, per_sample, show_progress):
        assert per_sample
        assert not show_progress
        self.metrics = metrics

    def __call__(self, refs, hyps):
        SomeRadEval.asked = (self.metrics, refs, hyps)
        return {"radgraph_partial": [0.25] * len(refs), "radgraph_simple": [0.5] * len(refs)}


def test_clinical_measures_ask_radeval_for_single_reports(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=SomeRadEval))
    metric = Clinical("radgraph")
    assert (metric.name, metric.worst, metric.better) == ("RadGraph F1", None, "higher")
    samples = [said("no mass", "a mass"), said("", "a mass"), said("clear", "clear lungs")]
    assert metric.statistics(samples).tolist() == [[0.25], [0.0], [0.25]]
    assert SomeRadEval.asked == (["radgraph"], ["a mass", "clear lungs"], ["no mass", "clear"])
    assert total(metric, *samples) == pytest.approx(0.5 / 3)
    assert metric.statistics([said("", "")]).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="no 'green' of each report but"):
        Clinical("green").statistics(samples)


def test_clinical_measures_need_radeval_and_a_name_that_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    for measure in clinical.CLINICAL:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'm3d-lamed\[clinical\]'"):
            Clinical(measure)
    with pytest.raises(KeyError, match="known: green, "):
        Clinical("radcliq")
