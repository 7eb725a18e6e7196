"""Losses by name, simulated prompts, and a loop that stops and resumes to the same weights."""

import pytest
import torch

from m3d.train.objective import LossWeights, TalkAndDraw, correct, pick, simulate_prompts
from segvol_head import Prompts

GRID = (8, 16, 24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks() -> torch.Tensor:
    truth = torch.zeros(2, 1, *GRID, dtype=torch.bool)
    truth[0, 0, 2:5, 3:9, 4:10] = True
    truth[1, 0, 1:2, 0:1, 20:24] = True
    return truth


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


@pytest.mark.parametrize("name", ["text", "dice", "bce", "prompted"])
def test_weights_scale_their_losses(name, tiny_batch, tiny_model):
    one = TalkAndDraw(tiny_model, LossWeights(prompted=1.0)).eval()(tiny_batch, generator())
    half = TalkAndDraw(tiny_model, LossWeights(**({"prompted": 1.0} | {name: 0.5}))).eval()(tiny_batch, generator())
    assert set(one) == {"text", "dice", "bce", "prompted"}
    assert half[name].item() == pytest.approx(0.5 * one[name].item(), rel=1e-5)


def test_a_batch_without_masks_keeps_the_head_in_the_graph(tiny_batch, tiny_model):
    from dataclasses import replace

    ids = tiny_batch.input_ids.masked_fill(tiny_batch.input_ids == tiny_model.config.seg_token_id, 5)
    batch = replace(tiny_batch, input_ids=ids, masks=tiny_batch.masks[:0], mask_volume=tiny_batch.mask_volume[:0])
    losses = TalkAndDraw(tiny_model, LossWeights())(batch, generator())
    assert losses["dice"].item() == 0


@pytest.mark.integration
def test_training_learns_and_resumes_bit_for_bit(tmp_path, tiny_batch, tiny_model):
    import copy

    from m3d.train.loop import OptimConfig, fit

    class Same:
        def draw(self, step: int):
            return tiny_batch

    def run(folder, model, steps):
        folder.mkdir(exist_ok=True)
        config = OptimConfig(steps=steps, lr=3e-3, warmup=2, save_every=6)
        objective = TalkAndDraw(model, LossWeights())
        fit(objective, Same(), config, folder, device=torch.device("cpu"), on_save=lambda step: None)
        return [line for line in (folder / "losses.jsonl").read_text().splitlines()]

    straight = copy.deepcopy(tiny_model)
    rows = run(tmp_path / "straight", straight, 12)
    import json

    losses = [sum(v for k, v in json.loads(r).items() if k in ("text", "dice", "bce")) for r in rows]
    assert losses[-1] < 0.9 * losses[0]

    stopped = copy.deepcopy(tiny_model)
    folder = tmp_path / "stopped"
    folder.mkdir()
    config = OptimConfig(steps=12, lr=3e-3, warmup=2, save_every=6)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(TalkAndDraw(stopped, LossWeights()), Same(), config, folder, device=torch.device("cpu"), on_save=stop)
    fresh = copy.deepcopy(tiny_model)
    fit(
        TalkAndDraw(fresh, LossWeights()), Same(), config, folder, device=torch.device("cpu"), on_save=lambda step: None
    )
    for a, b in zip(straight.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_names_the_batch(tmp_path, tiny_batch, tiny_model):
    from m3d.train.loop import OptimConfig, fit

    class Same:
        def draw(self, step: int):
            return tiny_batch

    with torch.no_grad():
        tiny_model.perceiver.projector[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0; the batch: case/00"):
        fit(
            TalkAndDraw(tiny_model, LossWeights()),
            Same(),
            OptimConfig(steps=1),
            tmp_path,
            device=torch.device("cpu"),
            on_save=lambda step: None,
        )
