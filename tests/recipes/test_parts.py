"""What learns is what was asked for, by name; what is frozen stays as it was to the bit."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m3d.models.lora import Lora, lora_layers
from m3d.models.token_rows import EmbeddingRows, learn_rows
from m3d.recipes.handover import load_model, read_lora, save_model
from m3d.recipes.parts import Parts, apply, counts, token_rows

ROWS = {"language_model.model.embed_tokens.learned", "language_model.lm_head.learned"}
NEVER = ("seg_head.mask_decoder.iou_prediction_head.", "seg_head.mask_decoder.output_hypernetworks_mlps.1.")


def names_of(model, *parts: str) -> set[str]:
    """All parameters of parts, but those of the quality head, which no loss reaches."""
    return {name for name, _ in model.named_parameters() if name.split(".")[0] in parts and not name.startswith(NEVER)}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, processor, steps: int = 1) -> None:
    """Learn a little from two texts about a volume and a mask; weight decay would move what must not move."""
    words = [processor.write("Draw it. Liver [SEG]"), processor.write("Where? <bx_start>1<bx_end>")]
    batch: Any = processor.tokenizer(words, return_tensors="pt", padding=True, padding_side="right")
    pixels = torch.rand(1, 1, 8, 16, 24, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        out = model(
            **batch, pixel_values=pixels, volume_index=torch.tensor([0, 0]), labels=batch["input_ids"], draw_masks=True
        )
        (out.loss + out.mask_logits.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_alignment_is_perceiver_and_rows_of_new_tokens(model):
    apply(model, Parts())
    assert trainable(model) == names_of(model, "perceiver") | ROWS
    found = counts(model)
    assert found["new_tokens"].learned == 2 * 4 * 16  # two tables, four tokens, width 16
    assert [name for name, one in found.items() if one.learned] == ["perceiver", "new_tokens"]


def test_instruction_is_everything_but_the_language_models_own_weights(model):
    apply(model, Parts(vision_tower="full", language_model="lora", seg_projector="full", seg_head="full"))
    expected = names_of(model, "vision_tower", "perceiver", "seg_projector", "seg_head") | ROWS
    own = {name for name in trainable(model) if name.startswith("language_model.") and name not in ROWS}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(own) == 2 * 7 * 2  # two layers, seven linear layers in each, A and B
    assert all(any(f".{layer}.lora_{side}.default.weight" in name for layer in linear for side in "AB") for name in own)
    assert trainable(model) - own == expected


def test_full_language_model_takes_its_rows_along(model):
    apply(model, Parts(language_model="full", perceiver="frozen"))
    assert not isinstance(model.language_model.get_input_embeddings(), EmbeddingRows)
    assert trainable(model) == names_of(model, "language_model")


def test_lora_goes_to_any_part(model):
    apply(model, Parts(vision_tower="lora", perceiver="frozen", new_tokens="frozen", lora=Lora(rank=2, alpha=2)))
    layers = {"patch_embedding.projection", "detail_embedding.projection"} | {
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attn.qkv", "attn.out_proj", "mlp.linear1", "mlp.linear2")
    }
    assert trainable(model) == {f"vision_tower.{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}


@pytest.mark.parametrize(
    "parts",
    [Parts(), Parts(perceiver="frozen", language_model="lora"), Parts(vision_tower="lora", seg_head="full")],
    ids=["align", "lora", "mixed"],
)
def test_what_is_frozen_stays_to_the_bit_and_what_learns_moves(model, processor, parts):
    torch.manual_seed(0)
    apply(model, parts)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learns = trainable(model)
    step(model.train(), processor)
    for name, value in model.named_parameters():
        same = torch.equal(value, before[name])
        assert same or name in learns, name
    moved = {name for name in learns if not torch.equal(dict(model.named_parameters())[name], before[name])}
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in learns}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_learned_rows_begin_as_the_rows_they_stand_for(model, tied):
    language = model.language_model
    if tied:
        language.config.tie_word_embeddings = True
        language.set_output_embeddings(torch.nn.Linear(16, len(language.get_input_embeddings().weight), bias=False))
        language.lm_head.weight = language.model.embed_tokens.weight
    ids = torch.tensor([[1, 40, *token_rows(model), 50]])
    before = language(input_ids=ids).logits
    learn_rows(language, token_rows(model))
    torch.testing.assert_close(language(input_ids=ids).logits, before)
    rows = language.get_input_embeddings().learned
    assert (language.lm_head.learned is rows) == tied
    with torch.no_grad():
        rows[3] += 1.0
    changed = language(input_ids=ids).logits
    assert torch.allclose(changed[0, :5], before[0, :5], atol=1e-5) != tied  # a tied row is in every logit
    assert not torch.allclose(changed[0, 5], before[0, 5], atol=1e-3)  # the sixth is [SEG]


def test_parts_that_cannot_be_are_refused(model):
    with pytest.raises(ValueError, match="four rows have no low rank"):
        Parts(new_tokens="lora")
    with pytest.raises(ValueError, match="trains all rows"):
        Parts(language_model="full", new_tokens="frozen")
    with pytest.raises(ValueError, match="perceiver='thawed' is none of frozen, lora, full"):
        Parts(perceiver="thawed")
    model.seg_head = None
    with pytest.raises(ValueError, match=r"parts\.seg_head=full, but this model has none"):
        apply(model, Parts(seg_head="full"))
    apply(model, Parts(language_model="lora"))
    for other in (Parts(language_model="lora", lora=Lora(rank=3)), Parts(language_model="lora", perceiver="lora")):
        with pytest.raises(ValueError, match="LoRA layers of another rank or alpha, or on other layers, already"):
            apply(model, other)


@pytest.mark.parametrize("parts", [Parts(language_model="lora"), Parts(language_model="lora", perceiver="lora")])
def test_low_rank_layers_of_an_earlier_stage_go_on_learning(model, parts):
    first = apply(model, parts)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.fill_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = dataclasses.replace(parts, lora=Lora(dropout=0.5))
    assert apply(model, again) == first
    assert {name for name in model.state_dict()} == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.lora_dropout["default"].p == 0.5 for layer in lora_layers(model))


def test_a_folded_model_says_the_same_as_the_one_with_lora(model, processor, tmp_path):
    """The same logits and masks from plain tensors; and peft's own folding gives the same weights."""
    torch.manual_seed(0)
    parts = Parts(language_model="lora", vision_tower="lora", seg_head="full", lora=Lora(rank=2, alpha=8, dropout=0.0))
    apply(model, parts)
    step(model.train(), processor)
    model.eval()
    save_model(tmp_path, model, processor, lora=parts.lora)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not any("lora_" in name or "learned" in name or "base_layer" in name for name in names)
    folded, _ = load_model(tmp_path)
    ids = processor.tokenizer(processor.write("Draw it. Liver [SEG]"), return_tensors="pt")["input_ids"]
    pixels = torch.rand(1, 1, 8, 16, 24)
    with torch.no_grad():
        one = model(input_ids=ids, pixel_values=pixels, draw_masks=True)
        other = folded.eval()(input_ids=ids, pixel_values=pixels, draw_masks=True)
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.mask_logits, one.mask_logits, atol=1e-4, rtol=1e-4)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    found = folded.language_model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(found, expected)


def test_parts_apart_from_the_language_model_come_back(model, processor, tmp_path):
    """The language model stays in its own folder; LoRA, learned rows and all other parts come back to the bit."""
    base, kept = tmp_path / "llm", tmp_path / "kept"
    model.language_model.save_pretrained(base)
    processor.tokenizer.save_pretrained(base)
    parts = Parts(language_model="lora", vision_tower="full", lora=Lora(rank=2, alpha=8, dropout=0.1))
    apply(model, parts)
    step(model.train(), processor)
    kept.mkdir()
    save_model(kept, model, processor, kind="parts", lora=parts.lora)
    stored = set(load_file(kept / "parts.safetensors"))
    assert {name for name in stored if name.startswith("language_model.")} == ROWS
    assert all(
        name.startswith("base_model.model.language_model.") for name in load_file(kept / "adapter_model.safetensors")
    )
    assert read_lora(kept)[0] == parts.lora
    with pytest.raises(ValueError, match="left out its language model"):
        load_model(kept)
    again, _ = load_model(kept, language_model=base)
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_shard_is_never_saved(model, processor, tmp_path):
    """What ZeRO-3 leaves on a process by itself: tensors of size 0 (the reference's merge wrote them)."""
    model = copy.deepcopy(model)
    model.perceiver.projector[0].weight.data = torch.empty(0)
    for kind in ("whole", "parts"):
        with pytest.raises(ValueError, match="a shard of a model"):
            save_model(tmp_path, model, processor, kind=kind)
    assert not list(tmp_path.glob("*.safetensors"))
