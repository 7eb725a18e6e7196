"""What transformers' own common tests ask of every model (its `ModelTesterMixin`, which no wheel carries), of ours.

Saving, types, devices and outputs; generation is in test_common_generation.py.
"""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from m3d.inference.checkpoints import resolve
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.splice import splice
from segvol_head import Prompts
from tests.fixtures.small_scan import GRID, small_scan

LAYERS, HEADS, WIDTH = 2, 2, 16
TEXTS = ["Draw the liver. Liver [SEG]", "Draw it. Spleen [SEG] and liver [SEG]"]


@pytest.fixture
def batch(processor):
    return processor([small_scan(0), small_scan(1)], TEXTS)


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def said(out, batch):
    """Logits of real tokens: what stands at padding means nothing."""
    return out.logits[batch["attention_mask"].bool()]


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_the_signature_begins_with_the_main_input(model):
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"
    assert model.base_model is model and model.can_generate()
    assert set(model.input_modalities) == {"image", "text"}


@torch.no_grad()
def test_a_tuple_holds_what_the_dict_holds(model, batch):
    whole = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    parts = model(**batch, labels=batch["input_ids"], output_hidden_states=True, return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == len(whole.to_tuple())
    assert torch.equal(parts[0], whole.loss) and torch.equal(parts[1], whole.logits)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


@torch.no_grad()
def test_hidden_states_and_attentions_are_there_when_asked(model, batch):
    rows, length = batch["input_ids"].shape
    assert model(**batch).hidden_states is None
    states = model(**batch, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(rows, length, WIDTH)] * (LAYERS + 1)
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == LAYERS + 1
    assert model(**batch, output_hidden_states=False).hidden_states is None
    model.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True).attentions
    assert [one.shape for one in attentions] == [(rows, HEADS, length, length)] * LAYERS
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(rows, HEADS, length))


@torch.no_grad()
def test_embeddings_say_what_their_ids_say(model, batch):
    features = model.get_image_features(batch["pixel_values"], return_dict=True)
    assert features.last_hidden_state.shape == (2, 1 + 12, WIDTH) and features.pooler_output.shape == (2, 12, WIDTH)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds = splice(embeds, batch["input_ids"], features.pooler_output, model.config.image_token_id)
    out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(out.logits, model(**batch).logits)
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, out.logits[:, -2:])


@torch.no_grad()
def test_sdpa_is_eager(folder, batch):
    found = {}
    for kind in ("sdpa", "eager"):
        model = M3DForConditionalGeneration.from_pretrained(folder, attn_implementation=kind).eval()
        assert model.config._attn_implementation == model.language_model.config._attn_implementation == kind
        found[kind] = model(**batch, draw_masks=True)
    torch.testing.assert_close(said(found["sdpa"], batch), said(found["eager"], batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["sdpa"].mask_logits, found["eager"].mask_logits, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_batch_is_its_rows(model, processor, batch):
    together = model(**batch, draw_masks=True)
    masks = iter(together.mask_logits)
    for row, text in enumerate(TEXTS):
        one = processor(small_scan(row), text)  # without padding
        alone = model(**one, draw_masks=True)
        length = one["input_ids"].shape[1]
        torch.testing.assert_close(together.logits[row, -length:], alone.logits[0], atol=1e-5, rtol=1e-5)
        for mask in alone.mask_logits:
            torch.testing.assert_close(next(masks), mask, atol=1e-4, rtol=1e-5)
    assert next(masks, None) is None


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(model, batch, reentrant):
    def gradients(one):
        one.train()
        one.seg_projector[3].p = 0.0
        out = one(**batch, labels=batch["input_ids"], draw_masks=True)
        (out.loss + out.mask_logits.square().mean()).backward()
        return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert other.vision_tower.gradient_checkpointing and other.language_model.model.gradient_checkpointing
    wanted, found = gradients(model), gradients(other)
    assert wanted.keys() == found.keys() and len(wanted) > 80
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_config_goes_to_json_and_back(model, tmp_path):
    config = model.config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, M3DConfig)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert isinstance(again.vision_config, M3DVisionConfig) and isinstance(again.seg_config, M3DSegConfig)
    assert again.text_config.model_type == "llama" and again.get_text_config() is again.text_config
    assert M3DConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_every_auto_class_finds_it(folder):
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(folder)) is M3DForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is M3DProcessor
    assert (
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("[SEG]")
        == AutoConfig.from_pretrained(folder).seg_token_id
    )


@torch.no_grad()
def test_shards_hold_the_same_weights(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and (tmp_path / "model.safetensors.index.json").exists()
    again = M3DForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_what_a_checkpoint_lacks_is_drawn_anew_and_named(folder):
    kept = {
        name: one for name, one in load_file(folder / "model.safetensors").items() if name.endswith("lm_head.weight")
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = M3DForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    names = set(model.state_dict())
    assert set(info["missing_keys"]) == names - set(kept)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
        if tensor.ndim > 1 and not name.endswith("cls_token"):
            assert tensor.std() > 1e-3, name  # memory that nobody wrote would be zero, or anything


@torch.no_grad()
@pytest.mark.parametrize("rows", [10, 64])
def test_a_vocabulary_grows_and_keeps_what_it_said(model, batch, tmp_path, rows):
    before, size = model(**batch).logits, model.config.text.vocab_size
    model.resize_token_embeddings(size + rows)
    assert model.config.text.vocab_size == model.language_model.config.vocab_size == size + rows
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == size + rows
    after = model(**batch, draw_masks=True)
    torch.testing.assert_close(after.logits[..., :size], before)
    model.save_pretrained(tmp_path)
    again = M3DForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, after.logits)
    model.resize_token_embeddings(size)
    torch.testing.assert_close(model(**batch).logits, before)


# -- types and devices ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_says_nearly_the_same(model, batch, dtype, near):
    whole = model(**batch, draw_masks=True)
    half = copy.deepcopy(model).to(dtype)
    out = half(**batch, draw_masks=True)
    assert out.logits.dtype == dtype and out.mask_logits.isfinite().all()
    scale = said(whole, batch).abs().max()
    assert (said(out, batch).float() - said(whole, batch)).abs().max() < near * scale
    assert (out.mask_logits.float() - whole.mask_logits).abs().max() < near * whole.mask_logits.abs().max()
    click = Prompts(points=torch.tensor([[[1.0, 2.0, 3.0]]]), point_labels=torch.ones(1, 1))
    drawn = half.draw(out.volume_features, volume_index=torch.tensor([0]), prompts=click)
    assert drawn.shape == (1, 1, *GRID) and drawn.isfinite().all()


@torch.no_grad()
def test_a_checkpoint_keeps_its_type_unless_another_is_asked_for(model, batch, tmp_path):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    types = {one: {p.dtype for p in load(tmp_path, one).parameters()} for one in ("auto", torch.float32)}
    assert types == {"auto": {torch.bfloat16}, torch.float32: {torch.float32}}
    half = load(tmp_path, torch.float16)  # eyes and mask head stay in float32, as `_keep_in_fp32_modules` says
    assert {p.dtype for p in half.language_model.parameters()} == {torch.float16}
    assert {p.dtype for p in half.seg_head.parameters()} == {torch.float32}
    assert half(**batch, draw_masks=True).mask_logits.isfinite().all()


def load(folder, dtype) -> M3DForConditionalGeneration:
    return M3DForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_puts_it_there(model, folder, batch, where):
    again = M3DForConditionalGeneration.from_pretrained(folder, device_map=where, max_memory={"cpu": "1GB"}).eval()
    torch.testing.assert_close(again(**batch, draw_masks=True).mask_logits, model(**batch, draw_masks=True).mask_logits)


def test_on_meta_it_has_shapes_and_no_weights(model, folder):
    hollow = M3DForConditionalGeneration.from_pretrained(folder, device_map="meta")
    assert all(p.is_meta for p in hollow.parameters())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in hollow.named_parameters()} == shapes
    with torch.device("meta"):
        assert all(p.is_meta for p in M3DForConditionalGeneration(model.config).parameters())


@torch.no_grad()
def test_from_disk_it_talks_and_says_that_it_cannot_draw(model, folder, batch, tmp_path):
    away = M3DForConditionalGeneration.from_pretrained(
        folder, device_map={"": "disk"}, offload_folder=tmp_path / "away"
    ).eval()
    torch.testing.assert_close(away(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"the mask head was offloaded.*a device_map with seg_head on a device"):
        away(**batch, draw_masks=True)
    parts = {name: "cpu" for name, _ in model.named_children()} | {"language_model": "disk"}
    some = M3DForConditionalGeneration.from_pretrained(
        folder, device_map=parts, offload_folder=tmp_path / "some"
    ).eval()
    expected = model(**batch, draw_masks=True).mask_logits
    torch.testing.assert_close(some(**batch, draw_masks=True).mask_logits, expected, atol=1e-5, rtol=1e-5)


# -- the bundled model ------------------------------------------------------------------------------------------------


def test_the_bundled_folder_is_read_by_transformers_alone():
    where = resolve("m3d-tiny")
    config, processor = AutoConfig.from_pretrained(where), AutoProcessor.from_pretrained(where)
    model, info = AutoModelForImageTextToText.from_pretrained(where, output_loading_info=True)
    assert type(model) is M3DForConditionalGeneration and not any(info[name] for name in info if name != "error_msgs")
    assert processor.num_image_tokens == config.num_image_tokens == model.config.num_image_tokens
    ids = [getattr(config, f"{name}_token_id") for name in ("image", "box_start", "box_end", "seg")]
    names = ["<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"]
    assert processor.tokenizer.convert_tokens_to_ids(names) == ids
