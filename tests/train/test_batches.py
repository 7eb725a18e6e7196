"""Batches around volumes: texts, masks and boxes are those of the picture that is shown."""

import dataclasses
import random

import pytest
import torch

from data_prep.boxes import box_of_mask, to_norm
from data_prep.phantoms import head_neck
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from m3d.models import M3DProcessor
from m3d.models.processing import add_m3d_tokens
from m3d.recipes.tiny import train_tokenizer
from m3d.tasks.codecs import Frac3
from m3d.train.augment import Augment
from m3d.train.batches import Batches, encode_exchange, mirror, narrow, place, spoken
from m3d.train.cases import prepare

WEIGHTS = {"report": 1, "vqa.closed": 1, "vqa.open": 1, "rec.box3d": 1, "reg": 1, "seg.sem": 2}


@pytest.fixture(scope="module")
def case():
    preprocess = Preprocess(
        grid=(32, 32, 48), spacing=(10, 8.4, 10), intensity=Window(-200, 400), crop=Foreground(above=-400)
    )
    phantom = head_neck(1, shape=(64, 64, 64), spacing=(8, 8, 4), without=["larynx"])
    return prepare(phantom, Job(preprocess=preprocess)), preprocess


@pytest.fixture(scope="module")
def batches(case):
    tokenizer = train_tokenizer([case[0]], 600)
    add_m3d_tokens(tokenizer)
    processor = M3DProcessor(tokenizer, case[1], num_image_tokens=12)
    return Batches(
        cases=[case[0]], processor=processor, codec=Frac3(), weights=WEIGHTS, augment=Augment(), exchanges=10, seed=3
    )


def said(batches, row: torch.Tensor) -> str:
    return batches.processor.tokenizer.decode(row[row >= 0].tolist())


def test_only_answers_are_learned(batches):
    tokenizer = batches.processor.tokenizer
    ids, labels = encode_exchange(tokenizer, "Where is the mandible?", "There is no mandible in this scan.")
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == " There is no mandible in this scan.</s>"
    assert tokenizer.decode(ids) == "<s>Where is the mandible? There is no mandible in this scan.</s>"


def test_a_step_repeats_and_steps_differ(batches):
    first, again, other = batches.draw(5), batches.draw(5), batches.draw(6)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert not torch.equal(first.pixel_values, other.pixel_values)


def test_every_seg_has_its_mask(batches, case):
    seg = batches.processor.tokenizer.convert_tokens_to_ids("[SEG]")
    for step in range(5):
        batch = batches.draw(step)
        count = int((batch.input_ids == seg).sum())
        assert batch.masks.shape == (count, 1, 32, 32, 48)
        assert len(batch.mask_volume) == count
        assert batch.masks.flatten(1).any(dim=1).all()
        assert len(batch.volume_index) == len(batch.input_ids) == len(batch.ids)


def test_boxes_in_the_text_are_those_of_the_moved_picture(case):
    prepared, _ = case
    image, labels = prepared.tensors()
    generator = torch.Generator().manual_seed(1)
    after = Augment(probability=1.0)(image, labels, prepared.spacing, generator, sides=True)
    assert not torch.equal(after.labels, labels)
    record = next(r for r in prepared.records if r.task == "rec.box3d" and r.prompt.slots.get("object") == "mandible")
    placed = place(record, prepared, after.labels)
    jaw = prepared.mask(after.labels, "mandible")
    expected = to_norm(box_of_mask(jaw.numpy(), "mandible"), jaw.shape)
    (box,) = placed.target.boxes
    assert (box.lo, box.hi, box.frame, box.name) == (expected.lo, expected.hi, "norm", "mandible")
    bone = after.image[jaw].mean()
    assert (
        bone > after.image[prepared.mask(after.labels, "right parotid")].mean()
    )  # picture and labels moved together: the mandible is still bone


def test_augmentation_keeps_volumes_and_sides(case):
    prepared, _ = case
    image, labels = prepared.tensors()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        moved = Augment(probability=1.0)(image, labels, prepared.spacing, generator, sides=True).labels[0]
        for value in (3, 4, 7):
            before, after = int((labels[0] == value).sum()), int((moved == value).sum())
            assert abs(after - before) <= max(4, 0.25 * before)
        centre = {value: float((moved == value).nonzero()[:, 2].float().mean()) for value in (3, 4)}
        assert centre[4] > centre[3]  # W grows to the patient's left


def test_absence_is_said_only_where_it_is_certain(case):
    prepared, _ = case
    absent = [r for r in prepared.records if r.task == "seg.sem" and not r.target.masks]
    assert [r.prompt.slots for r in absent] == [{"object": "larynx"}]
    assert all(r.meta["derivation"] for r in prepared.records)


def test_narrow_keeps_at_most_two_and_their_order_in_the_text(case):
    prepared, _ = case
    record = next(r for r in prepared.records if r.task == "seg.sem" and len(r.target.masks) > 2)
    some = narrow(record, random.Random(0))
    assert 1 <= len(some.target.masks) <= 2
    assert some.prompt.slots["objects"] == [mask.name for mask in some.target.masks]


def test_a_mirrored_picture_is_told_mirrored(case):
    prepared, _ = case
    record = next(r for r in prepared.records if r.prompt.slots.get("object") == "left parotid")
    other = mirror(record)
    assert other.prompt.slots["object"] == "right parotid"
    assert [box.name for box in other.target.boxes] == ["right parotid"]
    assert mirror(other) == record


def test_what_a_turn_makes_false_is_not_said_of_a_turned_picture(case, batches):
    prepared, _ = case
    bound = {record.id for record in prepared.records if record.meta.get("pose") == "fixed"}
    assert bound
    assert bound < {record.id for record in prepared.records}
    still = dataclasses.replace(batches, augment=None, exchanges=6)
    moving = dataclasses.replace(batches, augment=Augment(probability=1.0), exchanges=6)
    assert any(set(still.draw(step).ids) & bound for step in range(3))
    assert not any(set(moving.draw(step).ids) & bound for step in range(3))


def test_texts_that_speak_of_sides_keep_the_picture_as_it_is(case, batches):
    prepared, preprocess = case
    left = batches.draw(0)
    flipping = dataclasses.replace(batches, augment=Augment(probability=0.0, flip=1.0, mirror="unless_sided"))
    for step in range(4):
        chosen = flipping.draw(step)
        assert torch.equal(chosen.pixel_values, dataclasses.replace(batches, augment=None).draw(step).pixel_values)
    assert any("parotid" in text for text in spoken(prepared.records))
    assert left.pixel_values.shape[1:] == (1, *preprocess.grid)
