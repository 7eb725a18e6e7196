"""Volumes by index: an item depends on nothing but seed and index, and a batch holds what its texts say."""

import dataclasses
import importlib.util
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_prep.preprocess import Preprocess, Window
from m3d.models import M3DProcessor
from m3d.tasks.codecs import Frac3
from m3d.train.augment import Augment
from m3d.train.cases import Entry, TrainingCase, stored
from m3d.train.data import (
    Collator,
    Exchanges,
    Group,
    Masks,
    VolumeDataset,
    collate_masks,
)
from m3d.train.exchanges import box_targets, choose

WEIGHTS = {"report": 1, "vqa.closed": 1, "vqa.open": 1, "rec.box3d": 1, "reg": 1, "seg.sem": 2, "seg.ref": 1}
_PATH = Path(__file__).parents[1] / "fixtures" / "small_store.py"
_SPEC = importlib.util.spec_from_file_location("small_store_of_training", _PATH)
small_store = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small_store)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return stored(small_store.build(tmp_path_factory.mktemp("data") / "store"), "train")


@pytest.fixture(scope="module")
def processor(tokenizer_and_ids):
    return M3DProcessor(tokenizer_and_ids[0], small_store.PREPROCESS, num_image_tokens=6)


@pytest.fixture(scope="module")
def view(processor):
    return Exchanges(processor=processor, codec=Frac3(), weights=WEIGHTS, augment=Augment(), exchanges=5)


class Named(TrainingCase):
    """A case of nothing but a name and entries of given length."""

    def __init__(self, name: str, *characters: int) -> None:
        self.name, self.entries_ = name, [Entry("report", "", size) for size in characters or (1,)]

    @property
    def id(self) -> str:
        return self.name

    @property
    def entries(self):
        return self.entries_

    def records_at(self, numbers):
        raise AssertionError("reads nothing")

    def read(self):
        return np.zeros((1, 1, 1), np.uint8), np.zeros((0, 1, 1, 1), np.uint8)


class Names:
    """A view that shows the name of the case, the index, and what chance said."""

    def wants(self, case):
        return not case.id.startswith("unwanted")

    def size(self, case, rng):
        return case.entries[0].characters

    def show(self, look):
        return look.case.id, look.index, look.rng.random()


def named(count: int, letter: str = "c") -> list[Named]:
    return [Named(f"{letter}{number}", 10 * (7 * number % count)) for number in range(count)]


# -- order


def test_an_epoch_shows_every_volume_once_and_the_next_in_another_order():
    data = VolumeDataset(named(10), Names(), epochs=2)
    seen = [item[0] for item in data]
    assert len(data) == 20
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(case.id for case in named(10))
    assert seen[:10] != seen[10:]


def test_an_item_is_a_function_of_seed_and_index():
    one, other = VolumeDataset(named(10), Names(), epochs=3), VolumeDataset(named(10), Names(), epochs=3)
    order = random.Random(0).sample(range(30), 30)
    apart = {index: other[index] for index in order}
    assert [one[index] for index in range(30)] == [apart[index] for index in range(30)]
    assert [VolumeDataset(named(10), Names(), seed=1)[index] for index in range(10)] != [one[i] for i in range(10)]
    longer = VolumeDataset(named(10), Names(), length=45)
    assert len(longer) == 45 and longer[29] == one[29] and longer[44]
    with pytest.raises(IndexError):
        one[30]


def test_groups_are_mixed_by_weight():
    groups = [
        Group(cases=named(8, "a")), Group(cases=named(6, "b"), weight=0.5), Group(cases=named(2, "c"), weight=3.0),
        Group(cases=named(4, "d"), weight=0.0),
    ]  # fmt: skip
    data = VolumeDataset(groups, Names(), epochs=2)
    assert data.images == 8 + 3 + 6
    seen = Counter(item[0] for item in data)
    assert seen == {**{f"a{n}": 2 for n in range(8)}, **{f"b{n}": 1 for n in range(6)}, "c0": 6, "c1": 6}
    first = Counter(data[index][0][0] for index in range(17))
    assert first == {"a": 8, "b": 3, "c": 6}


def test_cases_with_nothing_to_show_are_left_out():
    assert VolumeDataset([Named("unwanted"), Named("c")], Names()).images == 1
    with pytest.raises(ValueError, match="none of 1 cases has anything for this stage"):
        VolumeDataset([Named("unwanted")], Names())
    with pytest.raises(ValueError, match=r"weight=-1 of cases must be 0 or more"):
        Group(cases=[], weight=-1)


def test_volumes_of_similar_length_stand_together():
    def padding(data) -> int:
        sizes = [int(data[index][0][1:]) * 7 % 64 for index in range(len(data))]
        return sum(4 * max(sizes[at : at + 4]) - sum(sizes[at : at + 4]) for at in range(0, len(sizes), 4))

    plain = VolumeDataset(named(64), Names(), epochs=3)
    grouped = VolumeDataset(named(64), Names(), epochs=3, window=32, chunk=4)
    for epoch in range(3):
        assert len({grouped[index][0] for index in range(64 * epoch, 64 * epoch + 64)}) == 64
    assert padding(grouped) < 0.35 * padding(plain)
    again = VolumeDataset(named(64), Names(), epochs=9, window=32, chunk=4)
    assert again[100] == grouped[100]  # without the items before it, and whatever the length
    draws = [grouped.draw_at(index) for index in range(192)]
    assert sorted(draws) == list(range(192)) and draws != sorted(draws)


def test_groups_of_similar_length_begin_where_a_step_begins():
    data = VolumeDataset(named(10), Names(), epochs=2, window=10, chunk=4)
    sizes = [int(data[index][0][1:]) * 7 % 10 for index in range(20)]
    assert sorted(sizes[:10]) == sorted(sizes[10:]) == list(range(10))
    step = sorted(sizes[12:16])  # the epoch begins within a step: its first two complete that one
    assert step == list(range(step[0], step[0] + 4))


@pytest.mark.parametrize(("epochs", "length"), [(1, 12), (2, 20), (2.5, 28)])
def test_epochs_end_with_a_whole_step(epochs, length):
    """A last step that began again at the first item would simulate two kinds of prompts, and ranks part."""
    data = VolumeDataset(named(10), Names(), epochs=epochs, chunk=4)
    assert len(data) == length
    assert len({data[index][0] for index in range(10)}) == 10
    assert data[length - 1] != data[0]  # the next of an endless row, not the first again
    with pytest.raises(IndexError):
        data[length]


# -- reading


def test_a_store_is_listed_without_reading_voxels(tmp_path, monkeypatch):
    root = small_store.build(tmp_path / "store")
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("read voxels"))
    found = stored(root, "train")
    assert [case.id for case in found] == ["mini/a", "mini/c"]
    assert [entry.task for entry in found[0].entries] == [record.task for record in found[0].records]
    assert [record.id for record in found[1].records_at([8, 0])] == ["mini/c/8", "mini/c/0"]
    with pytest.raises(ValueError, match="no image is in split 'test'; it has train, validation"):
        stored(root, "test")
    with pytest.raises(ValueError, match="was prepared differently"):
        stored(root, "train", preprocess=Preprocess(grid=small_store.GRID, intensity=Window(0, 1)))


def test_a_broken_line_is_named(tmp_path):
    root = small_store.build(tmp_path / "store")
    path = root / "records.jsonl"
    path.write_text(path.read_text().replace('"task"', '"tsk"', 1))
    with pytest.raises(ValueError, match=r"records.jsonl:1: no record .*m3d data verify"):
        stored(root, "train")


def test_arrays_are_kept_up_to_a_limit(monkeypatch):
    reads = Counter()
    monkeypatch.setattr(Named, "read", lambda self: (reads.update([self.id]), (np.zeros(100, np.uint8),) * 2)[1])
    roomy = VolumeDataset(named(3), Names(), epochs=4, cache_bytes=600)
    assert len(list(roomy)) == 12 and reads == {"c0": 1, "c1": 1, "c2": 1}
    reads.clear()
    none = VolumeDataset(named(3), Names(), epochs=4)
    assert len(list(none)) == 12 and set(reads.values()) == {4} and none.memory.used == 0
    tight = VolumeDataset(named(3), Names(), epochs=4, cache_bytes=450)
    list(tight)
    assert tight.memory.used <= 450 and len(tight.memory.kept) == 2


# -- batches


def test_a_batch_holds_what_its_texts_say(cases, view, processor):
    data = VolumeDataset(cases, view, seed=3, epochs=4)
    collate = Collator(processor=processor, global_batch=2)
    seg, image = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("[SEG]", "<im_patch>"))
    for at in range(0, len(data), 2):
        batch = collate([data[at], data[at + 1]])
        counts = batch["counts"]
        assert batch["pixel_values"].shape == (2, 1, *small_store.GRID)
        assert int((batch["input_ids"] == seg).sum()) == counts["masks"] == len(batch["masks"])
        assert batch["masks"].flatten(1).any(dim=1).all() and len(batch["mask_volume"]) == counts["masks"]
        assert int((batch["input_ids"] == image).sum()) == 6 * len(batch["volume_index"]) == 12
        assert counts["text"] == int((batch["labels"][:, 1:] != -100).sum()) > 0
        assert counts["exchanges"] == len(batch["ids"]) == len(set(batch["ids"])) or counts["masks"]
        assert batch["turn"] == at // 2
        assert counts["prompted"] == len(batch["prompted"]) == len(batch["prompt_seeds"]) <= 4
        assert batch["input_ids"].shape[1] % 8 == 0


def test_items_do_not_depend_on_what_stands_beside_them(cases, view, processor):
    data, collate = VolumeDataset(cases, view, seed=3, epochs=4), Collator(processor=processor)
    numbers = []
    for at in range(0, 8, 2):
        both, alone = collate([data[at], data[at + 1]]), collate([data[at + 1]])
        own, number = both["mask_volume"] == 1, len(alone["prompted"])
        assert torch.equal(both["masks"][own], alone["masks"])
        assert both["prompt_seeds"][len(both["prompted"]) - number :] == alone["prompt_seeds"]
        assert (both["prompted"][len(both["prompted"]) - number :] - (~own).sum()).tolist() == alone[
            "prompted"
        ].tolist()
        numbers.append(number)
    assert sum(numbers) > 2


def test_workers_give_what_the_main_process_gives(cases, view, processor):
    data = VolumeDataset(cases, view, seed=3, epochs=2)
    collate = Collator(processor=processor)
    here = list(DataLoader(data, batch_size=2, collate_fn=collate))
    there = list(DataLoader(data, batch_size=2, collate_fn=collate, num_workers=2))
    for one, other in zip(here, there, strict=True):
        assert one["ids"] == other["ids"] and one["seed"] == other["seed"]
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_masks_in_a_batch_are_those_of_the_names_in_its_text(cases, processor):
    view = Exchanges(processor=processor, codec=Frac3(), weights={"seg.sem": 1}, exchanges=1)
    for index in range(6):
        item = VolumeDataset(cases, view, epochs=3)[index]
        (exchange,) = item.exchanges
        text = processor.tokenizer.decode([token for token in exchange.labels if token >= 0])
        for mask, place in zip(exchange.masks, _places(text), strict=True):
            lo, hi = small_store.LIVER if place == "liver" else small_store.SPLEEN
            expected = torch.zeros(1, *small_store.GRID, dtype=torch.bool)
            expected[0, lo[0] : hi[0], lo[1] : hi[1], lo[2] : hi[2]] = True
            assert torch.equal(mask, expected)


def _places(text: str) -> list[str]:
    """The structures before each [SEG], in order."""
    return [max(("liver", "spleen"), key=part.lower().rfind) for part in text.split("[SEG]")[:-1]]


def test_what_a_turn_makes_false_is_not_said_of_a_turned_picture(cases):
    entries = [dataclasses.replace(entry, fixed=number % 2 == 0) for number, entry in enumerate(cases[0].entries)]
    drawn = [number for seed in range(20) for number in choose(entries, WEIGHTS, 3, random.Random(seed), moving=True)]
    assert drawn and not any(entries[number].fixed for number in drawn)
    still = [number for seed in range(20) for number in choose(entries, WEIGHTS, 3, random.Random(seed))]
    assert any(entries[number].fixed for number in still)


def test_texts_that_speak_of_sides_keep_the_picture_as_it_is(cases, processor):
    still = Exchanges(processor=processor, codec=Frac3(), weights={"seg.ref": 1})
    flips = dataclasses.replace(still, augment=Augment(probability=0.0, flip=1.0, mirror="unless_sided"))
    for index in range(2):  # "the right half of the diaphragm"
        shown = VolumeDataset(cases, flips)[index]
        assert shown.exchanges and torch.equal(shown.pixels, VolumeDataset(cases, still)[index].pixels)
    plain = dataclasses.replace(flips, weights={"vqa.open": 1})
    assert not torch.equal(VolumeDataset(cases, plain)[0].pixels, VolumeDataset(cases, still)[0].pixels)


def test_a_budget_of_tokens_ends_a_row(cases, processor):
    view = Exchanges(processor=processor, codec=Frac3(), weights=WEIGHTS, exchanges=50, max_tokens=400)
    item = VolumeDataset(cases, view)[0]
    batch = Collator(processor=processor)([item])
    assert batch["counts"]["tokens"] <= 400 and len(item.exchanges) > 1 and item.lost["over max_tokens"] == 1
    whole = dataclasses.replace(view, max_tokens=None)
    assert Collator(processor=processor)([VolumeDataset(cases, whole)[0]])["counts"]["tokens"] > 400


def test_what_is_too_long_is_cut_without_an_end_or_left_out_and_counted(cases, processor, caplog):
    weights = {"report": 1, "seg.sem": 1}
    view = Exchanges(processor=processor, codec=Frac3(), weights=weights, exchanges=2, max_length=70)
    with caplog.at_level("WARNING"):
        dataset = VolumeDataset(cases, view, epochs=40)
        item = next(item for item in map(dataset.__getitem__, range(40)) if item.lost["cut"] and item.lost["refused"])
    batch = Collator(processor=processor)([item])
    assert (batch["counts"]["cut"], batch["counts"]["refused"]) == (1, 1)
    (report,) = item.exchanges
    assert len(report.ids) == 70 and report.ids[-1] != processor.tokenizer.eos_token_id
    said = {record.message.split(":")[0].split(" were ")[1].split(",")[0] for record in caplog.records}
    assert said == {"cut", "refused"}
    assert "70" in caplog.records[0].message


def test_a_volume_of_which_nothing_is_left_to_say_is_shown_all_the_same(cases, processor):
    view = Exchanges(processor=processor, codec=Frac3(), weights={"seg.sem": 1}, exchanges=1, max_length=20)
    item = VolumeDataset(cases, view)[0]
    batch = Collator(processor=processor)([item])
    assert item.exchanges == () and batch["counts"] == {
        "text": 0, "masks": 0, "boxes": 0, "values": 0, "prompted": 0, "volumes": 1,
            "exchanges": 0, "tokens": 7, "refused": 1,
    }  # fmt: skip
    assert batch["volume_index"].tolist() == [0] and batch["masks"].shape == (0, 1, *small_store.GRID)


def test_weights_that_draw_nothing_are_refused(processor):
    for weights, said in (({}, "one of them above 0"), ({"vqa": 1.0}, "weights: vqa is no task; the tasks are")):
        with pytest.raises(ValueError, match=said):
            Exchanges(processor=processor, codec=Frac3(), weights=weights)
    with pytest.raises(ValueError, match="max_length=5 leaves no room beside the 6 tokens of a volume"):
        Exchanges(processor=processor, codec=Frac3(), weights=WEIGHTS, max_length=5)


# -- other stages


def test_masks_by_name_for_segmentation_pretraining(cases):
    data = VolumeDataset(cases, Masks(masks=2, absent=1), epochs=2)
    batch = collate_masks([data[0], data[1]])
    assert sorted(batch["names"]) == ["liver", "liver", "spleen", "spleen"]
    assert batch["mask_volume"].tolist() == [0, 0, 1, 1] and batch["counts"] == {"masks": 4, "volumes": 2}
    sizes = {"liver": 3 * 4 * 3, "spleen": 3 * 3 * 3}
    assert batch["masks"].flatten(1).sum(dim=1).tolist() == [sizes[name] for name in batch["names"]]
    assert sorted(batch["ids"]) == ["mini/a", "mini/c"]


def test_what_is_certainly_absent_is_an_empty_mask(tmp_path):
    root = small_store.build(tmp_path / "store")
    for name in small_store.SPLITS:
        labels = small_store.labels()
        labels[labels == 2] = 0
        small_store.save_labels(root, name, labels)
    item = VolumeDataset(stored(root, "train"), Masks(masks=3, absent=1))[0]
    assert item.names == ("liver", "spleen")
    assert item.masks.flatten(1).any(dim=1).tolist() == [True, False]


def test_a_volume_has_so_many_looks_and_each_is_always_the_same(cases, view, processor):
    few = dataclasses.replace(view, looks=2, exchanges=3)
    shown: dict[str, list[torch.Tensor]] = {}
    said: dict[str, set[str]] = {}
    data = VolumeDataset(cases, few, epochs=12)
    for item in map(data.__getitem__, range(len(data))):
        shown.setdefault(item.picture, []).append(item.pixels)
        said.setdefault(item.picture, set()).update(exchange.id for exchange in item.exchanges)
    assert set(shown) == {f"{case.id}/{number}" for case in cases for number in range(2)}
    for same in shown.values():
        assert all(torch.equal(same[0], other) for other in same)
    assert max(map(len, said.values())) > 3  # other things are said of it at other visits


def test_what_is_judged_is_one_look_as_it_is(cases, view):
    still = dataclasses.replace(view, looks=1, augment=None)
    item = VolumeDataset(cases, still)[0]
    assert item.picture == f"{item.id}/as it is"
    assert torch.equal(item.pixels[0], next(case for case in cases if case.id == item.id).tensors()[0])


def test_boxes_of_an_answer_are_those_of_the_picture(cases, processor):
    view = Exchanges(processor=processor, codec=Frac3(), weights={"rec.box3d": 1, "report": 1, "reg": 1}, exchanges=9)
    item = VolumeDataset(cases, view)[0]
    batch = Collator(processor=processor)([item])
    begin = processor.tokenizer.convert_tokens_to_ids("<bx_start>")
    assert len(batch["boxes"]) == (batch["labels"] == begin).sum() == batch["counts"]["boxes"] > 0
    for exchange in item.exchanges:
        if exchange.boxes is None:
            assert "rec.box3d" not in exchange.id  # reg has its box in the question, which is not learned
            continue
        text = processor.tokenizer.decode([token for token in exchange.labels if token >= 0])
        (decoded,) = Frac3().decode(text)
        assert [*decoded.lo, *decoded.hi] == pytest.approx(exchange.boxes[0].tolist(), abs=6e-4)


def test_boxes_that_are_not_the_records_own_are_not_known(cases):
    record = next(one for one in cases[0].records if one.task == "rec.box3d")  # its box is in voxels: not placed yet
    assert torch.isnan(box_targets(record, 2)).all() and box_targets(record, 0) is None
    assert torch.isnan(box_targets(record, 1)).all()
