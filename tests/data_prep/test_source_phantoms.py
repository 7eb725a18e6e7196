"""Phantoms as a source: seeds become entries, and absence is certain."""

import pickle
import random

import pytest

from data_prep.openkbp import NAMES
from data_prep.sources.phantoms import Phantoms, left_out

SMALL = {"shape": (24, 24, 16), "spacing": (18.0, 18.0, 16.0)}


def test_seeds_become_entries_of_their_split():
    source = Phantoms(seeds={"test": (7, 8), "train": (0, 2)}, **SMALL)
    entries = list(source.entries())
    assert [(one.image_id, one.patient_id, one.split) for one in entries] == [
        ("phantom_0", "phantom_0", "train"),
        ("phantom_1", "phantom_1", "train"),
        ("phantom_7", "phantom_7", "test"),
    ]
    assert entries[0].files == () and entries[0].license == "Apache-2.0"
    case = pickle.loads(pickle.dumps(entries[0].read))()
    assert case.complete and case.volume.shape == (24, 24, 16) and case.id == "phantom_0"


def test_absent_is_the_share_left_out():
    assert left_out(3, 0.0) == [] and left_out(3, 1.0) == list(NAMES.values())
    # as training draws them: one number a structure, in the order of the labels
    rng = random.Random(5)
    assert left_out(5, 0.3) == [name for name in NAMES.values() if rng.random() < 0.3]
    share = sum(len(left_out(seed, 0.1)) for seed in range(400)) / (400 * 7)
    assert 0.07 < share < 0.13
    (none,) = Phantoms(seeds={"train": (0, 1)}, absent=1.0, **SMALL).entries()
    assert none.read().present == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": {"train": (0, 5), "test": (4, 6)}}, "seed 4 is in train and in test"),
        ({"seeds": {"train": (5, 5)}}, "holds no seed"),
        ({"seeds": {"val": (0, 5)}}, "no split 'val'"),
        ({"absent": 1.5}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Phantoms(**options)
