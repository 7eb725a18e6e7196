"""torch.compile: eyes and language model are each one graph; the whole forward is several, and says the same.

Dynamo is what can fail on a model's code; it is tried with its own backend, for inductor compiles for minutes.
"""

import pytest
import torch

from tests.fixtures.small_scan import small_scan

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_eyes_and_language_model_are_whole_graphs(model, processor):
    batch = processor(small_scan(0), "Draw. Liver [SEG]")
    tower = torch.compile(model.vision_tower, backend="eager", fullgraph=True)
    assert torch.equal(tower(batch["pixel_values"]), model.vision_tower(batch["pixel_values"]))
    words = torch.compile(model.language_model, backend="eager", fullgraph=True)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    assert torch.equal(words(**given).logits, model.language_model(**given).logits)


@torch.no_grad()
def test_the_whole_forward_says_the_same(model, processor):
    """In several graphs: `splice` counts placeholders, to refuse a cut prompt, and Dynamo has to look at the number."""
    batch = processor(small_scan(0), "Draw. Liver [SEG]")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
