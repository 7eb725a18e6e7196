"""Ranks, chance and pools that are never mixed."""

from types import SimpleNamespace

import pytest
import retrieval_tiny
import torch
from retrieval_tiny import pools_of, scores, table


def test_a_perfect_pair_and_its_chance():
    found = scores(torch.eye(20))
    for way in retrieval_tiny.WAYS:
        row = found[way]["R@5"]
        assert (row["value"], row["low"], row["high"]) == (1.0, 1.0, 1.0)
        assert (row["chance"], row["times_chance"]) == (0.25, 4.0)
        assert found[way]["MRR"]["value"] == 1.0
        assert found[way]["median_rank"] == 1.0


def test_one_that_answers_everything_alike_scores_worst():
    found = scores(torch.zeros(20, 20))["volume_to_text"]
    assert [found[f"R@{k}"]["value"] for k in (1, 5, 10)] == [0.0, 0.0, 0.0]
    assert found["MRR"]["value"] == pytest.approx(1 / 20)
    assert found["MRR"]["chance"] == pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20)


def test_directions_are_told_apart():
    similarity = torch.tensor([[2.0, 3.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    found = scores(similarity)
    assert found["volume_to_text"]["R@1"]["value"] == pytest.approx(2 / 3)  # the first volume prefers the second text
    assert found["text_to_volume"]["R@1"]["value"] == 1.0


def test_some_can_be_looked_for_among_all():
    similarity = torch.tensor([[2.0, 3.0, 0.0], [0.0, 4.0, 0.0], [5.0, 0.0, 1.0]])
    found = scores(similarity, 2)
    assert (found["n"], found["candidates"]) == (2, 3)
    assert found["volume_to_text"]["R@1"]["value"] == 0.5  # the first volume prefers the second text
    assert found["volume_to_text"]["R@1"]["chance"] == pytest.approx(1 / 3)
    assert found["text_to_volume"]["R@1"]["value"] == 0.5  # the first text prefers the third volume
    assert found["text_to_volume"]["mean_rank"] == 1.5


def test_small_pools_have_no_chance_above_one():
    assert scores(torch.eye(3))["volume_to_text"]["R@10"]["chance"] == 1.0


def test_the_interval_is_wide_for_few_scans():
    similarity = torch.eye(20)
    similarity[:10, 0] = 2.0  # nine of twenty scans find another text first
    row = scores(similarity)["volume_to_text"]["R@1"]
    assert row["value"] == pytest.approx(11 / 20)
    error = (0.55 * 0.45 / 20) ** 0.5
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)


@pytest.fixture
def split(monkeypatch):
    """Stores of a name, each with scans of these data sets."""

    def put(**stores: list[str]) -> None:
        cases = {
            name: [SimpleNamespace(image=SimpleNamespace(dataset=dataset)) for dataset in datasets]
            for name, datasets in stores.items()
        }
        monkeypatch.setattr(retrieval_tiny, "stored", lambda root, split, preprocess: cases[root.name])
        monkeypatch.setattr(retrieval_tiny, "paired", lambda found, tasks, where: found)

    return put


def test_data_sets_are_pools_of_their_own(split, tmp_path):
    split(one=["a", "a"], two=["a", "b", "a", "b", "b"])
    pair = SimpleNamespace(preprocess=None)
    found = pools_of([tmp_path / "one", tmp_path / "two"], "validation", "retrieval", pair)
    assert {name: len(cases) for name, cases in found.items()} == {"one": 2, "two/a": 2, "two/b": 3}


def test_pools_that_tell_nothing_are_refused(split, tmp_path):
    split(one=["a", "a"], two=["a", "b", "b"])
    pair = SimpleNamespace(preprocess=None)
    with pytest.raises(ValueError, match="anyone finds it"):
        pools_of([tmp_path / "two"], "validation", "retrieval", pair)
    with pytest.raises(ValueError, match="rename"):
        pools_of([tmp_path / "x" / "one", tmp_path / "y" / "one"], "validation", "retrieval", pair)


def test_the_table_has_both_directions_of_every_pool():
    lines = table({"openkbp": scores(torch.eye(20)), "phantoms": scores(torch.eye(10))}).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| openkbp | 20 of 20 | volume to text | 1.00 (1.00 to 1.00) |")
    assert "4.0 (at most 4.0)" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
