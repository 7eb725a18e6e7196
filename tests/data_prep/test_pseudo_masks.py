"""Pseudo-masks: regions whose answer is known, and the files beside a store."""

import json

import numpy as np
import pytest

from data_prep.pseudo import PseudoMasks, felzenszwalb, pseudo_labels
from data_prep.pseudo_store import has_pseudo, pseudo_path, read_pseudo, write_pseudo
from data_prep.store import Store, unpack
from data_prep.volume import BadScan
from m3d.cli.main import main
from tests.fixtures.small_store import build

SHAPE = (12, 16, 20)
BLOCKS = {0.3: np.s_[1:11, 1:15, 1:8], 0.6: np.s_[1:11, 1:15, 8:19], 0.9: np.s_[4:8, 5:11, 11:16]}


def blocks(noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Air, two blocks beside each other, and a third within the second: grey values and which block is where.

    With noise the scale must be large against its steps: a component of n voxels takes a step of scale / n.
    """
    volume, truth = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, int)
    for number, (grey, place) in enumerate(BLOCKS.items(), start=1):
        volume[place], truth[place] = grey, number
    grain = np.random.default_rng(0).uniform(-noise, noise, SHAPE).astype(np.float32)
    return np.where(truth > 0, volume + grain, 0), truth


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = set(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_blocks_of_one_grey_value_are_found_exactly():
    volume, truth = blocks()
    found = pseudo_labels(volume, PseudoMasks(scale=3.0, largest=1.0))
    assert same_partition(found, truth)
    assert (found == 0).sum() == (truth == 0).sum()  # air is no region
    sizes = np.bincount(found.ravel())[1:]
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)  # numbered from the largest on
    assert np.array_equal(found, pseudo_labels(volume.copy(), PseudoMasks(scale=3.0, largest=1.0)))


def test_what_is_too_small_joins_a_neighbour_and_what_is_too_large_is_none():
    volume, truth = blocks()
    inner = (truth == 3).sum()
    joined = pseudo_labels(volume, PseudoMasks(scale=3.0, smallest=(inner + 1) / volume.size, largest=1.0))
    assert same_partition(joined, np.where(truth == 3, 2, truth))
    lone, _ = blocks()
    lone[:] = 0
    lone[5:7, 5:7, 5:7] = 0.5
    assert pseudo_labels(lone, PseudoMasks(smallest=9 / lone.size, largest=1.0)).max() == 0  # with nobody to join
    body = (truth > 0).sum()
    kept = pseudo_labels(volume, PseudoMasks(scale=3.0, largest=((truth == 1).sum() + 1) / body))
    assert same_partition(kept, np.where(truth == 2, 0, truth))


def test_the_merge_rule_by_hand():
    """A row of voxels 0 .1 .2 | .7: costs .1 .1 .5, and a third of the scale bounds what joins the first three."""
    row = np.array([0.0, 0.1, 0.2, 0.7]).reshape(1, 1, 4)
    # {0,1}: bound .1 + k/2; {0,1,2}: .1 + k/3; the last voxel alone has the bound k
    assert felzenszwalb(row, scale=1.1).ravel().tolist() == [1, 1, 1, 2]  # .5 > .1 + 1.1/3
    assert felzenszwalb(row, scale=1.3).ravel().tolist() == [1, 1, 1, 1]  # .5 <= .1 + 1.3/3
    assert felzenszwalb(row, scale=0.05).ravel().tolist() == [1, 2, 3, 4]  # .1 > .05
    pairs = np.array([0.0, 0.1, 0.7, 0.75]).reshape(1, 1, 4)
    assert felzenszwalb(pairs, scale=0.01, min_size=2).ravel().tolist() == [1, 1, 2, 2]  # two of two are enough
    assert felzenszwalb(pairs, scale=0.01, min_size=3).ravel().tolist() == [1, 1, 1, 1]
    where = np.array([1, 1, 0, 1], bool).reshape(1, 1, 4)
    assert felzenszwalb(row, scale=9.0, where=where).ravel().tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"sigma": -1.0}, {"smallest": 0.0}, {"smallest": 0.5}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PseudoMasks(**wrong)


def test_a_store_gets_its_regions_once_and_goes_on_where_it_was(tmp_path):
    root = build(tmp_path / "store")
    store, how = Store(root), PseudoMasks(smallest=0.01)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="stopped"):
        write_pseudo(store, how, progress=stopped_after_one)
    assert not has_pseudo(root) and len(list((root / "pseudo").rglob("*.npz"))) == 1
    found = write_pseudo(store, how)
    assert (found.images, found.there) == (3, 1) and has_pseudo(root)
    assert write_pseudo(store, how).there == 3
    for image in store.images.values():
        assert np.array_equal(read_pseudo(image)[0], pseudo_labels(unpack(image.array()), how))
    assert all(path.read_bytes() == kept for path, kept in before.items())
    with pytest.raises(ValueError, match="other settings"):
        write_pseudo(store, PseudoMasks(scale=1.0))
    assert write_pseudo(store, PseudoMasks(scale=1.0), force=True).there == 0


def stopped_after_one(todo):
    yield todo[0]
    raise RuntimeError("stopped")


def test_regions_of_another_image_and_broken_ones_are_told(tmp_path):
    root = build(tmp_path / "store")
    store = Store(root)
    first, second, _ = store.images.values()
    with pytest.raises(BadScan, match="missing; `m3d data pseudo` makes it"):
        read_pseudo(first)
    write_pseudo(store, PseudoMasks(smallest=0.01))
    pseudo_path(first).write_bytes(pseudo_path(second).read_bytes())
    with pytest.raises(BadScan, match="those of another image"):
        read_pseudo(first)
    pseudo_path(first).write_bytes(b"PK")
    with pytest.raises(BadScan, match="broken"):
        read_pseudo(first)
    assert write_pseudo(store, PseudoMasks(smallest=0.01)).there == 2
    assert read_pseudo(first).shape == (1, *first.media.shape)


def test_the_command(tmp_path, capsys):
    root = build(tmp_path / "store")
    assert main(["data", "pseudo", str(root), "--smallest", "0.01", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["there"]) == (3, 0)
    assert main(["data", "pseudo", str(root)]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main(["data", "verify", str(root), "--workers", "1"]) == 0  # a store with them is still a whole one
