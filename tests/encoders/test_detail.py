"""Features of every voxel: what a patch reads of them, by hand, and what a tower makes of them."""

import itertools
import math

import pytest
import torch

from encoders.detail import DetailEmbedding, DetailNetwork
from encoders.vit3d import ViT3D

SIZE, PATCH = (8, 16, 12), (4, 4, 6)
GRID = (2, 4, 2)


def tower(**options) -> ViT3D:
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2}
    return ViT3D(**sizes | {"detail_channels": 3} | options).eval()


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(1))


# -- what a patch reads ------------------------------------------------------------------------------------------------


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


@torch.no_grad()
def test_a_uniform_patch_by_hand():
    """One feature c, mixed into c and -c: GELU(c) - GELU(-c) = c, so the norm makes 8 halves of +1 and 8 of -1."""
    embedding = DetailEmbedding(1, (2, 4, 6), 1)
    embedding.mix.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1))
    embedding.mix.bias.zero_()
    embedding.projection.weight.copy_(torch.tensor([[1.0] * 8 + [0.0] * 8]))
    embedding.projection.bias.fill_(0.5)
    read = embedding(torch.full((1, 1, 2, 4, 12), 3.0))
    expected = 8 * 1.5 / math.sqrt(1.5**2 + 1e-5) + 0.5
    torch.testing.assert_close(read, torch.full((1, 2, 1), expected))


@torch.no_grad()
def test_patches_read_the_means_of_their_halves_in_order():
    """In a loop of plain numbers: mixed and bent voxel by voxel, averaged by halves, normed, projected."""
    torch.manual_seed(0)
    embedding = DetailEmbedding(2, PATCH, 5).double()
    torch.nn.init.normal_(embedding.norm.weight)
    torch.nn.init.normal_(embedding.norm.bias)
    detail = torch.randn(2, 2, *SIZE, dtype=torch.float64)
    mix, shift = embedding.mix.weight.flatten(1).tolist(), embedding.mix.bias.tolist()
    halves = [side // 2 for side in PATCH]
    expected = []
    for volume, place in itertools.product(detail, itertools.product(*map(range, GRID))):
        values = []
        for weights, bias in zip(mix, shift, strict=True):
            for half in itertools.product(range(2), repeat=3):
                starts = [i * p + s * c for i, p, s, c in zip(place, PATCH, half, halves, strict=True)]
                voxels = itertools.product(*(range(a, a + c) for a, c in zip(starts, halves, strict=True)))
                bent = [
                    gelu(sum(w * volume[f, *voxel].item() for f, w in enumerate(weights)) + bias) for voxel in voxels
                ]
                values.append(sum(bent) / len(bent))
        found = torch.tensor(values, dtype=torch.float64)
        normed = (found - found.mean()) / (found.var(correction=0) + 1e-5).sqrt()
        scaled = normed * embedding.norm.weight + embedding.norm.bias
        expected.append(embedding.projection.weight @ scaled + embedding.projection.bias)
    torch.testing.assert_close(embedding(detail), torch.stack(expected).view(2, 16, 5))


@torch.no_grad()
def test_a_patch_reads_its_own_voxels_alone():
    torch.manual_seed(0)
    embedding, detail = DetailEmbedding(2, PATCH, 5), torch.randn(1, 2, *SIZE)
    before = embedding(detail)
    for number, (i, j, k) in enumerate(itertools.product(*map(range, GRID))):
        other = detail.clone()
        other[0, 1, 4 * i + 3, 4 * j, 6 * k + 5] += 1  # one voxel in a corner of the patch
        moved = (embedding(other) != before).any(dim=-1)[0]
        assert moved.nonzero().tolist() == [[number]]


@torch.no_grad()
def test_the_network_takes_sides_that_eight_does_not_divide():
    assert DetailNetwork(2, 8)(torch.rand(1, 1, 5, 17, 8)).shape == (1, 2, 5, 17, 8)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="filters=12 must be divisible by 8"):
        DetailNetwork(2, 12)
    with pytest.raises(ValueError, match=r"patch_size=\(4, 5, 6\) must be even to be read in halves"):
        DetailEmbedding(2, (4, 5, 6), 5)


# -- what a tower makes of it ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_detail_a_tower_is_the_published_one(volumes):
    plain, detailed = tower(detail_channels=0), tower()
    names = set(plain.state_dict())
    assert not any("detail" in name for name in names)
    added = set(detailed.state_dict()) - names
    assert names < set(detailed.state_dict()) and {name.split(".")[0] for name in added} == {
        "detail", "detail_embedding"
    }  # fmt: skip
    seen = plain.look(volumes)
    assert seen.detail is None and torch.equal(seen.tokens, plain(volumes))
    # A tower whose patches read nothing of their detail sees what the published one sees.
    detailed.load_state_dict(plain.state_dict(), strict=False)
    detailed.detail_embedding.projection.weight.zero_()
    detailed.detail_embedding.projection.bias.zero_()
    assert torch.equal(detailed(volumes), plain(volumes))


@torch.no_grad()
@pytest.mark.parametrize("cls_token", [True, False])
def test_to_look_is_to_see_the_same_tokens_in_one_pass(volumes, cls_token):
    model, looked, hooked = tower(cls_token=cls_token), [], []
    expected, detail = model(volumes), model.detail(volumes)
    model.detail.register_forward_hook(lambda *_: looked.append(1))
    model.register_forward_pre_hook(lambda *_: hooked.append(1))
    seen = model.look(volumes)
    assert looked == hooked == [1]  # once, and as a call: engines that share out parameters gather them by such hooks
    assert torch.equal(seen.tokens, expected) and torch.equal(seen.detail, detail)
    assert seen.tokens.shape == (2, 16 + cls_token, 16) and seen.detail.shape == (2, 3, *SIZE)
    assert torch.equal(model.patches(volumes), model.without_cls(seen.tokens))
    assert torch.equal(model.without_cls(seen.tokens), expected[:, int(cls_token) :])
    assert torch.equal(model.norm(model.layers(volumes)[-1]), expected)


@torch.no_grad()
def test_what_is_read_is_added_to_the_patches(volumes):
    model, entered = tower(), []
    model.cls_token.fill_(0.5)
    model.blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    detail = model.look(volumes).detail
    (tokens,) = entered
    assert torch.equal(tokens[:, 0], torch.full((2, 16), 0.5))
    assert torch.equal(tokens[:, 1:], model.patch_embedding(volumes) + model.detail_embedding(detail))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_learned_from_tokens_reaches_the_detail_network(volumes, checkpointing):
    model = tower().train()
    model.gradient_checkpointing = checkpointing
    model.patches(volumes).square()[:, ::3].sum().backward()
    for part in (model.detail, model.detail_embedding):
        gradients = {name: weight.grad for name, weight in part.named_parameters()}
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients.values())
        assert [name for name, gradient in gradients.items() if gradient.ndim > 1 and not gradient.any()] == []
