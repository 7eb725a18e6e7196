"""What the reference learns from, and that it goes on where it was stopped."""

import math
import random

import numpy as np
import pytest
import torch
from segresnet_reference import STRUCTURES, Contours, Run, Settings, batches, begin, known_loss

from data_prep.case import Case
from data_prep.prepare import Job
from data_prep.preprocess import MinMax, Preprocess
from data_prep.volume import Volume, spl_affine
from m3d.train.augment import Augment
from m3d.train.cases import PreparedCase, prepare
from m3d.train.data import VolumeDataset
from m3d.train.views import Look

GRID = (8, 16, 16)
MANDIBLE, LARYNX = STRUCTURES.index("mandible"), STRUCTURES.index("larynx")


def prepared(*, complete: bool) -> PreparedCase:
    array = np.random.default_rng(0).random(GRID, np.float32) * 0.5
    labels = np.zeros(GRID, np.uint8)
    labels[2:6, 4:12, 6:12] = 7
    array += 0.5 * (labels == 7)  # bone is bright
    volume = Volume(array, spl_affine((4.0, 2.0, 2.0)))
    names = {6: "larynx", 7: "mandible"}
    case = Case(id="a", patient_id="a", volume=volume, labels=labels, names=names, complete=complete)
    return prepare(case, Job(preprocess=Preprocess(grid=GRID, intensity=MinMax()), derive=()))


def shown(case: PreparedCase, augment: Augment | None = None):
    return Contours(augment=augment).show(Look(case, case.read(), random.Random(0), 0, "0/0"))


@pytest.mark.parametrize("complete", [False, True])
def test_what_nobody_contoured_is_unknown_and_what_is_absent_is_empty(complete):
    case = prepared(complete=complete)
    view = shown(case)
    assert bool(view.known[MANDIBLE])
    assert bool(view.known[LARYNX]) == complete
    assert int(view.known.sum()) == 1 + complete  # the brainstem is no structure of this case
    assert int(view.masks[MANDIBLE].sum()) == 4 * 8 * 6
    assert not view.masks[[*range(MANDIBLE), *range(MANDIBLE + 1, len(STRUCTURES))]].any()
    assert (view.pixels.shape, view.masks.shape) == ((1, *GRID), (len(STRUCTURES), *GRID))
    assert Contours().wants(case)


def test_the_picture_moves_with_its_masks():
    case = prepared(complete=False)
    view = shown(case, Augment(probability=1.0, rotate_degrees=0.0, shift_mm=6.0, noise=0.0))
    mask = view.masks[MANDIBLE]
    assert not torch.equal(mask, shown(case).masks[MANDIBLE])
    assert view.pixels[0][mask].mean() > view.pixels[0][~mask].mean() + 0.2


def test_unknown_structures_teach_nothing():
    logits = torch.randn(2, len(STRUCTURES), *GRID, requires_grad=True)
    masks = torch.rand(2, len(STRUCTURES), *GRID) > 0.5
    known = torch.zeros(2, len(STRUCTURES), dtype=torch.bool)
    known[0, 1] = known[1, 3] = True
    known_loss(logits, masks, known).backward()
    moved = logits.grad.flatten(2).abs().sum(dim=2) > 0
    assert torch.equal(moved, known)
    nothing = known_loss(logits, masks, torch.zeros_like(known))
    assert nothing.item() == 0.0


def test_the_loss_of_a_coin_toss_is_that_of_dice_and_ce():
    logits = torch.zeros(1, len(STRUCTURES), *GRID)
    masks = torch.zeros(1, len(STRUCTURES), *GRID, dtype=torch.bool)
    masks[0, 0, :4] = True  # half of the grid: soft Dice is 2 * .25 / (.5 + .5)
    known = torch.zeros(1, len(STRUCTURES), dtype=torch.bool)
    known[0, 0] = True
    assert known_loss(logits, masks, known).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)


@torch.inference_mode()
def test_it_begins_by_drawing_next_to_nothing():
    share = begin(Settings(minutes=1, filters=8), []).network(torch.rand(1, 1, *GRID)).sigmoid()
    assert share.shape == (1, len(STRUCTURES), *GRID)
    assert 0.001 < float(share.mean()) < 0.05


def test_the_rate_rises_then_falls_to_nothing():
    settings = Settings(minutes=1, warmup=0.1)
    assert settings.rate(0.05) == pytest.approx(0.5)
    assert settings.rate(0.1) == pytest.approx(1.0)
    assert settings.rate(0.55) == pytest.approx(0.5)
    assert settings.rate(1.0) == settings.rate(1.2) == 0.0


def test_batches_hang_on_the_step_alone():
    cases = VolumeDataset([prepared(complete=True)], Contours(), length=100)
    stream = batches(cases, 2, 0)
    first = [next(stream) for _ in range(3)]
    third = next(batches(cases, 2, 2))
    assert all(torch.equal(one, other) for one, other in zip(first[2], third, strict=True))
    assert not torch.equal(first[0][0], first[1][0])


def test_a_checkpoint_is_gone_on_from_and_another_one_refused(tmp_path):
    run = begin(Settings(minutes=1, filters=8), [])
    run.network(torch.rand(1, 1, *GRID)).mean().backward()
    run.optimizer.step()
    run.step, run.seconds, run.loss = 7, 12.5, 0.25
    run.keep(tmp_path)
    again: Run = begin(Settings(minutes=1, filters=8), [])
    again.go_on(tmp_path)
    assert (again.step, again.seconds, again.loss) == (7, 12.5, 0.25)
    pairs = zip(again.network.state_dict().values(), run.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert again.optimizer.state_dict()["state"].keys() == run.optimizer.state_dict()["state"].keys()
    with pytest.raises(ValueError, match="other settings"):
        begin(Settings(minutes=2, filters=8), []).go_on(tmp_path)
    fresh = begin(Settings(minutes=1, filters=8), [])
    fresh.go_on(tmp_path / "nothing")
    assert fresh.step == 0
