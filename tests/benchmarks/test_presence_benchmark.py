"""Patients of whom a part is shown: what is certain of it, and that the part lies where it lay."""

import dataclasses
import json

import numpy as np
import presence
import pytest
from presence import parts

from tests.fixtures import small_store

GRID, SPACING = (40, 8, 10), (5.0, 2.0, 2.0)
NAMES = {1: "brainstem", 2: "right parotid", 3: "left parotid", 4: "mandible", 5: "larynx", 6: "spinal cord"}
ROWS = {1: (30, 34), 2: (26, 30), 3: (27, 31), 4: (24, 29), 5: (12, 16), 6: (4, 30)}  # first, and one past the last


@pytest.fixture
def patient(tmp_path):
    """Structures that lie in known rows of 5 mm, each row as grey as its number."""
    image = small_store.stored_image("mini/b", 0, tmp_path)
    labels = np.zeros((1, *GRID), np.uint8)
    for value, (first, last) in ROWS.items():
        labels[0, first:last, value, :3] = value
    array = np.broadcast_to(np.arange(GRID[0], dtype=np.uint8)[:, None, None], GRID)
    small_store.save_image(tmp_path, "mini/b", np.ascontiguousarray(array))
    small_store.save_labels(tmp_path, "mini/b", labels)
    media = image.media.model_copy(update={"shape": GRID, "spacing_mm": SPACING})
    return dataclasses.replace(image, media=media, names=NAMES, complete=False)


def test_what_is_certain_of_a_part(patient):
    """10 mm are two rows: the lower part ends at row 22, the upper begins at row 18."""
    lower, upper = parts(patient)
    assert lower[0] == "lower" and lower[1].shape == (22, 8, 10)
    assert lower[2] == {name: False for name in presence.HEAD} | {"larynx": True}  # the cord is cut: nothing is certain
    assert upper[0] == "upper" and upper[1].shape == (22, 8, 10)
    assert upper[2] == {name: True for name in presence.HEAD} | {"larynx": False}


def test_a_part_keeps_its_voxels_and_its_place(patient):
    lower, upper = (volume for _, volume, _ in parts(patient))
    assert np.unique(upper.array).tolist() == pytest.approx(list(range(18, 40)))
    assert lower.affine == pytest.approx(patient.affine)
    assert upper.affine @ [0, 1, 2, 1] == pytest.approx(patient.affine @ [18, 1, 2, 1])


def test_what_is_not_contoured_may_be_anywhere(patient):
    labels = patient.labels()
    labels[labels == 4] = 0
    small_store.save_labels(patient.root, "mini/b", labels)
    ((which, _, known),) = parts(patient)
    assert which == "upper" and "mandible" not in known  # no lower part: the mandible may reach into it


def test_too_little_is_no_scan(patient, monkeypatch):
    monkeypatch.setattr(presence, "MARGIN", 90.0)
    assert list(parts(patient)) == []


def test_nothing_is_measured_without_stores(tmp_path, monkeypatch, capsys):
    words = ["presence.py", "--phantoms", str(tmp_path / "nowhere"), "--openkbp", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    presence.main()
    assert "nothing measured" in capsys.readouterr().out


def test_the_stored_result_is_of_the_shipped_fit():
    """Where both are there, they are of the same weights: whoever replaces these measures again."""
    from m3d.inference.checkpoints import resolve, weights_sha256
    from m3d.inference.presence import PRESENCE_NAME

    folder = resolve("m3d-tiny")
    path = folder / PRESENCE_NAME
    if not path.is_file():
        pytest.skip("the bundled model has no fit")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["fitted"]["weights_sha256"] == weights_sha256(folder)
    measured = json.loads((presence.RESULTS / "presence.json").read_text(encoding="utf-8"))
    assert measured["presence"] == kept


def test_its_tables(tmp_path, monkeypatch):
    import write_tables

    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    none = {"value": None, "low": None, "high": None}
    counts = {"patients": 3, "there": 4, "not there": 0, "ece": 0.125}
    row = {"there": 4, "of these called there": 3, "not there": 0, "of these called not there": 0}
    found = counts | {"auc": none, "brier": share, "there, called there": share, "not there, called not there": none}
    result = {"model": "m", "command": "python x.py", "sets": {"patients": found | {"structures": {"mandible": row}}}}
    (tmp_path / "presence.json").write_text(json.dumps(result))
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)
    text = write_tables.rewrite(
        "<!-- presence --><!-- /presence --> <!-- presence_structures --><!-- /presence_structures -->"
    )
    assert "| patients | 3 | 4 | 0 | - | 0.50 (0.25 to 0.75) | 0.50 (0.25 to 0.75) | - | 0.125 |" in text
    assert "| mandible | 3 of 4 |" in text
