"""Pseudo-masks in segmentation pretraining: shown as often as asked for, moved with the picture, never named."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.pseudo import PseudoMasks
from data_prep.pseudo_store import read_pseudo, write_pseudo
from data_prep.store import Store
from m3d.models import M3DSegConfig, M3DVisionConfig
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.train.augment import Augment
from m3d.train.cases import StoredCase
from m3d.train.data import VolumeDataset
from m3d.train.drawing import DrawByPrompts, MaskCollator, NameVectors
from m3d.train.objective import KINDS, LossWeights, prompted_loss
from m3d.train.pseudo import WithPseudo, check_pseudo
from m3d.train.views import Drawn, Look, Masks
from tests.fixtures.small_store import build

GRID = (8, 16, 24)


@pytest.fixture
def cases(tmp_path) -> list[StoredCase]:
    root = build(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="no pseudo-masks yet; make them: m3d data pseudo"):
        check_pseudo((str(root),))
    write_pseudo(Store(root), PseudoMasks(smallest=0.02, scale=0.5, largest=1.0))
    check_pseudo((str(root),))
    return [StoredCase(image) for image in Store(root).images.values()]


def shown(view: WithPseudo, case: StoredCase, number: int) -> Drawn:
    return view.show(Look(case, case.read(), random.Random(number), number, str(number)))


def test_regions_are_shown_as_often_as_asked_for_and_have_no_names(cases):
    view = WithPseudo(view=Masks(masks=3), share=0.25)
    items = [shown(view, cases[0], number) for number in range(400)]
    nameless = [item for item in items if set(item.names) == {""}]
    assert 0.19 < len(nameless) / 400 < 0.31
    assert all(set(item.names) <= {"liver", "spleen"} for item in items if item not in nameless)
    regions = read_pseudo(cases[0].image)[0]
    for item in nameless:
        assert 1 <= len(item.masks) <= 3 and item.masks.shape[1:] == (1, *regions.shape)
        for mask in item.masks[:, 0].numpy():
            assert len(np.unique(regions[mask])) == 1  # one region, and all of it
            assert (regions == regions[mask][0]).sum() == mask.sum()
    again = shown(view, cases[0], 7)
    assert torch.equal(again.masks, items[7].masks) and again.names == items[7].names


def test_regions_move_with_the_picture(cases):
    """A picture that shows its own regions as grey values: wherever it goes, a region has one grey value."""
    case, moved = cases[0], Augment(flip=0.5, mirror="swap", probability=0.0)  # flips alone
    view = WithPseudo(view=Masks(masks=2, augment=moved), share=1.0)
    regions = read_pseudo(case.image)[0]
    grey = (regions * (255 // regions.max())).astype(np.uint8)
    flipped = Counter()
    for number in range(12):
        item = view.show(Look(case, (grey, case.read()[1]), random.Random(number), number, str(number)))
        flipped[bool((item.pixels[0].numpy() != grey / np.float32(255)).any())] += 1
        for mask in item.masks[:, 0]:
            inside = item.pixels[0][mask]
            assert inside.max() - inside.min() < 1e-4
    assert min(flipped[True], flipped[False]) > 0


def test_a_scan_without_contours_is_wanted_for_its_regions(cases):
    image = replace(cases[1].image, masks=None, names={})
    bare = StoredCase(image)
    view = WithPseudo(view=Masks(), share=0.01)
    assert not Masks().wants(bare) and view.wants(bare)
    assert all(set(shown(view, bare, number).names) == {""} for number in range(20))
    assert len(VolumeDataset([bare], view, length=3)) == 3
    with pytest.raises(ValueError, match=r"data\.pseudo=0"):
        WithPseudo(view=Masks(), share=0)


@pytest.fixture
def segvol() -> PromptedSegVol:
    torch.manual_seed(0)
    vision = M3DVisionConfig(
        image_size=list(GRID), patch_size=[4, 8, 8], hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    seg = M3DSegConfig(
        decoder_heads=2, decoder_mlp_dim=32, iou_hidden_size=16, num_masks=1, coordinates="grid",
        upscale_norm="channel", mask_prompt=True, projector_dropout=0.0,
    )  # fmt: skip
    return PromptedSegVol(M3DSegVolConfig(vision_config=vision, seg_config=seg, text_width=12))


def items() -> list[Drawn]:
    masks = torch.zeros(4, 1, *GRID, dtype=torch.bool)
    masks[0, 0, 2:6, 4:12, 4:12] = masks[1, 0, :3, :5, :6] = masks[2, 0, 5:, 8:, 8:] = masks[3, 0, 1:4, 1:9, 3:9] = True
    pixels = torch.rand(2, 1, *GRID, generator=torch.Generator().manual_seed(0))
    return [Drawn("a", 0, "a", pixels[0], masks[:2], ("", "")), Drawn("b", 1, "b", pixels[1], masks[2:], ("liver", ""))]


def test_nameless_masks_stand_apart_and_are_drawn_without_names(segvol):
    batch = MaskCollator(global_batch=2)(items())
    assert batch["counts"] == {"masks": 1, "volumes": 2, "prompted": 1, "pseudo": 3}
    assert batch["names"] == ["liver"] and batch["mask_volume"].tolist() == [1]
    assert batch["pseudo_volume"].tolist() == [0, 0, 1]
    names = NameVectors(["liver"], torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1)))
    objective = DrawByPrompts(segvol, names, LossWeights(), pseudo_weight=0.1).eval()
    features = segvol.look(batch["pixel_values"])

    def alone(prompts, named):
        return segvol.draw(features, batch["pseudo_volume"], prompts=prompts)

    for turn in range(len(KINDS)):
        found = objective(batch | {"turn": turn})["pseudo"]
        assert (found.count, found.weight) == ("pseudo", 0.1)
        rng = random.Random(f"{batch['seed']}/prompts")
        seeds = [rng.getrandbits(62) for _ in range(3)]
        torch.testing.assert_close(
            found.total, prompted_loss(alone, batch["pseudo"], seeds, turn, LossWeights()), atol=1e-4, rtol=1e-4
        )


def test_a_batch_without_regions_weighs_nothing_and_the_rest_stays(segvol):
    names = NameVectors(["liver"], torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1)))
    named = replace(items()[1], masks=items()[1].masks[:1], names=("liver",))
    batch = MaskCollator()([named])
    without = DrawByPrompts(segvol, names, LossWeights()).eval()(batch)
    losses = DrawByPrompts(segvol, names, LossWeights(), pseudo_weight=0.1).eval()(batch)
    assert losses["pseudo"].total == 0 and set(losses) == {*without, "pseudo"}
    assert all(losses[name].total == without[name].total for name in without)
