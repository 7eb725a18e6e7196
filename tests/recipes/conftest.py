"""A store of five phantoms on a grid of 16x16x24, and the sizes of models that learn from it in seconds."""

from pathlib import Path

import pytest

import m3d  # noqa: F401  # puts the torchvision remedy in place before transformers is imported
from data_prep.prepare import Job, prepare
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.sources.phantoms import Phantoms

PHANTOM_GRID = (16, 16, 24)


@pytest.fixture(scope="session")
def phantom_store(tmp_path_factory) -> Path:
    """Three phantoms to learn from, two to measure on."""
    source = Phantoms(
        seeds={"train": (0, 3), "validation": (10, 12)}, absent=0.2, shape=(40, 40, 40), spacing=(12.0, 12.0, 6.0)
    )
    preprocess = Preprocess(
        grid=PHANTOM_GRID,
        spacing=(20.0, 16.8, 20.0),
        orientation="SPL",
        intensity=Window(-200, 400),
        crop=Foreground(above=-400),
    )
    root = tmp_path_factory.mktemp("stores") / "phantoms"
    summary = prepare(source.entries(), Job(preprocess=preprocess), root)
    assert summary.prepared == 5
    return root
