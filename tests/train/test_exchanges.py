"""What is asked of a volume: drawn by weight, true of the picture that is shown, and in tokens that teach to stop."""

import random
from collections import Counter

import pytest
import torch

from data_prep.boxes import box_of_mask, to_norm
from data_prep.phantoms import head_neck
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.record import Evidence
from m3d.models.processing import encode_exchange
from m3d.train.augment import Augment
from m3d.train.cases import Entry, prepare
from m3d.train.exchanges import choose, mirror, narrow, place, reorder, shorten, shown, spoken

SEG = 99


@pytest.fixture(scope="module")
def case():
    preprocess = Preprocess(
        grid=(32, 32, 48), spacing=(10, 8.4, 10), intensity=Window(-200, 400), crop=Foreground(above=-400)
    )
    phantom = head_neck(1, shape=(64, 64, 64), spacing=(8, 8, 4), without=["larynx"])
    return prepare(phantom, Job(preprocess=preprocess))


def entry(task: str, subtask: str = "", masks: int = 0, images: int = 1) -> Entry:
    return Entry(task, subtask, 10, masks, images)


# -- choosing


def test_tasks_are_drawn_by_weight_and_those_without_weight_never():
    entries = [entry("report") for _ in range(50)] + [entry("vqa.open") for _ in range(5)] + [entry("reg")] * 50
    rng = random.Random(0)
    first = Counter(entries[choose(entries, {"report": 1, "vqa.open": 3}, 1, rng)[0]].task for _ in range(4000))
    assert set(first) == {"report", "vqa.open"}
    assert first["vqa.open"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_rare_subtasks_are_drawn_as_often_as_frequent_ones():
    entries = [entry("vqa.closed", "presence") for _ in range(99)] + [entry("vqa.closed", "count")]
    rng = random.Random(0)
    first = Counter(entries[choose(entries, {"vqa.closed": 1}, 1, rng)[0]].subtask for _ in range(2000))
    assert first["count"] / 2000 == pytest.approx(0.5, abs=0.04)


def test_nothing_is_said_twice_and_what_is_absent_is_passed_over():
    entries = [entry("report"), entry("vqa.open"), entry("compare", images=2)]
    drawn = choose(entries, {"report": 1, "vqa.open": 1, "compare": 5, "seg.sem": 9}, 8, random.Random(0))
    assert sorted(drawn) == [0, 1]


def test_records_of_several_masks_are_other_questions_each_time():
    entries = [entry("seg.sem", "name", masks=5), entry("seg.sem", "name", masks=1)]
    drawn = Counter(choose(entries, {"seg.sem": 1}, 10, random.Random(0)))
    assert drawn == {0: 9, 1: 1}


def test_whole_first_begins_with_most_masks():
    entries = [entry("report"), entry("seg.sem", masks=2), entry("seg.sem", masks=7), entry("seg.sem")]
    weights = {"report": 1.0, "seg.sem": 1e-9}
    assert choose(entries, weights, 2, random.Random(0), whole_first=True)[0] == 2
    assert choose(entries, {"report": 1.0}, 2, random.Random(0), whole_first=True) == [0]


def test_an_entry_knows_its_record_without_reading_it():
    raw = {
        "task": "rec.box3d", "subtask": "name", "media": [{}],
        "prompt": {"template": "m3d.rec.box3d", "slots": {"object": "liver"}}, "target": {"boxes": [{"name": "liver"}]},
    }  # fmt: skip
    assert Entry.of(raw) == Entry("rec.box3d", "name", 5 + 5 + 45, masks=0, images=1)


def test_narrow_keeps_at_most_two_and_their_order_in_the_text(case):
    record = next(r for r in case.records if r.task == "seg.sem" and len(r.target.masks) > 2)
    some = narrow(record, random.Random(0))
    assert 1 <= len(some.target.masks) <= 2
    assert some.prompt.slots["objects"] == [mask.name for mask in some.target.masks]
    everything = reorder(record, random.Random(0))
    assert {mask.name for mask in everything.target.masks} == {mask.name for mask in record.target.masks}


def test_a_segmentation_in_words_of_its_own_is_asked_as_it_stands(case):
    record = next(r for r in case.records if r.task == "seg.sem" and len(r.target.masks) > 2)
    own = record.model_copy(
        update={"prompt": record.prompt.model_copy(update={"template": None, "slots": {}, "text": "Draw all of it."})}
    )
    assert narrow(own, random.Random(0)) is own
    labels = torch.from_numpy(case.labels.copy())
    assert place(own, case, labels) is own
    labels[labels == next(value for value, name in case.image.names.items() if name == own.target.masks[0].name)] = 0
    assert place(own, case, labels) is None


# -- true of the picture


def test_boxes_in_the_text_are_those_of_the_moved_picture(case):
    image, labels = case.tensors()
    generator = torch.Generator().manual_seed(1)
    after = Augment(probability=1.0)(image, labels, case.spacing, generator, sides=True)
    assert not torch.equal(after.labels, labels)
    record = next(r for r in case.records if r.task == "rec.box3d" and r.prompt.slots.get("object") == "mandible")
    placed = place(record, case, after.labels)
    jaw = case.mask(after.labels, "mandible")
    expected = to_norm(box_of_mask(jaw.numpy(), "mandible"), jaw.shape)
    (box,) = placed.target.boxes
    assert (box.lo, box.hi, box.frame, box.name) == (expected.lo, expected.hi, "norm", "mandible")
    bone = after.image[jaw].mean()
    assert bone > after.image[case.mask(after.labels, "right parotid")].mean()  # the mandible is still bone


def test_a_box_without_a_label_stays_where_it_was(case):
    record = next(r for r in case.records if r.task == "rec.box3d" and r.target.boxes)
    boxes = tuple(box.model_copy(update={"name": "nodule"}) for box in record.target.boxes)
    record = record.model_copy(update={"target": record.target.model_copy(update={"boxes": boxes})})
    assert place(record, case, torch.from_numpy(case.labels)).target.boxes == boxes


def test_what_has_left_the_picture_is_not_asked_for(case):
    labels = torch.zeros_like(torch.from_numpy(case.labels))
    some = [record for record in case.records if record.target.boxes or record.target.masks]
    assert some and all(place(record, case, labels) is None for record in some)


def test_augmentation_keeps_volumes_and_sides(case):
    image, labels = case.tensors()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        moved = Augment(probability=1.0)(image, labels, case.spacing, generator, sides=True).labels[0]
        for value in (3, 4, 7):
            before, after = int((labels[0] == value).sum()), int((moved == value).sum())
            assert abs(after - before) <= max(4, 0.25 * before)
        centre = {value: float((moved == value).nonzero()[:, 2].float().mean()) for value in (3, 4)}
        assert centre[4] > centre[3]  # W grows to the patient's left


def test_absence_is_said_only_where_it_is_certain(case):
    absent = [r for r in case.records if r.task == "seg.sem" and not r.target.masks]
    assert [r.prompt.slots for r in absent] == [{"object": "larynx"}]
    assert all(r.meta["derivation"] for r in case.records)


def test_a_mirrored_picture_is_told_mirrored(case):
    record = next(r for r in case.records if r.prompt.slots.get("object") == "left parotid")
    other = mirror(record)
    assert other.prompt.slots["object"] == "right parotid"
    assert [box.name for box in other.target.boxes] == ["right parotid"]
    assert mirror(other) == record
    assert "left parotid" in set(spoken([record]))


# -- in tokens


def test_evidence_is_told_of_the_mirrored_picture(case):
    offset = {"measure": "further right", "names": ("left parotid", "brainstem"), "value": -40.0, "unit": "mm"}
    height = {"measure": "higher", "names": ("left parotid", "right parotid"), "value": 5.0, "unit": "mm"}
    record = next(one for one in case.records if one.task == "vqa.open")
    evidence = tuple(Evidence(**one) for one in (offset, height))
    record = record.model_copy(update={"target": record.target.model_copy(update={"evidence": evidence})})
    other = mirror(record)
    assert [(one.measure, one.names, one.value) for one in other.target.evidence] == [
        ("further left", ("right parotid", "brainstem"), -40.0),
        ("higher", ("right parotid", "left parotid"), 5.0),
    ]
    assert mirror(other) == record
    said = set(spoken([record]))
    assert {"further right", "higher", "left parotid", "brainstem"} <= said  # so it is not turned upside down


def test_evidence_is_shown_where_all_of_it_is_in_the_picture_and_labelled(case):
    record = next(one for one in case.records if one.target.evidence and one.target.evidence[0].names == ("brainstem",))
    labels = torch.from_numpy(case.labels).clone()
    assert shown(record.target.evidence, case, labels)
    other = [record.target.evidence[0].model_copy(update={"names": ("liver",)})]
    assert not shown([*record.target.evidence, *other], case, labels)
    labels[case.mask(labels, "brainstem")[None].expand_as(labels)] = 0
    assert not shown(record.target.evidence, case, labels)
    assert place(record, case, labels) is record  # the question can still be answered, without evidence


def test_given_words_are_not_learned(tokenizer_and_ids):
    tokenizer, _ = tokenizer_and_ids
    prompt, answer = "How large?", "liver [SEG] volume: 24 mL. Answer: 24 mL"
    place = answer.index(" 24")
    ids, plain = encode_exchange(tokenizer, prompt, answer)
    same, labels = encode_exchange(tokenizer, prompt, answer, [(place, place + 6)])
    assert same == ids
    silent = [token for token, before, now in zip(ids, plain, labels, strict=True) if before != now]
    assert tokenizer.decode(silent).strip() == "24 mL"
    assert all(now == -100 for before, now in zip(plain, labels, strict=True) if before != now)


def test_only_answers_are_learned(tokenizer_and_ids):
    tokenizer, _ = tokenizer_and_ids
    ids, labels = encode_exchange(tokenizer, "Where is the mandible?", "There is no mandible in this scan.")
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == " There is no mandible in this scan.</s>"
    assert tokenizer.decode(ids) == "<s>Where is the mandible? There is no mandible in this scan.</s>"


def test_a_tokenizer_that_ends_texts_itself_gives_one_end(tokenizer_and_ids):
    class Ends:
        eos_token_id = 2

        def __call__(self, text, **_):
            return {"input_ids": [1, 5, 6, 2], "offset_mapping": [(0, 0), (0, 4), (4, 6), (0, 0)]}

    assert encode_exchange(Ends(), "Why?", "A") == ([1, 5, 6, 2], [-100, -100, 6, 2])


def test_a_cut_answer_does_not_learn_to_end():
    ids, labels = [1, 5, 6, 7, 8, 2], [-100, -100, 6, 7, 8, 2]
    assert shorten(ids, labels, 6, SEG) == (ids, labels) == shorten(ids, labels, None, SEG)
    assert shorten(ids, labels, 4, SEG) == ([1, 5, 6, 7], [-100, -100, 6, 7])


def test_an_answer_that_draws_is_not_cut_and_an_empty_one_not_kept():
    assert shorten([1, 5, SEG, 7, 8, 2], [-100, -100, SEG, 7, 8, 2], 5, SEG) is None
    assert shorten([1, 5, 6, 7, 8, 2], [-100, -100, -100, -100, 8, 2], 4, SEG) is None
