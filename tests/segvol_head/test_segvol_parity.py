"""SegVol against the reference's own numbers (fixture segvol_a)."""

import pytest
import torch

from encoders.vit3d import ViT3D
from segvol_head import Prompts, bce_loss, dice_loss
from segvol_head.published import published_segvol, rename

TOLERANCE = 2e-5
COMBINATIONS = ["point+text", "box+text", "text", "box", "point", "box+point"]


def max_error(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def model(segvol_a):
    return segvol_a.segvol()


@pytest.fixture(scope="module")
def features(model, segvol_a):
    with torch.no_grad():
        return model.encode(segvol_a.inputs["images"].float() / 255)


def prompts_of(fixture, kinds):
    parts = {
        "point": {"points": fixture.inputs["points"], "point_labels": fixture.inputs["point_labels"]},
        "box": {"boxes": fixture.inputs["boxes"]},
        "text": {"text": fixture.outputs["text_embedding"]},
    }
    return Prompts(**{name: value for kind in kinds.split("+") for name, value in parts[kind].items()})


def test_the_image_encoder_and_the_dense_positions(model, features, segvol_a):
    tokens = features.tokens.flatten(2).transpose(1, 2)
    assert max_error(tokens, segvol_a.outputs["image_embedding_sample"]) < TOLERANCE
    assert max_error(model.prompt_encoder.dense_position(), segvol_a.outputs["dense_pe"]) == 0
    _, dense = model.prompt_encoder(prompts_of(segvol_a, "text"))
    assert max_error(dense[..., 0, 0, 0], segvol_a.outputs["no_mask_dense"]) == 0
    assert bool((dense == dense[..., :1, :1, :1]).all())


def test_the_text_tower_that_the_zoom_tests_lean_on(segvol_a):
    token_ids = segvol_a.inputs["text_input_ids"]
    assert max_error(segvol_a.text_pooled(token_ids), segvol_a.outputs["text_pooled"]) < TOLERANCE
    assert max_error(segvol_a.text_embedding(token_ids), segvol_a.outputs["text_embedding"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kinds", COMBINATIONS)
def test_every_combination_of_prompts(model, features, segvol_a, kinds):
    prompts = prompts_of(segvol_a, kinds)
    sparse, _ = model.prompt_encoder(prompts)
    low_res = model.low_res(features, prompts)
    logits = model.decode(features, prompts)
    target = segvol_a.inputs["labels"]
    ours = {
        "sparse": sparse,
        "low_res": low_res.masks,
        "iou": model.mask_decoder.quality(low_res),
        "logits_sample": logits,
        "bce": bce_loss(logits, target),
        "dice_per_sample": dice_loss(logits, target),
        "dice_ref_squeeze": dice_loss(logits.squeeze(), target.squeeze()),
    }
    for name, value in ours.items():
        assert max_error(value, segvol_a.outputs[f"{kinds}/{name}"]) < TOLERANCE, name


@torch.no_grad()
def test_all_four_masks(model, features, segvol_a):
    low_res = model.low_res(features, prompts_of(segvol_a, "point+text"), all_masks=True)
    assert max_error(low_res.masks, segvol_a.outputs["all_masks"]) < TOLERANCE
    assert max_error(model.mask_decoder.quality(low_res), segvol_a.outputs["all_iou"]) < TOLERANCE


@torch.no_grad()
def test_several_prompts_about_one_volume(model, features, segvol_a):
    prompts = Prompts(text=segvol_a.inputs["multi_prompt/text_embedding"])
    low_res = model.low_res(features, prompts, torch.zeros(3, dtype=torch.long))
    assert max_error(low_res.masks, segvol_a.outputs["multi_prompt/low_res"]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_released_names_load_whatever_stands_before_them(segvol_a, prefix):
    renamed = rename({prefix + key: value for key, value in segvol_a.weights.items()})
    assert set(renamed) == set(segvol_a.segvol().state_dict())


def test_leftovers_of_monai_are_dropped(segvol_a):
    leftovers = ["blocks.0.norm_cross_attn.weight", "blocks.1.cross_attn.to_q.weight", "patch_embedding.cls_token"]
    extra = {f"image_encoder.{name}": torch.zeros(1) for name in leftovers}
    assert rename({**segvol_a.weights, **extra}).keys() == rename(segvol_a.weights).keys()


def test_strange_keys_are_named(segvol_a):
    with pytest.raises(ValueError, match=r"mask_decoder\.novelty"):
        rename({**segvol_a.weights, "mask_decoder.novelty": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.weight"):
        rename({f"model.{key}": value for key, value in segvol_a.weights.items()} | {"other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not SegVol weights"):
        rename({"lm_head.weight": torch.zeros(1)})


def test_the_published_size_counts_as_released():
    """REFERENCE: encoder 87.39 M, decoder 29.92 M, prompt encoder 19,148 values, of which 13,388 were dead."""
    with torch.device("meta"):
        model = published_segvol(ViT3D(cls_token=False))
    parts = (model.image_encoder, model.mask_decoder, model.prompt_encoder)
    sizes = [sum(value.numel() for value in part.state_dict().values()) for part in parts]
    assert sizes == [87_388_416, 29_923_716, 19_148 - 13_388]
