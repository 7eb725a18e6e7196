"""Segmentation pretraining: what each kind of prompt is given, what is summed, and that a volume is looked at once."""

import random

import pytest
import torch

from m3d.models import M3DSegConfig, M3DVisionConfig
from m3d.models.seg_token import find_seg_tokens, seg_states
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.recipes.handover import load_model, save_model
from m3d.tasks.wordings import Phrases
from m3d.train.drawing import DrawByPrompts, MaskCollator, NameVectors, language_vectors
from m3d.train.objective import KINDS, LossWeights
from m3d.train.spread import Moments
from m3d.train.views import Drawn
from segvol_head import bce_loss, dice_loss

GRID = (8, 16, 24)
NAMES = ["liver", "spleen", "larynx"]


@pytest.fixture
def segvol() -> PromptedSegVol:
    torch.manual_seed(0)
    vision = M3DVisionConfig(
        image_size=list(GRID), patch_size=[4, 8, 8], hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, detail_channels=4,
    )  # fmt: skip
    seg = M3DSegConfig(
        decoder_heads=2, decoder_mlp_dim=32, iou_hidden_size=16, num_masks=1, coordinates="grid",
        upscale_norm="channel", mask_prompt=True, projector_dropout=0.0,
    )  # fmt: skip
    return PromptedSegVol(M3DSegVolConfig(vision_config=vision, seg_config=seg, text_width=12))


@pytest.fixture
def names() -> NameVectors:
    return NameVectors(NAMES, torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(1)))


def item(index: int, *regions: tuple[str, tuple[slice, ...] | None]) -> Drawn:
    masks = torch.zeros(len(regions), 1, *GRID, dtype=torch.bool)
    for mask, (_, region) in zip(masks, regions, strict=True):
        if region is not None:
            mask[0][region] = True
    pixels = torch.rand(1, *GRID, generator=torch.Generator().manual_seed(index))
    return Drawn(f"case/{index}", index, f"seed/{index}", pixels, masks, tuple(name for name, _ in regions))


@pytest.fixture
def items() -> list[Drawn]:
    block = (slice(2, 6), slice(4, 12), slice(4, 12))
    return [item(0, ("liver", block), ("larynx", None)), item(1, ("spleen", (slice(0, 3), slice(0, 5), slice(0, 6))))]


def test_the_batch_says_what_is_counted_and_whose_turn_it_is(items):
    batch = MaskCollator(global_batch=1)(items[1:])
    assert (batch["turn"], batch["counts"]) == (1, {"masks": 1, "volumes": 1, "prompted": 1, "pseudo": 0})
    both = MaskCollator(global_batch=2)(items)
    assert (both["turn"], both["counts"]["masks"], both["counts"]["prompted"]) == (0, 3, 2)
    assert both["names"] == ["liver", "larynx", "spleen"] and both["mask_volume"].tolist() == [0, 0, 1]


def test_losses_are_sums_over_masks_and_the_volume_is_seen_once(segvol, names, items, monkeypatch):
    batch = MaskCollator(global_batch=2)(items)
    objective = DrawByPrompts(segvol, names, LossWeights(prompted=0.25)).eval()
    looked = []
    look = segvol.look
    monkeypatch.setattr(segvol, "look", lambda pixels: looked.append(len(pixels)) or look(pixels))
    losses = objective(batch)
    assert looked == [2]
    assert {name: (loss.count, loss.weight) for name, loss in losses.items()} == {
        "dice": ("masks", 1.0), "bce": ("masks", 1.0), "prompted": ("prompted", 0.25),
    }  # fmt: skip
    vectors = objective.names(batch["names"], batch["seed"])
    logits = segvol.draw(look(batch["pixel_values"]), batch["mask_volume"], names=vectors)
    torch.testing.assert_close(losses["dice"].total, 3 * dice_loss(logits, batch["masks"]))
    torch.testing.assert_close(losses["bce"].total, 3 * bce_loss(logits, batch["masks"]))


def test_every_kind_of_prompt_has_its_turn_with_a_correction(segvol, names, items, monkeypatch):
    """Clicks, boxes, both, and names beside them; then that answer and one click more. Never for an empty mask."""
    asked = []
    draw = segvol.draw

    def spy(features, index, *, names=None, prompts=None):
        asked.append((names is not None, prompts))
        return draw(features, index, names=names, prompts=prompts)

    monkeypatch.setattr(segvol, "draw", spy)
    objective = DrawByPrompts(segvol, names, LossWeights())
    for turn, kind in enumerate(KINDS):
        asked.clear()
        objective(MaskCollator(global_batch=2)(items) | {"turn": turn})
        (by_name, first), (named, prompts), (again, corrected) = asked
        assert by_name and first is None
        assert named == again == ("name" in kind)
        assert (prompts.points is not None) == ("click" in kind)
        assert (prompts.boxes is not None) == ("box" in kind)
        assert prompts.mask is None and corrected.mask is not None
        assert len(prompts) == len(corrected) == 2  # the absent larynx is asked for by its name alone
        clicks = 0 if prompts.points is None else prompts.points.shape[1]
        assert corrected.points.shape[1] == clicks + 1


def test_a_batch_without_masks_runs_the_same_modules_and_weighs_nothing(segvol, names):
    objective = DrawByPrompts(segvol, names, LossWeights())
    losses = objective(MaskCollator()([item(0)]))
    assert set(losses) == {"dice", "bce", "prompted"}
    assert all(loss.total.item() == 0 for loss in losses.values())
    sum(loss.total for loss in losses.values()).backward()
    silent = [n for n, p in segvol.named_parameters() if p.grad is None and "iou_prediction_head" not in n]
    assert not [name for name in silent if not name.startswith("seg_head.prompt_encoder")]


def test_the_detail_path_falls_silent_as_often_as_it_should(segvol, names, items):
    objective = DrawByPrompts(segvol, names, LossWeights(), detail_dropout=0.25).train()
    features = segvol.look(torch.rand(2, 1, *GRID))
    heard = [objective._quieted(features, seed).detail.flatten(1).any(dim=1) for seed in range(200)]
    assert 0.68 < torch.cat(heard).float().mean() < 0.82
    assert objective.eval()._quieted(features, 0) is features
    batch = MaskCollator(global_batch=2)(items)
    assert objective.train()(batch)["dice"].total == objective(batch)["dice"].total  # by the batch's seed alone
    with pytest.raises(ValueError, match="must be a probability below 1"):
        DrawByPrompts(segvol, names, LossWeights(), detail_dropout=1.0)


@pytest.mark.integration
def test_learning_draws_what_it_is_told(segvol, names, items):
    objective = DrawByPrompts(segvol, names, LossWeights(positive_share=0.1), detail_dropout=0.0)
    optimizer = torch.optim.AdamW(segvol.parameters(), lr=1e-2)
    batch = MaskCollator(global_batch=2)(items)
    history = []
    for turn in range(8):
        losses = objective(batch | {"turn": turn})
        total = sum(loss.weight * loss.total for loss in losses.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses["dice"].total.item())
    assert history[-1] < 0.85 * history[0]


def test_vectors_of_names_are_what_seg_will_be_asked_with(model, processor):
    """The state that predicts ``[SEG]`` in the exchange of that wording, read by the model's own helpers."""
    model.language_model.eval()
    found = language_vectors(model.language_model, processor.tokenizer, ["left kidney", "liver"], wordings=3)
    assert found.vectors.shape == (2, 3, 16)
    say = Phrases("en", random.Random("liver/2"))
    prompt, answer = say("seg.sem", "prompt", names=say.join([say.named("liver")])), say(
        "seg.sem", "answer", masks=say.join(["liver [SEG]"])
    )  # fmt: skip
    ids = processor.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    states = model.language_model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    expected = seg_states(states, find_seg_tokens(ids, model.config.seg_token_id))[0]
    torch.testing.assert_close(found.vectors[1, 2], expected, atol=1e-5, rtol=1e-4)
    assert {tuple(found(["liver"], seed)[0].tolist()) for seed in range(20)} <= {
        tuple(one.tolist()) for one in found.vectors[1]
    }
    with pytest.raises(ValueError, match="no vector for the name 'spleen'"):
        found(["spleen"], 0)


def test_the_whole_model_goes_on_drawing_as_segvol_learned_to(segvol, model, processor, tmp_path):
    """Names and weights are those of `M3DForConditionalGeneration`: a head taken over draws the same masks."""
    ours = {name.split(".")[0] for name in segvol.state_dict()}
    assert ours == {"vision_tower", "seg_head", "seg_projector"}
    save_model(tmp_path, model, processor)
    whole, _ = load_model(tmp_path)
    assert {name for name in whole.state_dict() if name.startswith("seg_head.")} == {
        name for name in segvol.state_dict() if name.startswith("seg_head.")
    }


def token_spread(tokens: torch.Tensor) -> float:
    moments = Moments()
    moments.add(tokens)
    return moments.spread()


def test_spread_of_tokens_by_hand():
    alike = torch.randn(1, 5, 3).expand(4, -1, -1)
    assert token_spread(alike) == pytest.approx(0.0, abs=1e-7)
    assert token_spread(torch.randn(64, 50, 8)) == pytest.approx(1.0, abs=0.02)  # no memory of the place
    # two volumes, two places, one channel: 1 and 3 at the first, -3 and -1 at the second
    assert token_spread(torch.tensor([[[1.0], [-3.0]], [[3.0], [-1.0]]])) == pytest.approx((1 / 5) ** 0.5)
    with pytest.raises(ValueError, match="needs two or more, got 1"):
        token_spread(torch.zeros(1, 2, 3))
    tokens, one, other = torch.randn(7, 5, 3), Moments(), Moments()
    one.add(tokens[:2]), one.add(tokens[2:3]), other.add(tokens[3:])
    assert Moments.of([one, Moments(), other]).spread() == pytest.approx(token_spread(tokens))
    between, overall = tokens.var(dim=0, correction=0).mean(), tokens.flatten(0, 1).var(dim=0, correction=0).mean()
    assert token_spread(tokens) == pytest.approx((between / overall).sqrt().item(), rel=1e-5)
