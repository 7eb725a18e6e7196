"""Sums by name, simulated prompts that are true of their masks, and a graph that is the same whatever a batch holds."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3d.models.box_head import number_reader
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
        prompts = simulate_prompts(truth, [generator(seed), generator(-seed)], kind=KINDS[seed % 3])
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
    prompts = simulate_prompts(blocks(), [generator(), generator()], kind=kind)
    assert (prompts.points is not None) == ("click" in kind)
    assert (prompts.boxes is not None) == ("box" in kind)


def test_a_correction_clicks_where_the_answer_is_wrong():
    truth = blocks()
    logits = torch.full((2, 1, *GRID), -5.0)
    logits[0, 0, 2:5, 3:9, 4:10] = 5.0
    logits[0, 0, 6:8] = 5.0  # the first answer draws too much, the second nothing
    again = correct(Prompts(boxes=torch.zeros(2, 6)), logits, truth, [generator(), generator()])
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


# -- boxes in numbers -----------------------------------------------------------------------------------------------


@pytest.fixture
def box_head(tiny_model) -> Iterator[nn.Sequential]:
    """The tiny model has one for a while."""
    torch.manual_seed(0)
    tiny_model.box_head = number_reader(tiny_model.config.text.hidden_size, 6)
    yield tiny_model.box_head
    tiny_model.box_head = None


@pytest.fixture
def boxed_batch(processor, tiny_batch, box_head) -> dict:
    """Two answers with three boxes, of which one is not known."""
    texts = [
        processor.write(text) for text in ("Where? <bx_start>1<bx_end>", "<bx_start>2<bx_end> <bx_start>3<bx_end>")
    ]
    encoded = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    labels[:, : processor.num_image_tokens + 1] = -100
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [torch.nan] * 6, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    counts = tiny_batch["counts"] | {"boxes": 2}
    return tiny_batch | {**encoded, "labels": labels, "boxes": boxes, "counts": counts}


WORDS_ALONE = LossWeights(dice=0, bce=0, prompted=0, boxes=10)


def test_boxes_are_read_off_the_states_where_they_begin(tiny_model, boxed_batch):
    objective = TalkAndDraw(tiny_model, WORDS_ALONE).eval()
    last = tiny_model.box_head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0]))
        loss = objective(boxed_batch)["boxes"]
    read = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0]).sigmoid()
    known = boxed_batch["boxes"][[0, 2]]
    torch.testing.assert_close(loss.total, (read - known).abs().mean(dim=1).sum())
    assert (loss.count, loss.weight) == ("boxes", 10)


def test_boxes_teach_language_model_and_perceiver_and_unknown_ones_nothing(tiny_model, boxed_batch):
    def gradient(boxes: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        tiny_model.zero_grad(set_to_none=True)
        TalkAndDraw(tiny_model, WORDS_ALONE).eval()(boxed_batch | {"boxes": boxes})["boxes"].total.backward()
        return tiny_model.perceiver.projector[0].weight.grad.clone()

    known = gradient(boxed_batch["boxes"])
    assert known.isfinite().all() and known.abs().sum() > 0
    assert gradient(torch.full((3, 6), torch.nan)).abs().sum() == 0


def test_a_model_without_a_box_head_learns_no_boxes(tiny_model):
    with pytest.raises(ValueError, match=r"loss.boxes needs a model with a box head: begin with init.box_head=true"):
        TalkAndDraw(tiny_model, WORDS_ALONE)


def test_without_boxes_the_reader_is_in_the_graph_all_the_same(tiny_model, tiny_batch, box_head):
    objective = TalkAndDraw(tiny_model, WORDS_ALONE).eval()
    losses = objective(tiny_batch | {"boxes": torch.zeros(0, 6)})
    assert losses["boxes"].total == 0
    sum(loss.total for loss in losses.values()).backward()
    assert all(parameter.grad is not None for parameter in box_head.parameters())


def test_boxes_that_do_not_fit_the_answers_are_refused(tiny_model, boxed_batch):
    with pytest.raises(ValueError, match=r"begin 3 boxes, there are 1; ids: .*case/00"):
        TalkAndDraw(tiny_model, WORDS_ALONE)(boxed_batch | {"boxes": torch.zeros(1, 6)})


# -- pictures that are shown again ----------------------------------------------------------------------------------


def test_a_tower_that_stands_still_looks_at_a_named_picture_once(tiny_model, boxed_batch):
    tiny_model.requires_grad_(False)
    tiny_model.perceiver.requires_grad_(True)
    objective, looks = TalkAndDraw(tiny_model, WORDS_ALONE).eval(), []
    hook = tiny_model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    anew = objective(boxed_batch)["text"].total
    named = boxed_batch | {"pictures": ["case/0"]}
    first, second = objective(named)["text"].total, objective(named)["text"].total
    assert len(looks) == 2  # one of the batch without names, one for both with
    assert torch.equal(first, second)
    torch.testing.assert_close(first, anew, rtol=1e-2, atol=0)  # what is kept is kept in bfloat16
    first.backward()
    assert tiny_model.perceiver.projector[0].weight.grad.abs().sum() > 0
    hook.remove()
    tiny_model.requires_grad_(True)


def test_a_tower_that_learns_looks_at_every_visit(tiny_model, boxed_batch):
    looks = []
    hook = tiny_model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    objective = TalkAndDraw(tiny_model, WORDS_ALONE).eval()
    for _ in range(2):
        objective(boxed_batch | {"pictures": ["case/0"]})
    hook.remove()
    assert len(looks) == 2


# -- measures in numbers --------------------------------------------------------------------------------------------


def measured(batch: dict, values: list[float]) -> dict:
    count = len(values)
    places = torch.full((count,), batch["labels"].shape[1] - 4)
    return batch | {"values": torch.tensor(values), "value_rows": torch.zeros(count).long(), "value_places": places}


def test_measures_are_read_on_a_logarithmic_scale(tiny_model, tiny_batch):
    objective = TalkAndDraw(tiny_model, LossWeights(dice=0, bce=0, prompted=0, values=2)).eval()
    with torch.no_grad():
        objective.value_reader[-1].weight.zero_()
        objective.value_reader[-1].bias.fill_(1.0)
        loss = objective(measured(tiny_batch, [20.0, -180.0, 0.0]))["values"]
    expected = abs(math.log(21) - 1) + abs(-math.log(181) - 1) + 1
    assert (float(loss.total), loss.count, loss.weight) == (pytest.approx(expected, rel=1e-5), "values", 2)
    assert objective(measured(tiny_batch, []))["values"].total == 0
