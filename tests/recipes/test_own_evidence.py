"""Evidence as a model's own masks give it, on masks that err in a known way; `test_stages` learns from it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.derived.measures import MEASURES
from m3d.recipes.own_evidence import FOLDER, own_evidence, own_values
from m3d.train import engines
from m3d.train.cases import stored


class Hand:
    """Draws the truth's masks, but for those that are drawn otherwise: ``None`` is an empty one."""

    def __init__(self, **otherwise):
        self.otherwise = otherwise
        self.asked = []
        self.model = SimpleNamespace(seg_head=1, training=False, train=lambda mode: None)

    def __call__(self, case, names):
        self.asked.append((case.id, tuple(names)))
        labels = case.tensors()[1]
        true = {name: case.mask(labels, name).numpy() for name in names}
        return {name: self.otherwise.get(name, lambda mask: mask)(mask) for name, mask in true.items()}


def empty(mask):
    return np.zeros_like(mask)


def right_by_one(mask):
    """W grows to the patient's left."""
    return np.roll(mask, -1, axis=2)


def up_by_one(mask):
    """D grows towards the head."""
    return np.roll(mask, 1, axis=0)


def evidence_of(case):
    records = case.records_at(range(len(case.entries)))
    return {record.id: record.target.evidence for record in records if record.target.evidence}


def measured(case, draw, measure, *names):
    """Own and true values of a measure wherever it is evidence."""
    values = own_values(case, draw)
    return [
        (own, one.value)
        for record, evidence in evidence_of(case).items()
        for own, one in zip(values.get(record, ()), evidence, strict=record in values)
        if one.measure == measure and one.names == names
    ]


@pytest.fixture(scope="module")
def case(phantom_store):
    """A phantom in which the parotids are apart from their neighbours."""
    cases = stored(phantom_store, "train")
    found = [one for one in cases if {"left parotid", "right parotid"} <= set(one.image.names.values())]
    return found[0]


def test_masks_that_are_true_give_the_values_of_the_record(case):
    """Also where the grid is too coarse to measure them: what it does to a value is in neither."""
    values, evidence = own_values(case, Hand()), evidence_of(case)
    assert values and values.keys() <= evidence.keys()
    for record, own in values.items():
        assert own == pytest.approx([one.value for one in evidence[record]], abs=0.01)


def test_a_mask_that_is_empty_is_not_seen_and_takes_along_what_is_compared_with_it(case):
    values, evidence = own_values(case, Hand(**{"left parotid": empty})), evidence_of(case)
    seen = [
        (own is None, "left parotid" in one.names)
        for record, row in values.items()
        for own, one in zip(row, evidence[record], strict=True)
    ]
    assert (True, True) in seen and (False, False) in seen
    assert all(gone == named for gone, named in seen)


def test_what_is_drawn_too_large_measures_as_much_too_much(case):
    grown = {}

    def both(mask):
        wider = mask | np.roll(mask, 1, axis=0)
        grown["voxels"] = int(wider.sum() - mask.sum())
        return wider

    found = measured(case, Hand(**{"left parotid": both}), "volume", "left parotid")
    d, h, w = case.spacing
    assert found and grown["voxels"]
    for own, true in found:
        assert own - true == pytest.approx(grown["voxels"] * d * h * w / 1000, abs=0.02)


def test_what_is_drawn_beside_its_place_lies_beside_it(phantom_store):
    """A voxel further to the patient's right; the offset is that of the first structure from the second."""
    aside = "further right"
    cases = [case for split in ("train", "validation") for case in stored(phantom_store, split)]
    case, (first, second) = next(
        (case, one.names)
        for case in cases
        for evidence in evidence_of(case).values()
        for one in evidence
        if one.measure == aside
    )
    stay = measured(case, Hand(), aside, first, second)
    found = measured(case, Hand(**{first: right_by_one}), aside, first, second)
    assert found and len(found) == len(stay)
    for (moved, _), (own, _) in zip(found, stay, strict=True):
        assert moved - own == pytest.approx(case.spacing[2], abs=0.02)


def test_scans_are_drawn_once_and_a_line_that_was_cut_off_again(phantom_store, tmp_path, monkeypatch):
    cases = stored(phantom_store, "train")
    hand = Hand()
    facts = {"run_sha256": "of the recipe", "data": [{"sha256": "of the store"}], "parents": {}}
    whole = own_evidence(hand, cases, tmp_path, facts)
    assert [one for one, _ in hand.asked] == [case.id for case in cases]
    (path,) = (tmp_path / FOLDER).glob("*-0.jsonl")
    text = path.read_text().rstrip()
    path.write_text(text[: len(text) - 20])  # killed while it wrote the last line
    hand.asked.clear()
    assert own_evidence(hand, cases, tmp_path, facts) == whole
    assert [one for one, _ in hand.asked] == [cases[-1].id]
    hand.asked.clear()
    assert own_evidence(hand, cases, tmp_path, facts) == whole and not hand.asked
    other = facts | {"run_sha256": "of another recipe"}
    assert own_evidence(hand, cases, tmp_path, other) == whole
    assert len(hand.asked) == len(cases)  # what another run has measured is not taken for this one's


def test_a_model_that_draws_nothing_is_refused(tmp_path):
    hand = Hand()
    hand.model.seg_head = None
    with pytest.raises(ValueError, match="needs a model that draws: init has no mask head"):
        own_evidence(hand, [], tmp_path, {})


def test_two_processes_share_the_scans_and_know_all(phantom_store, tmp_path, monkeypatch):
    cases = stored(phantom_store, "train")
    facts = {"run_sha256": "of the recipe", "data": [], "parents": {}}
    monkeypatch.setenv("WORLD_SIZE", "2")

    ranks = threading.local()
    monkeypatch.setattr(engines, "rank", lambda: ranks.number)

    def process(number):
        ranks.number = number
        hand = Hand()
        return own_evidence(hand, cases, tmp_path, facts), hand.asked

    with ThreadPoolExecutor(2) as pool:
        (one, asked), (other, also) = pool.map(process, range(2))
    assert one == other and one
    assert sorted(name for name, _ in asked + also) == sorted(case.id for case in cases)


def test_a_place_is_a_share_of_the_scan_and_not_of_its_grid(case):
    """Drawn a voxel too high, on a grid that is longer than the scan."""
    found = [
        (own, one.value)
        for name in case.image.names.values()
        for own, one in [
            (values[0], evidence[0])
            for record, values in own_values(case, Hand(**{name: up_by_one})).items()
            for evidence in [evidence_of(case)[record]]
            if evidence[0].measure == "below the top" and evidence[0].names == (name,)
        ]
    ]
    body = int(np.argmax(np.abs(case.image.scan_affine[2, :3])))  # the scan's axis along S
    length = abs(case.image.scan_affine[2, body]) * case.image.way.scan_shape[body]
    assert found
    for own, true in found:
        assert true - own == pytest.approx(100 * case.spacing[0] / length, abs=0.02)


def test_what_is_measured_by_an_earlier_program_is_refused(case, monkeypatch):
    monkeypatch.delitem(MEASURES, "volume")
    with pytest.raises(ValueError, match="'volume' is no measure of ours; `m3d data prepare` its store again"):
        own_values(case, Hand())
