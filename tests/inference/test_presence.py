"""Whether a structure is in the scan: signs against other ways to them, fits against frequencies, files gone wrong."""

import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch

import m3d
from m3d.inference.checkpoints import weights_sha256
from m3d.inference.label_map import write_label_map
from m3d.inference.presence import PRESENCE_NAME, WEIGHED, Presence, Signs, Usual, fit, read_presence, signs_of, weighed
from m3d.models.modeling import NO_HEAD
from tests.fixtures.small_scan import block_scan

PLAIN = Signs(said=0.0, peak=0.0, extent=0.0, inside=0.5, grey=0.5)
BY_WORDS = dict(zip(WEIGHED, (1.0, 0.0, 0.0, 0.0, 0.0), strict=True))


@pytest.fixture(scope="module")
def scan(taught):
    return m3d.load(taught, device="cpu").look(block_scan())


# -- signs ----------------------------------------------------------------------------------------------------------


def test_signs_of_logits_by_hand():
    logits = torch.full((4, 5, 6), -30.0)
    logits.view(-1)[:20] = 3.0
    picture = torch.full((4, 5, 6), 0.9)
    picture.view(-1)[:20] = torch.tensor([0.2, 0.4]).repeat(10)
    found = Signs.of(2.5, logits, picture)
    inside = 1 / (1 + np.exp(-3.0))
    assert (found.said, found.peak) == (2.5, 3.0)
    assert found.inside == pytest.approx(inside)
    assert found.extent == pytest.approx(np.log10(1 + 20 * inside))
    assert found.grey == pytest.approx(0.3)


def test_an_empty_mask_still_has_signs_and_extremes_are_held():
    found = Signs.of(-1e9, torch.full((4, 4, 4), -1e6), torch.ones(4, 4, 4))
    assert found == Signs(said=-20.0, peak=-20.0, extent=0.0, inside=0.0, grey=None)
    assert Signs.of(1e9, torch.full((1, 1, 2), 1e6), torch.ones(1, 1, 2)).peak == 20.0  # fewer voxels than are averaged


def test_how_odd_a_grey_is_for_a_name():
    usual = {"liver": Usual(0.5, 0.1)}

    def odd(grey: float | None, name: str = "Liver") -> float:
        return weighed(name, dataclasses.replace(PLAIN, grey=grey), usual)[-1]

    assert odd(0.5) == 0
    assert (odd(0.7), odd(0.3)) == pytest.approx((2.0, 2.0))
    assert odd(9.0) == odd(None) == 6.0  # nothing drawn is as odd as can be
    assert odd(0.9, "spleen") == 0.0  # nobody knows


def test_a_taught_structure_is_drawn_and_a_ghost_denied(scan):
    block, ghost = signs_of(scan, ["block", "ghost"])
    assert block.said > 2 and block.peak > 0 and block.extent > 1 and block.grey > 0.6
    assert ghost.said < -2


def test_signs_are_those_of_the_answers_and_of_the_mask_drawn_alone(scan):
    """The words against `log_likelihoods`, the mask against `draw_one`: other ways through the model."""
    (found,) = signs_of(scan, ["block"])
    drawn, denied = scan.log_likelihoods(
        "Segment the block.", ["Here is the block [SEG].", "There is no block in this scan."]
    )
    assert found.said == pytest.approx(np.clip(drawn - denied, -20, 20), abs=1e-3)
    mask, _ = scan.draw_one("block", text=scan.text_prompt("block"), geometry=None)
    again = Signs.of(0.0, torch.from_numpy(mask.logits), torch.from_numpy(scan.prepared.array))
    assert dataclasses.astuple(found)[1:] == pytest.approx(dataclasses.astuple(again)[1:], abs=1e-3)


def test_many_names_at_once_are_as_one_by_one(scan):
    names = ["block", "ghost", "thing"] * 4  # more than go at once, of different lengths
    together = signs_of(scan, names)
    alone = [signs_of(scan, [name])[0] for name in names[:3]]
    for number, one in enumerate(together):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(alone[number % 3]), abs=1e-3)


def test_a_model_without_a_head_has_no_signs(scan):
    headless = type("Headless", (), {"seg_head": None})()
    with pytest.raises(ValueError, match=re.escape(NO_HEAD)):
        signs_of(dataclasses.replace(scan, model=headless), ["block"])


# -- the fit --------------------------------------------------------------------------------------------------------


def test_a_fit_says_how_often_it_is_so():
    """Two kinds of signs: of the one 90 of 100 are there, of the other 30 of 100."""
    signs = [dataclasses.replace(PLAIN, said=5.0)] * 100 + [dataclasses.replace(PLAIN, said=-5.0)] * 100
    there = [True] * 90 + [False] * 10 + [True] * 30 + [False] * 70
    found = fit(["liver"] * 200, signs, there)
    assert found.probability("liver", signs[0]) == pytest.approx(0.9, abs=0.02)
    assert found.probability("liver", signs[-1]) == pytest.approx(0.3, abs=0.02)
    assert found.weights["peak"] == found.weights["inside"] == 0.0  # they say nothing


def test_the_scale_of_a_sign_does_not_matter():
    rng = np.random.default_rng(0)
    said, extent = rng.normal(3, 2, 400), rng.normal(1, 0.5, 400)
    there = (rng.random(400) < 1 / (1 + np.exp(-(said - 3 + 2 * (extent - 1))))).tolist()

    def fitted(factor: float) -> list[float]:
        signs = [dataclasses.replace(PLAIN, said=a * factor, extent=b) for a, b in zip(said, extent, strict=True)]
        presence = fit(["liver"] * 400, signs, there)
        return [presence.probability("liver", one) for one in signs]

    assert fitted(1.0) == pytest.approx(fitted(0.01), abs=1e-4)


def test_signs_that_part_both_kinds_do_not_run_away():
    signs = [dataclasses.replace(PLAIN, said=value) for value in (-3.0, -2.0, 2.0, 3.0)]
    found = fit(["liver"] * 4, signs, [False, False, True, True])
    values = [found.probability("liver", one) for one in signs]
    assert values == sorted(values) and 0 < values[0] < 0.5 < values[-1] < 1


@pytest.mark.parametrize("there", [[True] * 3, [False] * 3, []])
def test_a_fit_needs_both_kinds(there):
    with pytest.raises(ValueError, match="needs both"):
        fit(["liver"] * len(there), [PLAIN] * len(there), there)


def test_what_makes_no_sense_has_no_weight():
    """By chance the model was surer of what is not there."""
    signs = [dataclasses.replace(PLAIN, said=value) for value in (3.0, 2.5, -2.0, -3.0)]
    found = fit(["liver"] * 4, signs, [False, False, True, True])
    assert found.weights["said"] == 0.0
    assert found.probability("liver", signs[0]) == pytest.approx(0.5)


def test_what_looks_unlike_its_name_is_doubted():
    """Livers are bright and spleens dark; what was drawn for an absent one has the other's grey."""
    rng = np.random.default_rng(0)
    greys = {"liver": (0.8, 0.4), "spleen": (0.4, 0.8)}
    rows = [
        (name, dataclasses.replace(PLAIN, grey=float(greys[name][not there] + rng.normal(0, 0.03))), there)
        for name in greys
        for there in [True] * 30 + [False] * 10
    ]
    found = fit(*zip(*rows, strict=True))
    assert found.usual["liver"].mean == pytest.approx(0.8, abs=0.02)
    assert found.usual["spleen"].spread == pytest.approx(0.03, abs=0.01)
    bright = dataclasses.replace(PLAIN, grey=0.8)
    assert found.probability("liver", bright) > 0.9 > 0.3 > found.probability("spleen", bright)
    few = fit(*zip(*rows[:5], *rows[30:40], strict=True))
    assert few.structures == ("liver",) and few.usual == {}  # five livers are too few to say


# -- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights of a kind")
    return tmp_path


def presence_of(folder) -> Presence:
    facts = {"weights_sha256": weights_sha256(folder), "stores": ["phantoms"]}
    return Presence(BY_WORDS, -0.25, ("block", "ghost"), {"block": Usual(0.5, 0.1)}, facts)


def test_what_is_written_is_read(folder):
    assert read_presence(folder) is None
    presence_of(folder).write(folder)
    found = read_presence(folder)
    assert found == presence_of(folder)
    assert found.probability("block", dataclasses.replace(PLAIN, said=0.25)) == 0.5


def test_a_fit_to_other_weights_is_not_used(folder, caplog):
    presence_of(folder).write(folder)
    (folder / "model.safetensors").write_bytes(b"trained more")
    with caplog.at_level(logging.WARNING):
        assert read_presence(folder) is None
    assert "other weights" in caplog.text and "m3d calibrate" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda kept: kept | {"format": "m3d.presence/9"}, "m3d.presence/9"),
        (lambda kept: kept | {"weights": {"said": 1.0, "smell": 2.0}}, "smell"),
        (lambda kept: kept | {"weights": BY_WORDS | {"said": float("nan")}}, "not a number"),
        (lambda kept: kept | {"usual": {"block": {"mean": 0.5, "spread": 0.0}}}, "spread above 0"),
        (lambda kept: {key: value for key, value in kept.items() if key != "bias"}, "'bias' is missing"),
        (lambda kept: [], "makes it anew"),
    ],
)
def test_a_file_that_is_wrong_is_an_error_with_the_way_out(folder, change, says):
    path = presence_of(folder).write(folder)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"presence.json") as caught:
        read_presence(folder)
    assert says in str(caught.value) and "m3d calibrate" in str(caught.value)


def test_half_a_file_is_an_error(folder):
    path = presence_of(folder).write(folder)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="m3d calibrate"):
        read_presence(folder)


def test_a_model_without_the_file_says_nothing_of_presence(scan):
    assert scan.presence is None
    (mask,) = scan.segment("block").masks
    assert mask.present is None


@pytest.fixture(scope="module")
def sure(taught, tmp_path_factory):
    """The taught model with a fit: the words alone decide."""
    folder = tmp_path_factory.mktemp("sure") / "sure"
    shutil.copytree(taught, folder)
    presence_of(folder).write(folder)
    assert (folder / PRESENCE_NAME).is_file()
    return m3d.load(folder, device="cpu").look(block_scan())


def test_a_model_with_the_file_says_how_likely_each_name_is(sure, tmp_path):
    """By the words alone: "block" is drawn, "ghost" denied, "shadow" was never asked for."""
    result = sure.segment(["block", "ghost"])
    expected = 1 / (1 + np.exp(-(signs_of(sure, ["block"])[0].said - 0.25)))
    (mask,), (ghost,) = result.masks, result.not_drawn
    assert mask.present == pytest.approx(expected) and not mask.doubtful
    assert ghost.present < 0.2
    assert [note for note in result.warnings if "not in the scan" in note] == [
        f"ghost is probably not in the scan ({ghost.present:.2f})"
    ]
    result.save(tmp_path)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["masks"][0]["present"] == pytest.approx(expected, abs=1e-5)
    assert sure.segment("block").masks[0].present == pytest.approx(expected)
    assert sure.segment(["Block", "thing"]).masks[1].present is None  # nobody fitted "thing"
    pointed = sure.segment("block", points=[((4, 8, 9), 1)])
    assert pointed.masks[0].present is None  # who points at it says that it is there


@pytest.mark.parametrize("doubtful", [False, True])
def test_what_is_doubted_is_painted_only_if_that_is_asked_for(scan, tmp_path, doubtful):
    unlikely = dataclasses.replace(scan, presence=Presence(BY_WORDS, -100.0, ("block",)))
    result = unlikely.segment(["block"])
    assert result.masks[0].array.any() and result.masks[0].doubtful  # kept as it was drawn
    write_label_map(tmp_path, result, doubtful=doubtful)
    (label,) = json.loads((tmp_path / "label-map.json").read_text())["labels"]
    assert (label["value"], label["name"], label["voxels"] > 0) == (1, "block", doubtful)
    assert label["present"] == 0.0


def test_a_broken_file_is_an_error_of_loading_unless_it_is_not_read(taught, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(taught, folder)
    (folder / PRESENCE_NAME).write_text("{}")
    with pytest.raises(ValueError, match="m3d calibrate"):
        m3d.load(folder, device="cpu")
    assert m3d.load(folder, device="cpu", calibrated=False).presence is None
