"""Retrieval: ranks worked out by hand, pools, ties, twins, runs that are killed, and a small pair on phantoms."""

import hashlib
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.prepare import Job, prepare
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.record import Record
from data_prep.sources.phantoms import Phantoms
from data_prep.volume import BadScan
from m3d.bench.embeddings import ClipEmbedder, embed_records, read_embedded
from m3d.bench.metrics.base import Sample
from m3d.bench.metrics.retrieval import metric_named, published_metrics, ranks, standard_metrics
from m3d.bench.retrieval import (
    draw_pools,
    retrieval_samples,
    run_retrieval,
    score_retrieval,
    shuffled,
    similarities,
    subset_pools,
)
from m3d.cli.main import main
from m3d.config import load_config
from m3d.models.clip import load_pair, save_pair
from m3d.recipes import pretrain_clip
from m3d.train.cases import PreparedCase, stored
from m3d.train.pairs import PairCollator
from tests.fixtures import small_store

# Columns are texts. By hand: rows rank their own 1, 2, 1, 3; columns theirs 1, 1, 2, 2.
HAND = np.array(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.8, 0.7, 0.1, 0.2],
        [0.1, 0.2, 0.6, 0.5],
        [0.0, 0.3, 0.8, 0.1 + 0.15],
    ]
)
HAND[2, 3] = 0.24
IDS = ("a", "b", "c", "d")


class Table:
    """Vectors by hand: of scan number n (a volume of grey n), and of texts that begin with a number."""

    def __init__(self, scans, texts, name="table"):
        self.rows, self.columns, self.name = np.float32(scans), np.float32(texts), name
        self.seen, self.die_at = [], None

    def about(self):
        return {"kind": self.name}

    def check(self, cases):
        pass

    def scans(self, volumes, media):
        if self.die_at is not None and len(self.seen) >= self.die_at:
            raise KeyboardInterrupt
        numbers = [round(float(volume.mean()) * 255) for volume in volumes]
        self.seen += numbers
        return torch.from_numpy(self.rows[numbers])

    def texts(self, texts):
        return torch.from_numpy(self.columns[[int(text.split()[0]) for text in texts]])


class Broken(PreparedCase):
    def read(self):
        raise BadScan("/stores/mini/jane-doe.npy: cut off")


@pytest.fixture
def case_of(tmp_path):
    def make(number, *texts, patient=None, subsets=(), kind=PreparedCase):
        """Scan ``number``, grey all over, with texts that begin with a number, its own unless said."""
        image, image_id = small_store.stored_image("mini/a", number, tmp_path), f"mini/{number:03d}"
        fields = next(row for row in small_store.image_records(image) if row["task"] == "retrieval")
        patient = patient or f"patient-{number:03d}"
        fields |= {"image_id": image_id, "patient_id": patient, "meta": {"subsets": list(subsets)}}
        fields["media"][0]["image_id"] = image_id
        told = [{"id": f"{image_id}/{place}", "target": {"text": text}} for place, text in enumerate(texts)]
        told = told or [{"id": f"{image_id}/0", "target": {"text": f"{number} is its text"}}]
        records = tuple(Record.model_validate_json(json.dumps(fields | one), strict=True) for one in told)
        image = replace(image, patient_id=patient, media=records[0].media[0])
        array = np.full(small_store.GRID, number, np.uint8)
        return kind(image=image, array=array, labels=small_store.labels(), records=records)

    return make


def asked(cases):
    """Every retrieval record of cases, with its scan."""
    return [(case, record) for case in cases for record in case.records if record.task == "retrieval"]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_table(n, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.normal(size=(n, 8))
    return Table(unit(words + rng.normal(size=(n, 8))), unit(words))


def values(metrics):
    return {one.name: float(one.reduce(one.rows.sum(axis=0)[None], np.array([4.0]))[0]) for one in metrics}


# -- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    assert values(standard_metrics(HAND, IDS, "4")) == {
        "R@1 image to text, pool 4": 0.5,
        "R@5 image to text, pool 4": 1.0,
        "R@10 image to text, pool 4": 1.0,
        "MRR image to text, pool 4": pytest.approx((1 + 1 / 2 + 1 + 1 / 3) / 4),
        "median rank image to text, pool 4": 1.5,
        "R@1 text to image, pool 4": 0.5,
        "R@5 text to image, pool 4": 1.0,
        "R@10 text to image, pool 4": 1.0,
        "MRR text to image, pool 4": pytest.approx((1 + 1 + 1 / 2 + 1 / 2) / 4),
        "median rank text to image, pool 4": 1.5,
    }


def test_what_chance_finds():
    chance = {one.name: one.chance for one in standard_metrics(HAND, IDS, "4")}
    assert chance["R@1 image to text, pool 4"] == 0.25
    assert chance["R@5 image to text, pool 4"] == 1.0  # of four, anyone finds it among five
    assert chance["MRR text to image, pool 4"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert chance["median rank text to image, pool 4"] == 2.5


def test_ties_count_against_the_model():
    found = values(standard_metrics(np.zeros((4, 4)), IDS, "4"))
    assert found["R@1 image to text, pool 4"] == found["R@1 text to image, pool 4"] == 0.0
    assert found["MRR image to text, pool 4"] == 0.25
    assert found["median rank text to image, pool 4"] == 4.0


def test_the_median_of_resampled_ranks_is_numpys():
    rng = np.random.default_rng(3)
    similarity = rng.normal(size=(30, 30))
    ranks = np.array([1 + sum(row > row[place]) for place, row in enumerate(similarity)])
    median = next(m for m in standard_metrics(similarity, [str(n) for n in range(30)], "x") if m.name[:6] == "median")
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=50)
    wanted = [np.median(np.repeat(ranks, row)) for row in weights]
    assert median.reduce(weights @ median.rows, weights.sum(axis=1).astype(float)).tolist() == wanted
    assert np.isnan(median.reduce(np.zeros((1, 30)), np.zeros(1)))[0]


def test_the_released_recall_is_that_of_its_own_lines():
    similarity = np.random.default_rng(5).normal(size=(40, 40)) + 1.5 * np.eye(40)

    def calculate_recall(matrix, k):  # as Bench/eval/eval_itr.py defines it
        order = np.argsort(-matrix, axis=1)[:, :k]
        return np.mean([number in row for number, row in enumerate(order)])

    metrics = published_metrics(similarity, [str(n) for n in range(40)], "40")
    assert [m.name for m in metrics[:3]] == ["R@1 IR, pool 40", "R@5 IR, pool 40", "R@10 IR, pool 40"]
    wanted = [calculate_recall(matrix, k) for matrix in (similarity, similarity.T) for k in (1, 5, 10)]
    assert [metric.rows.mean() for metric in metrics] == pytest.approx(wanted)
    assert [m.name for m in published_metrics(HAND, IDS, "4")] == ["R@1 IR, pool 4", "R@1 TR, pool 4"]


def test_metrics_answer_for_records_of_their_pool_alone(case_of):
    metric = standard_metrics(HAND, ("mini/000/0", "mini/001/0", "mini/002/0", "mini/003/0"), "4")[0]
    records = [case_of(number).records[0] for number in (1, 2, 9)]
    found = metric.statistics([Sample(record=record) for record in records])
    assert found[:2].tolist() == [[0.0], [1.0]]
    assert np.isnan(found[2, 0])


def test_a_metric_is_found_by_its_name():
    median = metric_named("median rank text to image, pool 500")
    assert (median.better, median.reduce(np.array([[0.0, 1.0, 1.0]]), np.array([2.0])).tolist()) == ("lower", [2.5])
    assert metric_named("R@5 IR, pool test100").reduce(np.array([[3.0]]), np.array([4.0])).tolist() == [0.75]
    with pytest.raises(KeyError, match="no retrieval metric"):
        metric_named("Dice")


# -- pools and twins ------------------------------------------------------------------------------------------------


def test_pools_are_nested_and_do_not_depend_on_the_order_of_records():
    ids = [f"r{number:04d}" for number in range(1200)]
    pools = draw_pools(ids)
    assert {name: len(pool) for name, pool in pools.items()} == {"100": 100, "500": 500, "1000": 1000, "1200": 1200}
    assert set(pools["100"]) < set(pools["500"]) < set(pools["1000"]) < set(pools["1200"])
    assert draw_pools(ids[::-1]) == pools
    assert draw_pools(ids, seed=1)["100"] != pools["100"]
    assert list(draw_pools(ids, (100, 500))) == ["100", "500"]
    assert list(draw_pools(ids[:21])) == ["21"]
    assert list(draw_pools([f"r{n}" for n in range(3000)])) == ["100", "500", "1000", "2000"]


def test_shuffled_images_show_another_patient(tmp_path, case_of):
    owners = [0, 0, 0, 1, 1, 2, 3, 4]
    cases = [case_of(number, patient=f"p{owner}") for number, owner in enumerate(owners)]
    embed_records(asked(cases), Table(np.eye(8), np.eye(8)), tmp_path)
    twin = shuffled(read_embedded(tmp_path))
    shown = twin.scans.argmax(axis=1).tolist()
    assert sorted(shown) == list(range(8))
    assert all(owners[mine] != owners[other] for mine, other in enumerate(shown))
    assert np.array_equal(twin.words, np.eye(8))


def test_what_could_not_be_embedded_is_shown_to_nobody(tmp_path, case_of):
    cases = [case_of(number, kind=Broken if number == 2 else PreparedCase) for number in range(5)]
    embed_records(asked(cases), Table(np.eye(5), np.eye(5)), tmp_path)
    twin = shuffled(read_embedded(tmp_path))
    assert np.isnan(twin.scans).all(axis=1).tolist() == [False, False, True, False, False]
    shown = twin.scans[[0, 1, 3, 4]].argmax(axis=1).tolist()
    assert sorted(shown) == [0, 1, 3, 4]
    assert all(mine != other for mine, other in zip([0, 1, 3, 4], shown, strict=True))


def test_of_a_single_scan_that_can_be_read_the_twin_is_itself(tmp_path, case_of):
    embed_records(asked([case_of(0), case_of(1, kind=Broken)]), Table(np.eye(2), np.eye(2)), tmp_path)
    assert shuffled(read_embedded(tmp_path)).scans[0].tolist() == [1.0, 0.0]
    embed_records(asked([case_of(n, kind=Broken) for n in (0, 1)]), Table(np.eye(2), np.eye(2)), tmp_path / "none")
    assert np.isnan(shuffled(read_embedded(tmp_path / "none")).scans).all()


def test_subsets_of_the_data_set_are_pools(case_of):
    subsets = (("test100", "test1k"), ("test1k",), ("test100", "test1k"), ())
    records = [case_of(number, subsets=some).records[0] for number, some in enumerate(subsets)]
    assert subset_pools(records, {"100": "test100", "1000": "test1k"}) == {
        "100": ["mini/000/0", "mini/002/0"],
        "1000": ["mini/000/0", "mini/001/0", "mini/002/0"],
    }
    assert subset_pools(records, {}) == {}
    with pytest.raises(ValueError, match=r"pool 500: 0 .* of subset 'test500' \(there are: test100, test1k\)"):
        subset_pools(records, {"500": "test500"})
    with pytest.raises(ValueError, match=r"pool x: 1 of the records are of subset 'test1k'"):
        subset_pools(records[1:2], {"x": "test1k"})


def test_one_patient_still_gets_other_scans(tmp_path, case_of):
    embed_records(asked([case_of(number, patient="p") for number in range(5)]), Table(np.eye(5), np.eye(5)), tmp_path)
    shown = shuffled(read_embedded(tmp_path)).scans.argmax(axis=1).tolist()
    assert sorted(shown) == list(range(5))
    assert all(mine != other for mine, other in enumerate(shown))


# -- embedding, killed and shared out -------------------------------------------------------------------------------


def test_a_killed_run_goes_on(tmp_path, case_of):
    cases, table = [case_of(number) for number in range(11)], random_table(11)
    run_retrieval(asked(cases), table, tmp_path / "whole", batch=2)
    table.seen, table.die_at = [], 6
    with pytest.raises(KeyboardInterrupt):
        run_retrieval(asked(cases), table, tmp_path / "killed", batch=2)
    with pytest.raises(ValueError, match="5 of 11 records are not embedded yet"):
        score_retrieval(tmp_path / "killed")
    (tmp_path / "killed/retrieval/.12345678.part-half.npz").write_bytes(b"PK")  # what kill -9 leaves of a part
    table.seen, table.die_at = [], None
    run_retrieval(asked(cases), table, tmp_path / "killed", batch=3)
    assert table.seen == [6, 7, 8, 9, 10]
    one, other = (read_embedded(tmp_path / name) for name in ("whole", "killed"))
    assert one.ids == other.ids == tuple(f"mini/{number:03d}/0" for number in range(11))
    assert np.array_equal(one.scans, other.scans)
    assert np.array_equal(one.words, other.words)
    table.seen = []
    run_retrieval(asked(cases), table, tmp_path / "killed")
    assert table.seen == []


def test_processes_share_the_records_out(tmp_path, case_of):
    cases, table = [case_of(number) for number in range(7)], random_table(7)
    run_retrieval(asked(cases), table, tmp_path, shard=(1, 2), batch=2)
    assert table.seen == [1, 3, 5]
    run_retrieval(asked(cases), table, tmp_path, shard=(0, 2), batch=2)
    assert table.seen == [1, 3, 5, 0, 2, 4, 6]
    assert np.array_equal(read_embedded(tmp_path).scans, table.rows)


def test_several_texts_of_a_scan_share_its_vector(tmp_path, case_of):
    """Of three scans the first has texts 0 and 3; it is looked at once, and is two records of the pool."""
    cases, table = [case_of(0, "0 is one", "3 is other"), case_of(1), case_of(2)], Table(np.eye(4), np.eye(4))
    run_retrieval(asked(cases), table, tmp_path, shard=(0, 2), batch=1)
    run_retrieval(asked(cases), table, tmp_path, shard=(1, 2), batch=1)
    assert table.seen == [0, 2, 1]
    kept = read_embedded(tmp_path)
    assert kept.ids == ("mini/000/0", "mini/000/1", "mini/001/0", "mini/002/0")
    assert kept.scans.argmax(axis=1).tolist() == [0, 0, 1, 2]
    assert kept.words.argmax(axis=1).tolist() == [0, 3, 1, 2]
    twin = shuffled(kept).scans.argmax(axis=1).tolist()
    assert (twin[0], sorted(twin[1:])) == (twin[1], [0, 1, 2])
    assert all(mine != other for mine, other in zip([0, 0, 1, 2], twin, strict=True))
    found = score_retrieval(tmp_path)
    # scan 0 finds text 0, and its text 3 (similarity 0) ties with those of 1 and 2 behind text 0: rank 4. Text 0 finds
    # scan 0 in two records, rank 2; text 3 has no similar scan: rank 4
    assert found["metrics"]["MRR image to text, pool 4"]["value"] == pytest.approx((1 + 1 / 4 + 1 + 1) / 4)
    assert found["metrics"]["MRR text to image, pool 4"]["value"] == pytest.approx((1 / 2 + 1 / 4 + 1 + 1) / 4)
    pool = found["pools"]["4"]
    assert (pool["n"], pool["distinct_texts"], pool["distinct_images"], pool["share_their_image"]) == (4, 4, 3, 2)
    assert (pool["ceiling"]["R@1 image to text"], pool["ceiling"]["R@1 text to image"]) == (1.0, 0.5)


def test_only_the_chosen_records_are_embedded(tmp_path, case_of):
    cases, table = [case_of(0, "0 is one", "3 is other"), case_of(1), case_of(2)], Table(np.eye(4), np.eye(4))
    run_retrieval([(cases[0], cases[0].records[1]), (cases[2], cases[2].records[0])], table, tmp_path)
    assert read_embedded(tmp_path).ids == ("mini/000/1", "mini/002/0")
    assert read_embedded(tmp_path).texts == ("3 is other", "2 is its text")
    assert table.seen == [0, 2]


def test_other_models_texts_and_records_are_refused(tmp_path, case_of):
    cases, table = [case_of(number) for number in range(3)], random_table(3)
    run_retrieval(asked(cases), table, tmp_path)
    with pytest.raises(ValueError, match="another run: embedder differ"):
        run_retrieval(asked(cases), Table(table.rows, table.columns, "other"), tmp_path)
    with pytest.raises(ValueError, match="texts_sha256 differ"):
        run_retrieval(asked([*cases[:2], case_of(2, "0 is new")]), table, tmp_path)
    with pytest.raises(ValueError, match="ids, images_sha256, texts_sha256 differ"):
        run_retrieval(asked(cases[:2]), table, tmp_path)


def test_what_cannot_be_asked_is_said(tmp_path, case_of):
    with pytest.raises(ValueError, match="1 scans have a text, of which anyone finds it"):
        run_retrieval(asked([case_of(0)]), random_table(1), tmp_path)
    with pytest.raises(ValueError, match="mini/000/0 is there twice"):
        run_retrieval(asked([case_of(0), case_of(0), case_of(1)]), random_table(2), tmp_path)
    row = small_store.image_records(small_store.stored_image("mini/a", 0, tmp_path))[0]
    boxed = Record.model_validate_json(json.dumps(row), strict=True)
    with pytest.raises(ValueError, match=rf"the record {boxed.id} \({boxed.task}\) has no text"):
        run_retrieval([*asked([case_of(1)]), (case_of(0), boxed)], random_table(2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"about\.json is missing"):
        score_retrieval(tmp_path)
    run_retrieval(asked([case_of(0), case_of(1)]), random_table(2), tmp_path)
    with pytest.raises(ValueError, match="protocol='paper' is not known"):
        score_retrieval(tmp_path, "paper")
    (part,) = (tmp_path / "retrieval").glob("*.npz")
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot be read .*; delete it and run the same again"):
        score_retrieval(tmp_path)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_a_perfect_model_beside_chance_and_its_twin(tmp_path, case_of):
    run_retrieval(asked([case_of(number) for number in range(20)]), Table(np.eye(20), np.eye(20)), tmp_path)
    found = score_retrieval(tmp_path)
    assert (found["n"], found["patients"], found["n_failed"], found["failures"]) == (20, 20, 0, {})
    row = found["metrics"]["R@5 image to text, pool 20"]
    assert (row["value"], row["low"], row["high"], row["n"], row["patients"]) == (1.0, 1.0, 1.0, 20, 20)
    assert (row["chance"], row["times_chance"]) == (0.25, 4.0)
    twin = found["metrics"]["R@1 image to text, pool 20"]
    assert (found["blind"], twin["blind"], twin["gain"], twin["gain_low"]) == ("shuffled", 0.0, 1.0, 1.0)
    median = found["metrics"]["median rank text to image, pool 20"]
    assert (median["value"], median["better"], median["chance"]) == (1.0, "lower", 10.5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_a_twin_there_is_nothing_beside(tmp_path, case_of):
    run_retrieval(asked([case_of(number) for number in range(6)]), random_table(6), tmp_path)
    alone, beside = score_retrieval(tmp_path, twin=False), score_retrieval(tmp_path)
    assert (alone["blind"], beside["blind"]) == (None, "shuffled")
    of_the_twin = {f"{name}{end}" for name in ("blind", "gain") for end in ("", "_low", "_high", "_n")}
    for name, row in beside["metrics"].items():
        assert alone["metrics"][name] == {key: value for key, value in row.items() if key not in of_the_twin}
        assert of_the_twin < set(row)
    assert {row["sight"] for row in retrieval_samples(tmp_path, twin=False)} == {"seeing"}


def test_the_interval_is_over_patients(tmp_path, case_of):
    """Two patients of ten scans: one always found, one never. An interval over scans would not reach 0 and 1."""
    scans = np.eye(20)
    scans[10:] = np.roll(np.eye(20)[10:], 1, axis=0)
    cases = [case_of(number, patient="one" if number < 10 else "other") for number in range(20)]
    run_retrieval(asked(cases), Table(scans, np.eye(20)), tmp_path)
    row = score_retrieval(tmp_path)["metrics"]["R@1 image to text, pool 20"]
    assert (row["value"], row["low"], row["high"], row["patients"]) == (0.5, 0.0, 1.0, 2)


def test_scans_of_the_same_text_tie(tmp_path, case_of):
    """Scans 0 and 1 look and read the same but for the last bit of a text's vector, as padding would leave it."""
    scans = unit(np.eye(6) + 0.1)
    scans[1] = scans[0]
    words = scans.copy()
    words[1, 0] += 1e-7
    cases = [case_of(number) for number in range(2, 6)]
    cases += [case_of(0, "0 is seen"), case_of(1, "0 is seen")]
    jitter = Table(scans, words)
    jitter.texts = lambda texts: torch.from_numpy(
        jitter.columns[[int(text.split()[0]) + (text == "0 is seen" and place % 2) for place, text in enumerate(texts)]]
    )
    run_retrieval(asked(cases), jitter, tmp_path)
    assert not np.array_equal(*read_embedded(tmp_path).words[:2])
    found = score_retrieval(tmp_path)
    pool = found["pools"]["6"]
    assert (pool["n"], pool["distinct_texts"], pool["share_their_text"]) == (6, 5, 2)
    assert pool["ceiling"] == {
        "R@1 image to text": pytest.approx(4 / 6), "R@5 image to text": 1.0, "R@10 image to text": 1.0,
        "R@1 text to image": 1.0, "R@5 text to image": 1.0, "R@10 text to image": 1.0,
    }  # fmt: skip
    assert found["metrics"]["R@1 image to text, pool 6"]["value"] == pytest.approx(4 / 6)  # both of the pair: rank 2
    assert found["metrics"]["MRR image to text, pool 6"]["value"] == pytest.approx((4 + 2 * 1 / 2) / 6)


def test_only_what_is_equal_ties():
    """In float32 these cosines would round to the same number; in float64 the own text stands first."""
    scans = np.float32([[1.0, 2.0**-13], [0.0, 1.0]])
    texts = np.float32([[1.0, 2.0**-13], [1.0, 2.0**-14]])
    product = similarities(scans, texts)
    assert product[0].tolist() == [1 + 2.0**-26, 1 + 2.0**-27]
    assert np.float32(product[0, 0]) == np.float32(product[0, 1])
    assert ranks(product)[0][0] == 1


def test_equal_vectors_tie_wherever_they_stand():
    rng = np.random.default_rng(2)
    scans, texts = (unit(rng.normal(size=(257, 96))).astype(np.float32) for _ in range(2))
    texts[250], texts[120] = texts[0], texts[1]
    scans[7] = np.nan
    product = similarities(scans, texts)
    assert np.array_equal(product[:, 250], product[:, 0])
    assert np.array_equal(product[:, 120], product[:, 1])
    assert np.isneginf(product[7]).all()
    rest = np.arange(257) != 7
    assert np.allclose(product[rest], scans[rest].astype(float) @ texts.astype(float).T, atol=1e-12)


def test_a_scan_that_cannot_be_read_is_last_and_in_nobodys_way(tmp_path, case_of, caplog):
    cases = [case_of(0), case_of(1, kind=Broken), case_of(2)]
    with caplog.at_level(logging.WARNING):
        run_retrieval(asked(cases), Table(np.eye(3), np.eye(3)), tmp_path)
    assert "mini/001 cannot be read: /stores/mini/jane-doe.npy: cut off" in caplog.text
    for protocol, way in (("standard", "image to text"), ("m3d", "IR")):
        found = score_retrieval(tmp_path, protocol)
        assert (found["n"], found["n_failed"], found["failures"]) == (3, 1, {"BadScan": 1})
        assert found["metrics"][f"R@1 {way}, pool 3"]["value"] == pytest.approx(2 / 3)
    rows = {(row["id"], row["sight"]): row for row in retrieval_samples(tmp_path)}
    lost = rows["mini/001/0", "seeing"]
    assert (lost["failure"], lost["text"]) == ("BadScan: its files cannot be read, see the log", "")
    assert "jane-doe" not in json.dumps([*rows.values(), score_retrieval(tmp_path)])
    assert lost["statistics"]["MRR image to text, pool 3"] == [1 / 3]
    assert lost["statistics"]["MRR text to image, pool 3"] == [1 / 3]
    assert rows["mini/002/0", "seeing"]["statistics"]["R@1 text to image, pool 3"] == [1.0]
    twins = [rows[f"mini/{number:03d}/0", "blind"] for number in range(3)]
    assert [twin["text"] for twin in twins] == ["2 is its text", "", "0 is its text"]
    assert [twin["failure"] for twin in twins] == [None, lost["failure"], None]


def test_samples_add_up_to_the_metrics(tmp_path, case_of):
    run_retrieval(asked([case_of(number) for number in range(30)]), random_table(30), tmp_path)
    pools = draw_pools(read_embedded(tmp_path).ids, (10, 30))
    rows = [row for row in retrieval_samples(tmp_path, pools=pools) if row["sight"] == "seeing"]
    found = score_retrieval(tmp_path, pools=pools)
    assert (len(rows), set(found["pools"])) == (30, {"10", "30"})
    for name, metric in found["metrics"].items():
        if not name.startswith("median"):
            own = [row["statistics"][name][0] for row in rows if name in row["statistics"]]
            assert len(own) == (10 if name.endswith("10") else 30)
            assert metric["value"] == pytest.approx(sum(own) / len(own))
    assert {row["text"] == row["reference"] for row in rows} == {True, False}
    for row in rows:
        assert (row["text"] == row["reference"]) == bool(row["statistics"]["R@1 image to text, pool 30"][0])


def test_pools_can_be_given(tmp_path, case_of):
    run_retrieval(asked([case_of(number) for number in range(12)]), random_table(12), tmp_path)
    given = {"test4": [f"mini/{number:03d}/0" for number in (7, 1, 3, 2)]}
    found = score_retrieval(tmp_path, "m3d", pools=given)
    assert list(found["metrics"]) == ["R@1 IR, pool test4", "R@1 TR, pool test4"]
    told = b'["mini/001/0", "mini/002/0", "mini/003/0", "mini/007/0"]'
    assert found["pools"]["test4"]["ids_sha256"] == hashlib.sha256(told).hexdigest()
    assert not any(record in json.dumps(found) for record in given["test4"])
    assert score_retrieval(tmp_path, pools={}) == score_retrieval(tmp_path)
    with pytest.raises(ValueError, match="pool x: 1 of its records were not embedded, such as mini/999/0"):
        score_retrieval(tmp_path, pools={"x": ["mini/000/0", "mini/999/0"]})
    with pytest.raises(ValueError, match="pool x: it needs two records or more"):
        score_retrieval(tmp_path, pools={"x": ["mini/000/0", "mini/000/0"]})


def test_no_more_is_compared_than_the_largest_pool(tmp_path, case_of, monkeypatch):
    run_retrieval(asked([case_of(number) for number in range(12)]), random_table(12), tmp_path)
    compared = []

    def counted(scans, texts):
        compared.append((len(scans), len(texts)))
        return similarities(scans, texts)

    monkeypatch.setattr("m3d.bench.retrieval.similarities", counted)
    ids = read_embedded(tmp_path).ids
    score_retrieval(tmp_path, pools={"four": ids[:4], "three": ids[5:8]})
    assert compared == [(3, 3), (4, 4)] * 2  # seeing, then its twin


# -- a small pair on phantoms ---------------------------------------------------------------------------------------

CLIP = """\
stage: pretrain_clip
vision: {width: 16, layers: 1, heads: 2, patch: [4, 4, 6]}
text: {source: small, max_length: 64, small: {vocabulary: 300, width: 16, layers: 1, heads: 2, dropout: 0.0}}
shared_width: 8
volume_pooling: mean
"""


@pytest.mark.integration
def test_a_small_pair_on_phantoms(tmp_path):
    source = Phantoms(seeds={"test": (0, 6)}, absent=0.2, shape=(40, 40, 40), spacing=(12.0, 12.0, 6.0))
    preprocess = Preprocess(
        grid=(16, 16, 24), spacing=(20.0, 16.8, 20.0), intensity=Window(-200, 400), crop=Foreground(above=-400)
    )
    prepare(source.entries(), Job(preprocess=preprocess), tmp_path / "store")
    cases = stored(tmp_path / "store", "test")
    (tmp_path / "clip.yaml").write_text(CLIP)
    given = [f"data.stores=[{tmp_path / 'store'}]", f"output={tmp_path / 'run'}"]
    config = load_config(pretrain_clip.Config, tmp_path / "clip.yaml", given)
    pair, _ = pretrain_clip.build(config, pretrain_clip.texts_of(cases, ("retrieval",)), preprocess)
    save_pair(tmp_path / "clip", pair)

    run_retrieval(asked(cases), tmp_path / "clip", tmp_path / "bench", batch=4, device="cpu")
    kept = read_embedded(tmp_path / "bench")
    scans, words, _ = pretrain_clip.embed(pair.model.eval(), PairCollator(pair.tokenizer), cases, "retrieval")
    order = np.argsort([case.records_at([_first(case)])[0].id for case in cases])
    assert np.allclose(kept.scans, scans.numpy()[order], atol=1e-5)
    assert np.allclose(kept.words, words.numpy()[order], atol=1e-5)

    scores = pretrain_clip.retrieval_scores(scans @ words.T)
    found = score_retrieval(tmp_path / "bench")["metrics"]
    assert len(set(kept.texts)) == 6
    assert found["R@1 image to text, pool 6"]["value"] == pytest.approx(scores["volume_to_text/R@1"])
    assert found["MRR text to image, pool 6"]["value"] == pytest.approx(scores["text_to_volume/MRR"])

    other = replace(pair, preprocess=replace(preprocess, intensity=Window(-100, 400)))
    with pytest.raises(ValueError, match="was prepared differently"):
        run_retrieval(asked(cases), ClipEmbedder(other), tmp_path / "other")


STAGE = """\
stage: pretrain_clip
data: {judged: train, tasks: [retrieval], text: null}
augment: null
vision: {width: 16, layers: 1, heads: 2, patch: [2, 4, 5]}
text: {source: small, max_length: 64, small: {vocabulary: 300, width: 16, layers: 1, heads: 2, dropout: 0.0}}
shared_width: 8
volume_pooling: mean
optim: {lr: 0.003, steps: 2, batch: 2, micro_batch: 2, warmup: 0, eval_every: 2, save_every: 2}
engine: {device: cpu}
"""


@pytest.mark.integration
def test_the_command_asks_what_the_clip_stage_leaves(tmp_path, capsys):
    """No other model is needed, whatever the store was prepared for; and the results are named by the one that is."""
    store = small_store.build(tmp_path / "store")
    (tmp_path / "clip.yaml").write_text(STAGE)
    given = [f"data.stores=[{store}]", f"output={tmp_path / 'small-clip'}"]
    pretrain_clip.main(load_config(pretrain_clip.Config, tmp_path / "clip.yaml", given))
    (tmp_path / "bench.yaml").write_text(json.dumps({"split": "train", "tasks": {"retrieval": {}}}))
    out = str(tmp_path / "out")
    command = ["bench", "run", str(tmp_path / "bench.yaml"), "--data", str(store), "--out", out, "--device", "cpu"]
    assert main(command) == 1
    assert "needs --clip FOLDER or --open-clip MODEL" in capsys.readouterr().err
    assert main([*command, "--clip", str(tmp_path / "small-clip")]) == 0  # the folder of the stage, not of its weights
    assert main(["bench", "score", out]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pair, cases = load_pair(tmp_path / "small-clip" / "model"), stored(store, "train")
    scans, words, _ = pretrain_clip.embed(pair.model.eval(), PairCollator(pair.tokenizer), cases, "retrieval")
    scores = pretrain_clip.retrieval_scores(scans @ words.T)
    metrics = found["tasks"]["retrieval"]["metrics"]
    assert found["model"]["id"] == "small-clip" and list(found["tasks"]) == ["retrieval"]
    assert metrics["R@1 image to text, pool 2"]["value"] == pytest.approx(scores["volume_to_text/R@1"])
    assert metrics["R@1 text to image, pool 2"]["value"] == pytest.approx(scores["text_to_volume/R@1"])
    assert metrics["R@1 image to text, pool 2"]["chance"] == 0.5
    assert "small-clip" in (tmp_path / "out" / "table.md").read_text()


def _first(case):
    return next(number for number, entry in enumerate(case.entries) if entry.task == "retrieval")
