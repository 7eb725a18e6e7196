"""Texts without volumes: with the evidence of their answers, and with what is learned of them."""

import re

import pytest
import torch

from data_prep.phantoms import head_neck
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from m3d.train.cases import prepare
from m3d.train.data import VolumeDataset
from m3d.train.reading import WordCollator, Words

PREPROCESS = Preprocess(
    grid=(32, 32, 48),
    spacing=(10, 8.4, 10),
    intensity=Window(-200, 400),
    crop=Foreground(above=-400),
    orientation="SPL",
)
WEIGHTS = {"vqa.closed": 1.0, "vqa.open": 1.0}


@pytest.fixture(scope="module")
def cases():
    job = Job(preprocess=PREPROCESS, derive=("report", "vqa"))
    return [prepare(head_neck(seed, shape=(64, 64, 64), spacing=(8, 8, 4)), job) for seed in (1, 2)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_and_ids):
    return tokenizer_and_ids[0]


def rows(cases, tokenizer, **more) -> list[tuple[list[int], list[int]]]:
    view = Words(tokenizer=tokenizer, weights=WEIGHTS, exchanges=12, **more)
    return [row for item in VolumeDataset(cases, view) for row in item.rows]


@pytest.mark.parametrize(("unseen", "value"), [(0.0, r": *-?[\d.]+ *(mL|mm|HU)"), (1.0, r": *not seen")])
def test_measured_answers_stand_behind_their_values(cases, tokenizer, unseen, value):
    texts = [tokenizer.decode(ids) for ids, _ in rows(cases, tokenizer, measured=1.0, unseen=unseen)]
    measured = [text for text in texts if "Answer:" in text]
    assert len(measured) > len(texts) / 2
    assert sum(bool(re.search(value, text)) for text in measured) > len(measured) / 2
    plain = [tokenizer.decode(ids) for ids, _ in rows(cases, tokenizer)]
    assert not any("Answer:" in text for text in plain)


def test_without_prompts_only_what_the_model_says_is_learned(cases, tokenizer):
    for ids, own in rows(cases, tokenizer, measured=1.0, prompts=False):
        said = tokenizer.decode([one for one in own if one >= 0])
        whole = tokenizer.decode(ids)
        assert len(said) < len(whole) and "?" not in said
        assert not re.search(r": *-?[\d.]+ *(mL|mm|HU)", said.partition("Answer:")[0])
    for ids, own in rows(cases, tokenizer, measured=1.0):
        assert ids == own


def test_padding_is_not_learned(cases, tokenizer):
    view = Words(tokenizer=tokenizer, weights=WEIGHTS, exchanges=4, measured=1.0, max_length=40)
    items = list(VolumeDataset(cases, view))
    batch = WordCollator(pad_token_id=0)(items)
    assert batch["input_ids"].shape == batch["labels"].shape == (8, max(len(ids) for ids, _ in rows_of(items)))
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    assert batch["counts"]["words"] == int((batch["labels"][:, 1:] != -100).sum())
    assert torch.equal(batch["attention_mask"].sum(dim=1), torch.tensor([len(ids) for ids, _ in rows_of(items)]))


def rows_of(items) -> list[tuple[list[int], list[int]]]:
    return [row for item in items for row in item.rows]
