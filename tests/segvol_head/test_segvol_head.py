"""What the decoder promises: each prompt counts, volumes and prompts are matched, every part learns."""

import subprocess
import sys

import pytest
import torch

from encoders.vit3d import ViT3D
from segvol_head import ImageFeatures, MaskDecoder3D, PromptEncoder3D, Prompts, SegVol, bce_loss, dice_loss

TOKENS, WIDTH, SIZE = 24, 16, (8, 16, 12)


@pytest.fixture
def features(small_segvol):
    generator = torch.Generator().manual_seed(1)
    return small_segvol().features(torch.randn(2, TOKENS, WIDTH, generator=generator))


def text(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(2))


def point(*where, label=1.0):
    return {"points": torch.tensor([[where]], dtype=torch.float32), "point_labels": torch.tensor([[label]])}


BASE = {"text": text(1)}
CHANGES = {
    "text": {"text": text(1) + 1},
    "positive point": {**BASE, **point(2, 3, 4)},
    "negative point": {**BASE, **point(2, 3, 4, label=0.0)},
    "another point": {**BASE, **point(2, 3, 5)},
    "box": {**BASE, "boxes": torch.tensor([[1.0, 2, 3, 4, 5, 6]])},
    "box and point": {**BASE, **point(2, 3, 4), "boxes": torch.tensor([[1.0, 2, 3, 4, 5, 6]])},
    "mask": {**BASE, "mask": torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(3))},
    "coarse mask": {**BASE, "mask": torch.full((1, 1, 4, 4, 4), -torch.inf)},
}


@torch.no_grad()
@pytest.mark.parametrize("coordinates", ["published", "grid"])
def test_every_kind_of_prompt_changes_the_mask(small_segvol, features, coordinates):
    model = small_segvol(coordinates=coordinates, mask_prompt=True)
    first = torch.zeros(1, dtype=torch.long)
    drawn = {name: model.decode(features, Prompts(**given), first) for name, given in CHANGES.items()}
    drawn["nothing but text"] = model.decode(features, Prompts(**BASE), first)
    for name, logits in drawn.items():
        assert logits.shape == (1, 1, *SIZE)
        assert bool(logits.isfinite().all()), name
        same = [other for other, mask in drawn.items() if other != name and (mask - logits).abs().max() < 1e-6]
        assert not same, (name, same)


@torch.no_grad()
def test_padding_points_do_not_move_with_their_place(small_segvol, features):
    model = small_segvol()
    here, there = (Prompts(**point(*where, label=-1.0), text=text(1)) for where in ((0, 0, 0), (5, 6, 7)))
    index = torch.zeros(1, dtype=torch.long)
    assert torch.equal(model.decode(features, here, index), model.decode(features, there, index))


def test_true_coordinates_agree_between_clicks_and_cells(small_segvol):
    encoder = small_segvol(coordinates="grid").prompt_encoder
    cell = (1, 2, 1)
    centre = torch.tensor([(side + 0.5) * 4 - 0.5 for side in cell])  # every cell is 4 voxels wide here
    assert torch.allclose(encoder._position(centre), encoder.dense_position()[0, :, *cell], atol=1e-5)


def test_published_coordinates_keep_their_mistake(small_segvol):
    encoder = small_segvol(coordinates="published").prompt_encoder
    d, h, w = SIZE
    swapped = torch.tensor([1.5 / h, 2.5 / d, 3.5 / w])
    assert torch.equal(encoder._position(torch.tensor([1.0, 2.0, 3.0])), encoder.pe_layer(swapped))
    dense = encoder.dense_position()[0]
    assert torch.allclose(dense[:, 0, 1, 2], encoder.pe_layer(torch.tensor([1.5 / 4, 0.5 / 2, 2.5 / 3])), atol=1e-6)


def test_a_mask_prompt_needs_a_model_that_learned_it(small_segvol, features):
    with pytest.raises(ValueError, match="has not learned to use an earlier mask"):
        small_segvol().decode(features, Prompts(text=text(2), mask=torch.zeros(2, 1, *SIZE)))


@torch.no_grad()
def test_prompts_of_several_volumes_in_one_batch(small_segvol):
    model = small_segvol(detail=3)
    tokens, detail = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 3, *SIZE)
    both = model.features(tokens, detail)
    embeddings, index = text(5), torch.tensor([1, 0, 1, 1, 0])
    together = model.decode(both, Prompts(text=embeddings), index)
    for p, owner in enumerate(index):
        alone = model.features(tokens[owner : owner + 1], detail[owner : owner + 1])
        one = model.decode(alone, Prompts(text=embeddings[p : p + 1]))
        torch.testing.assert_close(together[p : p + 1], one, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_index_may_be_left_out_where_there_is_no_choice(small_segvol, features):
    model, prompts = small_segvol(), Prompts(text=text(2))
    assert torch.equal(model.decode(features, prompts), model.decode(features, prompts, torch.tensor([0, 1])))
    one = ImageFeatures(features.tokens[:1])
    assert torch.equal(model.decode(one, prompts), model.decode(features, prompts, torch.tensor([0, 0])))


def test_no_prompts_give_no_masks(small_segvol, features):
    for model in (small_segvol(), small_segvol(detail=2)):
        nothing = Prompts(text=torch.zeros(0, WIDTH))
        assert model.decode(features, nothing, torch.zeros(0, dtype=torch.long)).shape == (0, 1, *SIZE)
        assert model.decode(features, nothing[0:0], torch.zeros(0), all_masks=True).shape == (0, 4, *SIZE)


@torch.no_grad()
def test_one_mask_unless_all_are_asked_for(small_segvol, features):
    model, prompts = small_segvol(), Prompts(text=text(2))
    every = model.decode(features, prompts, all_masks=True)
    assert every.shape == (2, 4, *SIZE)
    torch.testing.assert_close(every[:, :1], model.decode(features, prompts))
    low_res = model.low_res(features, prompts)
    assert low_res.masks.shape == (2, 1, 8, 16, 12)
    assert model.mask_decoder.quality(low_res).shape == (2, 1)


@torch.no_grad()
def test_both_norms_of_the_upscaling():
    tied = MaskDecoder3D(16, num_heads=2, mlp_dim=8, upscale_norm="volume", grid=(2, 4, 3))
    free = MaskDecoder3D(16, num_heads=2, mlp_dim=8, upscale_norm="channel")
    assert tied.output_upscaling[1].weight.shape == (4, 4, 8, 6)
    assert free.output_upscaling[1].weight.shape == (4,)
    normed = free.output_upscaling[1](torch.randn(2, 4, 3, 5, 7))
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2, 3, 5, 7), atol=1e-5, rtol=0)
    image, prompt = torch.randn(1, 16, 3, 2, 2), torch.randn(1, 1, 16)
    assert free(image, torch.zeros(1, 16, 3, 2, 2), prompt).masks.shape == (1, 1, 12, 8, 8)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        tied(image, torch.zeros(1, 16, 3, 2, 2), prompt)


@torch.no_grad()
def test_detail_adds_what_the_token_grid_cannot_show(small_segvol):
    model = small_segvol(detail=3)
    tokens, detail = torch.randn(1, TOKENS, WIDTH), torch.zeros(1, 3, *SIZE)
    speck = detail.clone()
    speck[..., 3, 5, 7] = 1
    prompts = Prompts(text=text(2))
    plain, spotted = (model.decode(model.features(tokens, seen), prompts) for seen in (detail, speck))
    changed = (plain - spotted).abs()
    assert changed[..., 3, 5, 7].amin() > 1e-4
    changed[..., 3, 5, 7] = 0
    assert not changed.any()  # one voxel, where the token grid is 4 wide


@torch.no_grad()
def test_detail_is_a_dot_product_with_its_features(small_segvol):
    model, prompts = small_segvol(detail=3), Prompts(text=text(1))
    features = model.features(torch.randn(1, TOKENS, WIDTH), torch.randn(1, 3, *SIZE))
    *hyper, bias = model.detail_hyper(model.low_res(features, prompts).mask_tokens)[0, 0]
    weights = torch.stack(hyper) + model.detail_align(prompts.text)[0]  # the text also picks features directly
    without = SegVol(None, model.prompt_encoder, model.mask_decoder, image_size=SIZE)
    expected = without.decode(ImageFeatures(features.tokens), prompts) + bias
    for weight, feature in zip(weights, features.detail[0], strict=True):
        expected = expected + weight * feature
    torch.testing.assert_close(model.decode(features, prompts), expected, atol=1e-5, rtol=1e-5)


def test_every_part_that_is_used_learns(small_segvol):
    model = small_segvol(detail=3, mask_prompt=True).train()
    tokens = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    detail = torch.randn(2, 3, *SIZE, requires_grad=True)
    embedding = text(3).requires_grad_()
    prompts = Prompts(
        text=embedding,
        points=torch.rand(3, 3, 3) * 8,
        point_labels=torch.tensor([[1, 0, -1]] * 3),
        boxes=torch.tensor([[0.0, 0, 0, 4, 4, 4]] * 3),
        mask=torch.randn(3, 1, *SIZE),
    )
    logits = model.decode(model.features(tokens, detail), prompts, torch.tensor([1, 0, 1]))
    target = (torch.rand(3, 1, *SIZE) > 0.5).float()
    (dice_loss(logits, target) + bce_loss(logits, target)).backward()
    assert tokens.grad.abs().sum() > 0
    assert bool(detail.grad.flatten(1).any(dim=1).all())
    assert embedding.grad.abs().sum() > 0
    idle = {name for name, weight in model.named_parameters() if weight.grad is None}
    expected = {"prompt_encoder.no_mask_embed.weight"}  # a mask stands in its place
    expected |= {name for name, _ in model.named_parameters() if "iou_prediction_head" in name}
    expected |= {name for name, _ in model.named_parameters() if any(f"_mlps.{i}." in name for i in (1, 2, 3))}
    assert idle == expected


@torch.no_grad()
def test_bfloat16_stays_close(small_segvol):
    model = small_segvol(detail=3, mask_prompt=True)
    tokens, detail = torch.randn(1, TOKENS, WIDTH), torch.randn(1, 3, *SIZE)
    prompts = Prompts(text=text(1), **point(2, 3, 4), mask=torch.randn(1, 1, *SIZE))
    exact = model.decode(model.features(tokens, detail), prompts)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.decode(model.features(tokens, detail), prompts)
    model.bfloat16()
    half = model.decode(model.features(tokens.bfloat16(), detail.bfloat16()), prompts)
    for logits in (mixed, half):
        assert logits.dtype == torch.float32
        assert (logits - exact).abs().mean() < 0.05 * exact.std() + 0.02


def test_built_on_the_meta_device_then_drawn(small_segvol):
    with torch.device("meta"):
        model = small_segvol(detail=2)
    model.to_empty(device="cpu").init_weights()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    matrix = model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert matrix.std() > 0.5
    assert model.prompt_encoder.no_mask_embed.weight.std() > 0.3


def test_the_published_form_has_no_new_parameters(small_segvol):
    assert not any(name.startswith("detail") or "mask_embedding" in name for name in small_segvol().state_dict())


def test_an_image_encoder_is_used_where_there_is_one(small_segvol, features):
    class Encoder(torch.nn.Module):
        def forward(self, volumes):
            return features.tokens.flatten(2).transpose(1, 2)[: len(volumes)]

    own = small_segvol()
    model = SegVol(Encoder(), own.prompt_encoder, own.mask_decoder, image_size=SIZE)
    assert torch.equal(model.encode(torch.rand(2, 1, *SIZE)).tokens, features.tokens)
    with pytest.raises(ValueError, match="no image encoder of its own"):
        own.encode(torch.rand(2, 1, *SIZE))


@torch.no_grad()
def test_an_image_encoder_with_detail_is_looked_through_once(small_segvol):
    torch.manual_seed(0)
    tower = ViT3D(
        image_size=SIZE, patch_size=(4, 4, 4), hidden_size=WIDTH, mlp_dim=32, num_layers=1, num_heads=2,
        cls_token=False, detail_channels=3,
    ).eval()  # fmt: skip
    own = small_segvol(detail=3)
    model = SegVol(tower, own.prompt_encoder, own.mask_decoder, image_size=SIZE, detail_channels=3).eval()
    volumes, looked = torch.rand(2, 1, *SIZE), []
    tower.detail.register_forward_hook(lambda *_: looked.append(1))
    features = model.encode(volumes)
    assert looked == [1]
    assert torch.equal(features.detail, tower.detail(volumes))
    assert torch.equal(features.tokens.flatten(2).transpose(1, 2), tower(volumes))


def test_contradictory_shapes_are_clear_errors(small_segvol, features):
    model, prompts = small_segvol(), Prompts(text=text(3))
    with pytest.raises(ValueError, match="was a class token left in"):
        model.features(torch.zeros(1, TOKENS + 1, WIDTH))
    with pytest.raises(ValueError, match=r"volumes must be \(B, 1, 8, 16, 12\), got \(1, 1, 8, 16, 16\)"):
        model.encode(torch.zeros(1, 1, 8, 16, 16))
    with pytest.raises(ValueError, match="3 prompts for 2 volumes"):
        model.decode(features, prompts)
    with pytest.raises(ValueError, match=r"image_index must be \(3,\)"):
        model.decode(features, prompts, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="points outside the 2 volumes"):
        model.decode(features, prompts, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="text prompts are 8 wide, this decoder needs 16"):
        model.decode(features, Prompts(text=torch.zeros(2, 8)))


def test_a_head_that_draws_with_detail_refuses_to_go_without(small_segvol, features):
    model, tokens = small_segvol(detail=2), torch.zeros(1, TOKENS, WIDTH)
    needed = r"draws with features of every voxel, \(1, 2, 8, 16, 12\); got "
    for given, got in (
        (None, "none"),
        (torch.zeros(1, 3, *SIZE), r"\(1, 3, 8, 16, 12\)"),  # of another tower
        (torch.zeros(1, 2, 8, 16, 16), r"\(1, 2, 8, 16, 16\)"),  # of another grid
        (torch.zeros(2, 2, *SIZE), r"\(2, 2, 8, 16, 12\)"),  # of more volumes than there are tokens of
    ):
        with pytest.raises(ValueError, match=needed + got):
            model.features(tokens, given)
    assert model.features(tokens, torch.zeros(1, 2, *SIZE)).detail is not None
    with pytest.raises(ValueError, match="these have none; make them with `encode`"):
        model.decode(features, Prompts(text=text(2)))


def test_a_head_without_detail_lets_it_pass(small_segvol):
    """So that a published head draws with a tower that has some for others."""
    assert small_segvol().features(torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, 2, *SIZE)).detail is None


def test_nonsense_configurations_are_refused(small_segvol):
    with pytest.raises(ValueError, match="'volume' needs grid"):
        MaskDecoder3D(16, num_heads=2, upscale_norm="volume")
    with pytest.raises(ValueError, match="upscale_norm='batch'"):
        MaskDecoder3D(16, num_heads=2, upscale_norm="batch")
    with pytest.raises(ValueError, match="num_heads=3 must divide"):
        MaskDecoder3D(16, num_heads=3)
    with pytest.raises(ValueError, match="divisible by 8"):
        MaskDecoder3D(12, num_heads=2)
    with pytest.raises(ValueError, match="must be even"):
        PromptEncoder3D(15, (2, 2, 2), SIZE)
    with pytest.raises(ValueError, match="coordinates='true'"):
        PromptEncoder3D(16, (2, 2, 2), SIZE, coordinates="true")
    own = small_segvol()
    with pytest.raises(ValueError, match="was built for"):
        SegVol(None, own.prompt_encoder, own.mask_decoder, image_size=(8, 8, 8))


def test_the_gradient_of_four_masks_in_bfloat16_survives_on_one_thread():
    """In a process of its own: where it does not, that process dies."""
    program = """
import torch
from segvol_head.segvol import _draw_detail
torch.set_num_threads(1)
pens = torch.randn(4, 1, 16, dtype=torch.bfloat16, requires_grad=True)
with torch.autocast("cpu", torch.bfloat16):
    drawn = _draw_detail(pens, torch.ones(1, 16, 64, 64, 96, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long))
drawn.sum().backward()
assert drawn.dtype == torch.float32
assert (pens.grad == 64 * 64 * 96).all()  # of ones, every voxel counts once; 3 times a power of two, so exact
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
