"""What [SEG] says is held to what it said of its name: distances by hand, and a loss that learning brings down."""

import pytest
import torch

from m3d.train.anchors import Anchors
from m3d.train.drawing import language_vectors
from m3d.train.objective import LossWeights, TalkAndDraw

ANCHOR_ALONE = LossWeights(text=0.0, dice=0.0, bce=0.0, prompted=0.0, anchor=1.0)


def test_the_distance_is_to_the_nearest_wording_by_how_prompts_differ():
    prompts = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 4.0], [4.0, 4.0]]])  # each number varies by 4
    anchors = Anchors({"liver": 0, "spleen": 1}, prompts)
    said = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]])
    assert anchors(said, ["liver", "spleen", "kidney"]).tolist() == pytest.approx([0.5 / 4, 2.5 / 4, 0.0])
    with pytest.raises(ValueError, match="3 prompts, but 1 names"):
        anchors(said, ["liver"])


def test_prompts_without_wordings_are_refused():
    with pytest.raises(ValueError, match="1 names need prompts"):
        Anchors({"liver": 0}, torch.zeros(1, 2))


def anchors_of(model, processor) -> Anchors:
    said = language_vectors(model.language_model, processor.tokenizer, ["liver", "spleen"])
    return Anchors(said.index, model.seg_projector(said.vectors).detach())


def test_a_language_model_that_has_drifted_comes_back(tiny_model, tiny_batch, processor):
    model = tiny_model.eval()
    anchors = anchors_of(model, processor)
    batch = tiny_batch | {"names": ["liver", "spleen", "liver"]}
    objective = TalkAndDraw(model, ANCHOR_ALONE, anchors).eval()
    assert objective.loss_names == ("text", "anchor")
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(model.language_model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = objective(batch)["anchor"]
        assert loss.count == "masks"
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < losses[0] / 2


def test_a_batch_without_seg_runs_the_same_modules(tiny_model, tiny_batch, processor):
    objective = TalkAndDraw(tiny_model, ANCHOR_ALONE, anchors_of(tiny_model, processor)).eval()
    seg = tiny_model.config.seg_token_id
    batch = tiny_batch | {"input_ids": tiny_batch["input_ids"].masked_fill(tiny_batch["input_ids"] == seg, 5)}
    loss = objective(batch | {"names": []})["anchor"]
    assert loss.total.item() == 0 and loss.total.requires_grad
    with pytest.raises(ValueError, match=r"0 \[SEG\] and 1 names"):
        objective(batch | {"names": ["liver"]})


def test_a_weight_needs_anchors_and_the_reverse(tiny_model, processor):
    with pytest.raises(ValueError, match=r"loss\.anchor=1\.0"):
        TalkAndDraw(tiny_model, ANCHOR_ALONE)
    with pytest.raises(ValueError, match=r"loss\.anchor=0"):
        TalkAndDraw(tiny_model, LossWeights(), anchors_of(tiny_model, processor))
