"""Zooming in on a scan: known answers of a decoder that thresholds what it is shown, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from transformers import LlamaConfig

from data_prep.boxes import Box, box_of_mask, occupied, to_mm
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.steps import Lattice, sampled
from data_prep.volume import Volume, spl_affine
from m3d.inference import zooming
from m3d.inference.drawing import draw
from m3d.inference.scan import Scan
from m3d.inference.zooming import ZoomIn, zoom_factor
from m3d.memory import available_memory
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
from segvol_head import Prompts

SHAPE, GRID = (40, 48, 56), (20, 24, 28)  # a voxel of the grid is two of the scan's along each axis
SPACING = (1.5, 1.0, 1.0)
STRETCHED = Preprocess(grid=GRID, intensity=Window(-200.0, 400.0))
FITTED = Preprocess(grid=GRID, intensity=Window(-200.0, 400.0), crop=Foreground(-400.0), spacing=(3.0, 2.0, 2.0))


class Threshold:
    """A model that draws what is bright: inside the box, or in one piece with the point, that it is asked about."""

    device, seg_head = torch.device("cpu"), None

    def __init__(self):
        self.shown, self.asked = [], []

    def draw_on(self, image, prompts):
        self.shown.append(image[0, 0].clone())
        self.asked.append(prompts)
        return torch.stack([self._drawn(image[0, 0], prompts[p : p + 1])[None] for p in range(len(prompts))])

    def draw(self, features, *, text, volume_index, prompts):
        if text is not None:
            prompts = Prompts(text=text) if prompts is None else prompts
        return torch.cat([self.draw_on(features, prompts[p : p + 1]) for p in range(len(prompts))])

    @staticmethod
    def _drawn(image, prompt):
        logits = 20 * (image - 0.5)
        kept = torch.ones_like(image, dtype=torch.bool)
        if prompt.points is not None:
            pieces = torch.from_numpy(ndimage.label(image.numpy() > 0.5)[0])
            at = [tuple(place.round().long().tolist()) for place in prompt.points[0]]
            pointed = {int(pieces[place]) for place in at} - {0}
            kept = torch.isin(pieces, torch.tensor(sorted(pointed)))
        elif prompt.boxes is not None:
            low, high = prompt.boxes[0].view(2, 3).round().long().tolist()
            kept = torch.zeros_like(kept)
            kept[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
        return torch.where(kept, logits, torch.minimum(logits, torch.tensor(-5.0)))


def scan_of(volume, preprocess=STRETCHED):
    """A scan that `Threshold` looks at: the real way from voxels to masks, around another model."""
    prepared = preprocess.apply(volume)
    pixels = torch.from_numpy(np.ascontiguousarray(prepared.array))[None, None]
    return Scan("threshold", Threshold(), SimpleNamespace(preprocess=preprocess), prepared, pixels, None)


def volume_of(*parts, affine=None):
    """Air, soft tissue inside it, and bright blocks; the truth is the first block."""
    array = np.full(SHAPE, -1000.0, np.float32)
    array[2:-2, 2:-2, 2:-2] = -200.0
    truth = np.zeros(SHAPE, bool)
    for number, part in enumerate(parts):
        array[part] = 350.0  # 0.92 to the model, 0.46 where it is mixed with as much tissue
        truth[part] |= number == 0
    return Volume(array, spl_affine(SPACING) if affine is None else affine), truth


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


BLOCK = np.s_[9:22, 11:25, 13:34]
OTHER = np.s_[30:36, 34:44, 40:52]
SHEET = np.s_[12:26, 14:32, 24:25]  # one voxel thin: half a voxel of the grid
INSIDE = (15.0, 18.0, 20.0)


# --- what is gained ---


def test_zooming_in_draws_every_voxel_that_the_grid_blurs():
    volume, truth = volume_of(BLOCK, OTHER)
    scan = scan_of(volume)
    (coarse,) = scan.segment(points=[(INSIDE, 1)]).masks
    (sharp,) = scan.segment(points=[(INSIDE, 1)], zoom=True).masks
    assert dice(coarse.array, truth) < 0.97
    assert np.array_equal(sharp.array, truth)
    assert sharp.volume_ml == pytest.approx(truth.sum() * 1.5 / 1000) and sharp.score > 0.99


def test_a_factor_between_lies_between():
    """Edges of the block fall between voxels of a grid that is not the scan's own."""
    volume, truth = volume_of(BLOCK)
    scan = scan_of(volume)
    scores = [
        dice(scan.segment(points=[(INSIDE, 1)], **zoom).masks[0].array, truth)
        for zoom in ({}, {"zoom": 1.5}, {"zoom": "native"})
    ]
    assert scores[0] < scores[1] < scores[2] == 1


@pytest.mark.parametrize("preprocess", [STRETCHED, FITTED], ids=["stretched", "fitted"])
def test_a_sheet_thinner_than_the_grid_is_lost_without(preprocess):
    volume, truth = volume_of(SHEET)
    scan = scan_of(volume, preprocess)
    at = [((20.0, 20.0, 24.0), 1)]
    assert not scan.segment(points=at).masks[0].array.any()
    assert np.array_equal(scan.segment(points=at, zoom=True).masks[0].array, truth)
    box = box_of_mask(truth)
    assert not scan.segment(box=box).masks[0].array.any()
    assert np.array_equal(scan.segment(box=box, zoom=True).masks[0].array, truth)


def test_text_goes_to_every_window():
    volume, truth = volume_of(np.s_[4:36, 4:44, 4:52])
    scan = scan_of(volume)
    text, zoom = torch.zeros(2, 4), ZoomIn(scan.model, scan.prepared, True)
    masks, notes = draw(scan, ["one", "two"], text, None, zoom=zoom)
    assert all(np.array_equal(mask.array, truth) for mask in masks) and notes == ()
    shown = scan.model.shown[2:]  # behind two first glances
    assert len(shown) > 2 and all(image.shape == GRID for image in shown)
    assert all(asked.text is not None and asked.boxes is None for asked in scan.model.asked[2:])


# --- geometry ---

TURNED = {
    "flipped": lambda array: array[::-1, :, ::-1],
    "transposed": lambda array: array.transpose(2, 0, 1),
    "fortran": lambda array: np.asfortranarray(array),
}


def oblique():
    """About 20 degrees about two axes, and an origin."""
    angle, tilt = np.deg2rad([20.0, 15.0])
    one = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    two = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = spl_affine(SPACING)
    affine[:3, :3] = one @ two @ affine[:3, :3]
    affine[:3, 3] = (13.0, -40.0, 7.5)
    return affine


def turned(volume, truth, how):
    """The same patient, stored another way."""
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    moved = np.stack([TURNED[how](axis) for axis in places])  # index after -> index before
    matrix = np.eye(4)
    matrix[:3, 3] = moved[:, 0, 0, 0]
    for axis, step in enumerate(((1, 0, 0), (0, 1, 0), (0, 0, 1))):
        matrix[:3, axis] = moved[(slice(None), *step)] - moved[:, 0, 0, 0]
    return Volume(TURNED[how](volume.array), volume.affine @ matrix), TURNED[how](truth), matrix


@pytest.mark.parametrize("preprocess", [STRETCHED, FITTED], ids=["stretched", "fitted"])
@pytest.mark.parametrize("how", TURNED)
def test_masks_come_back_on_the_scans_own_grid(how, preprocess):
    volume, truth, matrix = turned(*volume_of(BLOCK, OTHER, affine=oblique()), how)
    scan = scan_of(volume, preprocess)
    at = tuple(np.linalg.solve(matrix, [*INSIDE, 1.0])[:3].round().tolist())
    (mask,) = scan.segment(points=[(at, 1)], zoom=True).masks
    assert mask.array.shape == truth.shape and np.array_equal(mask.array, truth)


def test_places_in_mm_are_carried_over():
    volume, truth = volume_of(BLOCK, OTHER, affine=oblique())
    scan = scan_of(volume)
    at = tuple(volume.to_mm([INSIDE])[0].tolist())
    assert np.array_equal(scan.segment(points=[(at, 1)], frame="mm", zoom=True).masks[0].array, truth)
    volume, truth = volume_of(BLOCK, OTHER)
    box = to_mm(box_of_mask(truth), volume.affine)
    assert np.array_equal(scan_of(volume).segment(box=box, zoom=True).masks[0].array, truth)


def test_a_box_is_placed_as_exactly_as_the_windows_can_show_it():
    """The model's grid rounds it to two voxels; from closer it is the user's, to the voxel."""
    volume, _ = volume_of(np.s_[4:36, 4:44, 4:52])
    scan = scan_of(volume)
    box = Box((9, 11, 14), (17, 20, 25))
    (mask,) = scan.segment(box=box, zoom=True).masks
    assert box_of_mask(mask.array) == box


@pytest.mark.parametrize("preprocess", [STRETCHED, FITTED], ids=["stretched", "fitted"])
@pytest.mark.parametrize("factor", [1.5, 2.0, "native"])
def test_windows_show_what_the_whole_scan_would_at_that_resolution(preprocess, factor):
    rng = np.random.default_rng(0)
    volume = Volume(rng.uniform(-500, 500, SHAPE).astype(np.float32), spl_affine(SPACING))
    prepared = preprocess.apply(volume)
    zoom = ZoomIn(Threshold(), prepared, factor)
    turn, cut, lattice = zoom.fine.steps
    assert isinstance(lattice, Lattice)
    shown = ((cut.apply(turn.apply(volume.array)) + 200) / 600).clip(0, 1)
    whole = lattice.apply(shown)
    region = (slice(3, 14), slice(0, 13), slice(5, whole.shape[2]))
    np.testing.assert_allclose(zoom._pixels(region), whole[region], atol=1e-6)
    if factor == "native":
        assert np.array_equal(whole, shown)


def test_sampled_is_scipys_linear_interpolation():
    rng = np.random.default_rng(1)
    array = rng.random((5, 6, 7), np.float32)
    where = [rng.uniform(-1, side + 1, 9) for side in array.shape]
    wanted = ndimage.map_coordinates(array, np.meshgrid(*where, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(sampled(array, where), wanted, atol=1e-6)


# --- what it takes ---


def test_windows_are_as_many_as_planned_and_the_same_twice():
    volume, truth = volume_of(np.s_[4:36, 4:44, 4:52])
    scan = scan_of(volume)
    zoom, text = ZoomIn(scan.model, scan.prepared, "native"), torch.zeros(1, 4)
    glance = scan.model.draw_on(scan.features, Prompts(text=text))[0, 0].numpy()
    plan = zoom.plan(glance, text=text)
    before = len(scan.model.shown)
    (first,), (second,) = list(zoom.draw_all([plan])), list(zoom.draw_all([plan]))
    assert plan.windows == (len(scan.model.shown) - before) / 2 > 1
    assert np.array_equal(first.array, second.array) and first.score == second.score
    assert plan.num_bytes > 4 * truth.size


def test_what_does_not_fit_into_memory_is_refused_before_the_first_window(monkeypatch):
    volume, _ = volume_of(BLOCK)
    scan = scan_of(volume)
    monkeypatch.setattr(zooming, "available_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"zooming in takes 0\.\d+ GB for \d+ windows.*take a smaller zoom"):
        scan.segment(points=[(INSIDE, 1)], zoom=True)
    assert len(scan.model.shown) == 1  # the first glance


def test_memory_is_what_the_control_group_leaves(tmp_path):
    assert available_memory(tmp_path) > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    assert available_memory(tmp_path) == 300_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 9\n")
    assert available_memory(tmp_path) == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("900000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000000")
    assert available_memory(tmp_path) == 0


@pytest.mark.parametrize("zoom", [0, 1, 0.5, float("nan"), "fine", [2]])
def test_no_zoom_is_an_error(zoom):
    with pytest.raises(ValueError, match=r"must be a number above 1.*or 'native'"):
        zoom_factor(zoom)


def test_nothing_found_is_not_looked_at_from_closer():
    volume, _ = volume_of()
    volume.array[5, 5, 5] = 0.0  # a third: not bright
    scan = scan_of(replace(volume, array=volume.array))
    masks, notes = draw(scan, ["it"], torch.zeros(1, 4), None, zoom=ZoomIn(scan.model, scan.prepared, 2))
    assert not masks[0].array.any() and "is empty" in notes[0]
    assert len(scan.model.shown) == 1


def test_a_scan_no_finer_than_the_grid_is_not_zoomed_into():
    volume, _ = volume_of(BLOCK)
    scan = scan_of(volume, Preprocess(grid=SHAPE, intensity=Window(-200.0, 400.0)))
    result = scan.segment(points=[(INSIDE, 1)], zoom=True)
    assert len(scan.model.shown) == 1 and result.drawn_at_mm is None
    assert any("no finer than the model's grid" in warning for warning in result.warnings)


def test_other_voxels_than_the_model_is_prepared_for_are_warned_of():
    volume, _ = volume_of(BLOCK)
    (warning,) = scan_of(volume, FITTED).segment(points=[(INSIDE, 1)], zoom=True).warnings
    assert "voxels of 1.5 x 1.0 x 1.0 mm, and it is prepared for 3.0 x 2.0 x 2.0 mm" in warning
    assert not scan_of(volume, FITTED).segment(points=[(INSIDE, 1)]).warnings
    assert not scan_of(volume).segment(points=[(INSIDE, 1)], zoom=True).warnings  # stretched: any voxels


def test_the_result_says_how_fine_it_was_drawn():
    volume, _ = volume_of(BLOCK)
    scan = scan_of(volume)
    assert scan.segment(points=[(INSIDE, 1)], zoom=1.5).to_dict()["drawn_at_mm"] == [2.0, 1.3333, 1.3333]
    assert scan.segment(points=[(INSIDE, 1)], zoom=True).drawn_at_mm == pytest.approx((1.5, 1.0, 1.0))
    assert scan.segment(points=[(INSIDE, 1)]).to_dict()["drawn_at_mm"] is None


# --- the real model ---


@pytest.mark.parametrize("own_encoder", [False, True])
def test_drawing_on_a_window_is_drawing_on_features_of_it(own_encoder):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": [8, 16, 16], "patch_size": [4, 8, 8], "hidden_size": 16, "intermediate_size": 32, **sizes}
    config = M3DConfig(
        vision_config=M3DVisionConfig(**vision, detail_channels=0 if own_encoder else 4),
        text_config=LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, **sizes),
        seg_config=M3DSegConfig(
            decoder_heads=2,
            decoder_mlp_dim=32,
            iou_hidden_size=16,
            num_masks=1,
            coordinates="grid",
            upscale_norm="channel",
            encoder_config=M3DVisionConfig(**vision, cls_token=False) if own_encoder else None,
        ),
        pool_size=1,
        image_token_id=36,
        box_start_token_id=37,
        box_end_token_id=38,
        seg_token_id=39,
    )
    model = M3DForConditionalGeneration(config).eval()
    pixels, prompts = torch.rand(1, 1, 8, 16, 16), Prompts(boxes=torch.tensor([[1.0, 2, 3, 5, 9, 11]]))
    with torch.no_grad():
        owner = torch.zeros(1, dtype=torch.long)
        wanted = model.draw(model.get_image_features(pixels), volume_index=owner, prompts=prompts)
        assert torch.equal(model.draw_on(pixels, prompts), wanted)


def test_a_model_without_a_head_cannot_draw_on_a_window():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = M3DConfig(
        vision_config=M3DVisionConfig(
            image_size=[8, 16, 16], patch_size=[4, 8, 8], hidden_size=16, intermediate_size=32, **sizes
        ),
        text_config=LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, **sizes),
        seg_config=None,
        pool_size=1,
    )
    with pytest.raises(ValueError, match="no mask head"):
        M3DForConditionalGeneration(config).draw_on(torch.rand(1, 1, 8, 16, 16), Prompts(text=torch.zeros(1, 16)))


# --- the first glance on a large scan ---


@pytest.mark.parametrize("preprocess", [STRETCHED, FITTED], ids=["stretched", "fitted"])
@pytest.mark.parametrize("how", TURNED)
def test_a_mask_is_the_same_where_only_its_surroundings_are_brought_back(how, preprocess):
    volume, _, _ = turned(*volume_of(BLOCK), how)
    prepared, rng = preprocess.apply(volume), np.random.default_rng(2)
    for spread in (0.4, 3.0, 40.0):  # one small piece, some, and all over to the edges
        places = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), axis=-1)
        logits = (spread - np.linalg.norm(places - rng.uniform(0, GRID, 3), axis=-1)).astype(np.float32)
        logits += rng.normal(0, 0.3, GRID).astype(np.float32) * (logits > -2)
        whole = prepared.to_scan(logits, fill=-30.0)
        mask, values = prepared.drawn_on_scan(logits)
        assert mask.flags.f_contiguous == whole.flags.f_contiguous
        assert np.array_equal(mask, whole > 0)
        np.testing.assert_array_equal(np.sort(values), np.sort(whole[whole > 0]))
    assert not prepared.drawn_on_scan(np.full(GRID, -1.0, np.float32))[0].any()


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_occupied_part_is_what_scipy_finds(order):
    mask = np.zeros((5, 7, 9), bool, order=order)
    assert occupied(mask) is None
    mask[1, 2, 8] = mask[3, 2, 4] = True
    assert [occupied(mask)] == ndimage.find_objects(mask.astype(int))
    assert [occupied(mask[::-1].transpose(2, 0, 1))] == ndimage.find_objects(mask[::-1].transpose(2, 0, 1).astype(int))
