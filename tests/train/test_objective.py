"""Sums by name, simulated prompts that are true of their masks, and a graph that is the same whatever a batch holds."""

import pytest
import torch
import torch.nn.functional as F

from m3d.train.objective import KINDS, LossWeights, TalkAndDraw, balanced_bce, correct, pick, simulate_prompts
from segvol_head import Prompts

GRID = (8, 16, 24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks() -> torch.Tensor:
    truth = torch.zeros(2, 1, *GRID, dtype=torch.bool)
    truth[0, 0, 2:5, 3:9, 4:10] = True
    truth[1, 0, 1:2, 0:1, 20:24] = True
    return truth


def without_masks(batch: dict, seg_token_id: int) -> dict:
    return batch | {
        "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == seg_token_id, 5),
        "masks": batch["masks"][:0],
        "mask_volume": batch["mask_volume"][:0],
        "prompted": batch["prompted"][:0],
        "prompt_seeds": [],
    }


def learn(model, batch, **weights) -> dict[str, torch.Tensor | None]:
    """The gradients of the sum of all losses."""
    model.zero_grad(set_to_none=True)
    losses = TalkAndDraw(model, LossWeights(**weights)).eval()(batch)
    sum(loss.weight * loss.total for loss in losses.values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_simulated_clicks_are_inside_and_boxes_around():
    truth = blocks()
    kinds = set()
    for seed in range(12):
        prompts = simulate_prompts(truth, generator(seed))
        kinds.add((prompts.points is None, prompts.boxes is None))
        if prompts.points is not None:
            for mask, (d, h, w) in zip(truth[:, 0], prompts.points[:, 0].long().tolist(), strict=True):
                assert mask[d, h, w]
        if prompts.boxes is not None:
            exact = torch.tensor([[2.0, 3, 4, 4, 8, 9], [1.0, 0, 20, 1, 0, 23]])
            assert (prompts.boxes - exact).abs().max() <= 1
            assert (prompts.boxes >= 0).all()
    assert kinds == {(False, True), (True, False), (False, False)}


def test_a_mask_has_its_prompts_whatever_stands_beside_it():
    truth = blocks()
    both = simulate_prompts(truth, [generator(3), generator(4)], kind="click and box")
    alone = simulate_prompts(truth[1:], [generator(4)], kind="click and box")
    assert torch.equal(both.points[1:], alone.points) and torch.equal(both.boxes[1:], alone.boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_says_what_is_simulated(kind):
    prompts = simulate_prompts(blocks(), generator(), kind=kind)
    assert (prompts.points is not None) == ("click" in kind)
    assert (prompts.boxes is not None) == ("box" in kind)


def test_a_correction_clicks_where_the_answer_is_wrong():
    truth = blocks()
    logits = torch.full((2, 1, *GRID), -5.0)
    logits[0, 0, 2:5, 3:9, 4:10] = 5.0
    logits[0, 0, 6:8] = 5.0  # the first answer draws too much, the second nothing
    again = correct(Prompts(boxes=torch.zeros(2, 6)), logits, truth, generator())
    assert again.point_labels.tolist() == [[0.0], [1.0]]
    assert again.points[0, 0, 0] >= 6
    assert truth[1, 0][tuple(again.points[1, 0].long().tolist())]
    assert torch.equal(again.mask, logits)


def test_pick_is_uniform_over_the_region():
    region = blocks()[1, 0]
    drawn = {int(pick(region, generator(seed))[2]) for seed in range(60)}
    assert drawn == {20, 21, 22, 23}


def test_balanced_bce_gives_the_structure_its_share():
    truth = torch.zeros(2, 1, 2, 5, 10, dtype=torch.bool)
    truth[0, 0, 0, 0, 0] = True  # one voxel of a hundred; the other mask is empty
    logits = torch.zeros(truth.shape)
    log2 = 0.6931472
    assert balanced_bce(logits, truth, 0.0).tolist() == pytest.approx([log2, log2])
    assert balanced_bce(logits, truth, 0.5).tolist() == pytest.approx([log2 * (99 + 50) / 100, log2])


def test_text_is_the_sum_of_the_cross_entropies_that_transformers_averages(tiny_batch, tiny_model):
    losses = TalkAndDraw(tiny_model, LossWeights()).eval()(tiny_batch)
    inputs = ("input_ids", "attention_mask", "labels", "pixel_values", "volume_index")
    out = tiny_model(**{key: tiny_batch[key] for key in inputs}, draw_masks=True)
    text = losses["text"]
    assert (text.count, text.weight) == ("text", 1.0)
    assert text.total.item() / tiny_batch["counts"]["text"] == pytest.approx(out.loss.item(), rel=1e-5)
    voxels = F.binary_cross_entropy_with_logits(out.mask_logits, tiny_batch["masks"].float(), reduction="none")
    assert losses["bce"].total.item() == pytest.approx(voxels.flatten(1).mean(1).sum().item(), rel=1e-5)
    assert losses["dice"].count == losses["bce"].count == "masks" and losses["prompted"].count == "prompted"
    assert 0 < losses["dice"].total.item() <= 3


def test_logits_are_computed_once_and_only_where_something_is_learned(tiny_batch, tiny_model, monkeypatch):
    widths = []
    head = tiny_model.language_model.lm_head.forward
    monkeypatch.setattr(
        tiny_model.language_model.lm_head, "forward", lambda states: (widths.append(states.shape[1]), head(states))[1]
    )
    TalkAndDraw(tiny_model, LossWeights())(tiny_batch)
    assert widths == [int((tiny_batch["labels"][:, 1:] != -100).any(dim=0).sum())]


@pytest.mark.parametrize("turn", range(len(KINDS)))
def test_every_kind_of_prompt_is_learned_and_repeats(turn, tiny_batch, tiny_model, monkeypatch):
    seen = []
    draw = tiny_model.draw

    def spy(features, **asked):
        seen.append(asked)
        return draw(features, **asked)

    monkeypatch.setattr(tiny_model, "draw", spy)
    objective = TalkAndDraw(tiny_model, LossWeights()).eval()
    first, again = (objective(tiny_batch | {"turn": turn})["prompted"].total for _ in range(2))
    assert first.item() == again.item() > 0
    _, asked, corrected = seen[:3]
    assert (asked["text"] is not None) == (corrected["text"] is not None) == ("name" in KINDS[turn])
    assert corrected["prompts"].mask is not None and corrected["prompts"].points is not None
    assert len(asked["volume_index"]) == 2


def test_a_name_beside_a_click_teaches_the_name(tiny_batch, tiny_model):
    only = {"text": 0.0, "dice": 0.0, "bce": 1e-9, "prompted": 1.0}
    alone = learn(tiny_model, tiny_batch | {"turn": KINDS.index("click")}, **(only | {"dice": 1.0}))
    named = learn(tiny_model, tiny_batch | {"turn": KINDS.index("name and click")}, **(only | {"dice": 1.0}))
    assert not torch.allclose(alone["seg_projector.0.weight"], named["seg_projector.0.weight"])


@pytest.mark.parametrize("turn", range(len(KINDS)))
def test_a_batch_without_masks_has_the_graph_of_one_with_them_and_no_gradient(turn, tiny_batch, tiny_model):
    batch = tiny_batch | {"turn": turn}
    full = learn(tiny_model, batch)
    empty = learn(tiny_model, without_masks(batch, tiny_model.config.seg_token_id))
    assert {name for name, grad in full.items() if grad is None} == {
        name for name, grad in empty.items() if grad is None
    }
    head = [grad for name, grad in empty.items() if name.startswith("seg_") and grad is not None]
    assert head and all(not grad.any() for grad in head)
    losses = TalkAndDraw(tiny_model, LossWeights())(without_masks(batch, tiny_model.config.seg_token_id))
    assert [losses[name].total.item() for name in ("dice", "bce", "prompted")] == [0, 0, 0]


def test_modules_run_in_one_order_whatever_the_batch_holds(tiny_batch, tiny_model):
    """ZeRO-3 gathers weights as modules run: ranks that run others wait for each other for ever."""

    def order(batch) -> list[str]:
        names, hooks = [], []
        for name, module in tiny_model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
        TalkAndDraw(tiny_model, LossWeights())(batch)
        for hook in hooks:
            hook.remove()
        return names

    one = tiny_batch | {
        "input_ids": tiny_batch["input_ids"][:1], "attention_mask": tiny_batch["attention_mask"][:1],
        "labels": tiny_batch["labels"][:1], "volume_index": tiny_batch["volume_index"][:1],
        "masks": tiny_batch["masks"][:1], "mask_volume": tiny_batch["mask_volume"][:1],
        "prompted": tiny_batch["prompted"][:1], "prompt_seeds": [5],
    }  # fmt: skip
    expected = order(tiny_batch)
    assert order(without_masks(tiny_batch, tiny_model.config.seg_token_id)) == expected == order(one)


def test_a_batch_that_teaches_no_word_has_a_graph(tiny_batch, tiny_model):
    silent = tiny_batch | {"labels": torch.full_like(tiny_batch["labels"], -100)}
    gradients = learn(tiny_model, silent, dice=0.0, bce=0.0, prompted=0.0)
    assert gradients["language_model.lm_head.weight"] is not None
    assert not gradients["language_model.lm_head.weight"].any()


def test_nothing_is_drawn_where_no_mask_loss_has_weight(tiny_batch, tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model, "draw", lambda *a, **k: pytest.fail("it drew"))
    losses = TalkAndDraw(tiny_model, LossWeights(dice=0, bce=0, prompted=0))(tiny_batch)
    assert set(losses) == {"text"}


def test_masks_that_do_not_fit_the_text_are_refused(tiny_batch, tiny_model):
    with pytest.raises(ValueError, match=r"3 \[SEG\] and 2 masks; ids: case/00, case/01"):
        TalkAndDraw(tiny_model, LossWeights())(tiny_batch | {"masks": tiny_batch["masks"][:2]})


def test_merged_masks_cannot_be_learned(tiny_model):
    tiny_model.merge = "mean"
    with pytest.raises(ValueError, match='train with "each"'):
        TalkAndDraw(tiny_model, LossWeights())
