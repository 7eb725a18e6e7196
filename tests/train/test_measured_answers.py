"""Answers that measure first, as training sees them: masks in the order of their names, values that are given."""

import re
from collections import Counter

import pytest

from data_prep.phantoms import head_neck
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from m3d.models import M3DProcessor
from m3d.tasks.codecs import Frac3
from m3d.tasks.evidence import answer_of
from m3d.tasks.naming import named_masks
from m3d.train.augment import Augment
from m3d.train.cases import prepare
from m3d.train.data import Exchanges, VolumeDataset

PREPROCESS = Preprocess(
    grid=(32, 32, 48),
    spacing=(10, 8.4, 10),
    intensity=Window(-200, 400),
    crop=Foreground(above=-400),
    orientation="SPL",
)


@pytest.fixture(scope="module")
def cases():
    job = Job(preprocess=PREPROCESS, derive=("report", "vqa"))
    return [prepare(head_neck(seed, shape=(64, 64, 64), spacing=(8, 8, 4)), job) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def processor(tokenizer_and_ids):
    return M3DProcessor(tokenizer_and_ids[0], PREPROCESS, num_image_tokens=6)


def measuring(processor, **more) -> Exchanges:
    """Answers that measure first, of mirrored pictures too."""
    augment = Augment(flip=1.0, mirror="swap", probability=0.0)
    weights = {"vqa.closed": 1, "vqa.open": 1, "report": 1}
    return Exchanges(processor=processor, codec=Frac3(), weights=weights, augment=augment, exchanges=8, **more)


@pytest.mark.parametrize("unseen", [0.0, 1.0])
def test_answers_that_measure_first_draw_what_they_name_and_learn_no_value(cases, processor, unseen):
    tokenizer, seg = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids("[SEG]")
    seen = Counter()
    for item in VolumeDataset(cases, measuring(processor, measured=1.0, unseen=unseen)):
        for exchange in item.exchanges:
            evidence, answer = answer_of(tokenizer.decode([one for one in exchange.labels if one >= 0]))
            begun = next(place for place, one in enumerate(exchange.labels) if one >= 0)
            whole = answer_of(tokenizer.decode(exchange.ids[begun:]))[0]
            if not evidence:
                assert exchange.masks is None
                continue
            seen["measured"] += 1
            assert answer and not re.search(r": *-?[\d.]+ (mL|mm|HU|percent)", evidence)  # not learned
            assert ("not seen" in whole) == bool(unseen)
            drawn = () if exchange.masks is None else exchange.masks
            assert len(drawn) == exchange.ids.count(seg)
            names = named_masks(whole)
            for name, mask in zip(names, drawn, strict=True):
                seen[name.split()[0]] += 1
                middle = mask[0].nonzero().float().mean(dim=0)[2] / mask.shape[-1]  # W grows to the patient's left
                if name.startswith(("left", "right")):
                    assert (middle > 0.5) == name.startswith("left")
    assert seen["measured"] > 4 and seen["left"] and seen["right"]


def test_evidence_that_does_not_fit_leaves_the_answer_alone(cases, processor):
    whole = list(VolumeDataset(cases, measuring(processor, measured=1.0)))
    longest = max(len(one.ids) for item in whole for one in item.exchanges)
    short = list(VolumeDataset(cases, measuring(processor, measured=1.0, max_length=longest - 1)))
    assert sum(item.lost["not measured"] for item in short) > 0
    assert not any(item.lost["refused"] for item in short)
    assert [len(item.exchanges) for item in short] == [len(item.exchanges) for item in whole]


def test_shares_of_measured_answers_are_shares(processor):
    with pytest.raises(ValueError, match="must be shares"):
        measuring(processor, measured=1.5)
