"""Blocks of patches stacked into one token: which patch stands where, and which sizes cannot be."""

import itertools

import pytest
import torch
from einops import EinopsError

from m3d.models import M3DConfig, M3DForConditionalGeneration
from m3d.models.config import POOLING
from m3d.models.perceiver import PERCEIVERS, StackingPerceiver, build_perceiver, projection
from tests.conftest import small_config

GRID, WIDTH = (2, 4, 6), 3


def stacking(language_width: int = 5) -> StackingPerceiver:
    torch.manual_seed(0)
    made = build_perceiver("stacked", GRID, 2, ("mlp", 2), WIDTH, language_width)
    assert isinstance(made, StackingPerceiver)
    return made


@torch.no_grad()
def test_blocks_are_stacked_as_a_loop_would():
    """Block by block in d-major order; in a block its eight patches in d-major order, each with all its channels."""
    perceiver, (d, h, w) = stacking(), GRID
    tokens = torch.randn(2, d * h * w, WIDTH)
    expected = []
    for volume in tokens:
        rows = []
        for i, j, k in itertools.product(range(0, d, 2), range(0, h, 2), range(0, w, 2)):
            places = itertools.product((i, i + 1), (j, j + 1), (k, k + 1))
            rows.append(torch.cat([volume[(a * h + b) * w + c] for a, b, c in places]))
        expected.append(torch.stack(rows))
    stacked = torch.stack(expected)
    assert stacked.shape == (2, 6, 8 * WIDTH)
    assert torch.equal(perceiver.pool(tokens), stacked)
    first, _, second = perceiver.projector
    torch.testing.assert_close(perceiver(tokens), second(torch.nn.functional.gelu(first(stacked))))


@torch.no_grad()
def test_the_mean_of_a_stack_is_the_spatial_pool():
    tokens = torch.randn(2, 48, WIDTH)
    spatial = build_perceiver("spatial", GRID, 2, ("mlp", 2), WIDTH, 5)
    torch.testing.assert_close(stacking().pool(tokens).unflatten(-1, (8, WIDTH)).mean(dim=2), spatial.pool(tokens))


def test_every_way_of_pooling_is_built_with_the_width_that_enters():
    assert tuple(PERCEIVERS) == POOLING
    for pooling, kind in PERCEIVERS.items():
        made = build_perceiver(pooling, GRID, 2, ("linear", 1), WIDTH, 5)
        assert type(made) is kind
        assert made.projector[0].in_features == (24 if pooling == "stacked" else 3)
        assert made(torch.zeros(1, 48, WIDTH)).shape == (1, 6, 5)


def test_wrong_sizes_are_refused():
    with pytest.raises(EinopsError, match="47 != 48"):
        stacking()(torch.zeros(1, 47, WIDTH))
    narrow = StackingPerceiver(GRID, 2, projection("mlp", 2, WIDTH, 5))  # as wide as for means
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        narrow(torch.zeros(1, 48, WIDTH))


def test_a_stacking_model_comes_back_from_its_folder(tokenizer_and_ids, tmp_path):
    config = small_config(*tokenizer_and_ids)
    values = config.to_dict() | {"pooling": "stacked", "pool_size": 2}
    values["vision_config"] = values["vision_config"] | {"patch_size": [4, 8, 6]}  # 2 x 2 x 4 patches
    config = M3DConfig(**values)
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again = M3DConfig.from_pretrained(tmp_path)
    assert again.to_dict() == M3DConfig(**again.to_dict()).to_dict()
    assert (again.pooling, again.pool_size, again.num_image_tokens) == ("stacked", 2, 2)
    assert (again.vision.detail_channels, again.vision.detail_filters) == (4, 8)
    loaded, info = M3DForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(loaded.perceiver, StackingPerceiver)
    assert loaded.perceiver.projector[0].weight.shape == (16, 8 * 16)
    pixels = torch.rand(1, 1, 8, 16, 24)
    with torch.no_grad():
        one, other = (each.get_image_features(pixels) for each in (model, loaded.eval()))
    assert one.pooler_output.shape == (1, 2, 16)
    assert torch.equal(one.pooler_output, other.pooler_output)
    with pytest.raises(ValueError, match=r"pool_size=2 must divide every side of the patch grid \(2, 2, 3\)"):
        M3DConfig(**values | {"vision_config": values["vision_config"] | {"patch_size": [4, 8, 8]}})
