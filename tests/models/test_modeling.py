"""What users of transformers expect of a model, and what only ours does."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from data_prep.volume import Volume, spl_affine
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DVisionConfig
from m3d.models.lora import Lora, add_lora, language_linears
from m3d.models.seg_token import find_seg_tokens, mean_per_row, seg_states
from m3d.models.splice import places_before, splice
from segvol_head import Prompts
from tests.conftest import small_config

GRID = (8, 16, 24)


def scan(seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).random(GRID, np.float32), spl_affine((2.0, 1.0, 1.0)))


def looks(model: M3DForConditionalGeneration) -> list[tuple[str, int]]:
    """From now on: who looks, at how many volumes at a time."""
    seen: list[tuple[str, int]] = []
    for name, part in (("tower", model.vision_tower), ("detail", model.vision_tower.detail)):
        part.register_forward_hook(lambda _, given, __, name=name: seen.append((name, len(given[0]))))
    return seen


@pytest.fixture
def batch(processor):
    return processor([scan(0), scan(1)], ["Draw the liver. Liver [SEG]", "Draw it. Spleen [SEG] and liver [SEG]"])


def test_splice_puts_volumes_where_their_placeholders_stand():
    ids = torch.tensor([[1, 9, 9, 5, 9, 9], [1, 5, 9, 9, 5, 5]])
    volumes = torch.arange(12.0).view(3, 2, 2)
    out = splice(torch.zeros(2, 6, 2), ids, volumes, 9)
    assert torch.equal(out[0, 1:3], volumes[0])
    assert torch.equal(out[0, 4:6], volumes[1])
    assert torch.equal(out[1, 2:4], volumes[2])
    assert out[ids != 9].abs().sum() == 0
    assert places_before(ids, 9, 2).tolist() == [[0, 0, 1, 1, 1, 2], [2, 2, 2, 3, 3, 3]]


def test_a_cut_prompt_is_refused():
    with pytest.raises(ValueError, match=r"1 volumes need 3 <im_patch> tokens in all, the prompts have 2"):
        splice(torch.zeros(1, 4, 2), torch.tensor([[1, 9, 9, 5]]), torch.zeros(1, 3, 2), 9)


def test_the_state_before_seg_prompts_it_in_training_and_generation():
    ids = torch.tensor([[7, 3, 7, 7], [3, 3, 3, 3], [3, 7, 3, 3]])
    where = find_seg_tokens(ids, 7)
    assert where.rows.tolist() == [0, 0, 2]
    assert where.positions.tolist() == [2, 3, 1]  # a [SEG] at position 0 has nothing before it
    hidden = torch.arange(12.0).view(3, 4, 1)
    assert seg_states(hidden, where).flatten().tolist() == [1, 2, 8]
    assert mean_per_row(seg_states(hidden, where), where, 3).flatten().tolist() == [1.5, 0, 8]


def test_every_seg_gets_its_own_mask_on_the_grid(model, batch):
    out = model(**batch, draw_masks=True)
    assert out.mask_logits.shape == (3, 1, *GRID)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    one = model(
        input_ids=batch["input_ids"][1:],
        attention_mask=batch["attention_mask"][1:],
        pixel_values=batch["pixel_values"][1:],
        draw_masks=True,
    )
    torch.testing.assert_close(one.mask_logits, out.mask_logits[1:], atol=1e-4, rtol=0)


def test_rows_that_share_a_volume_encode_it_once(model, processor):
    batch = processor([scan(0), scan(0)], ["Liver [SEG]", "Spleen [SEG]"])
    apart = model(**batch, draw_masks=True)
    seen = looks(model)
    shared = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"][:1],
        volume_index=torch.tensor([0, 0]),
        draw_masks=True,
    )
    assert seen == [("detail", 1), ("tower", 1)]
    torch.testing.assert_close(shared.logits, apart.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared.mask_logits, apart.mask_logits, atol=1e-4, rtol=0)


def test_several_volumes_in_one_prompt(model, processor):
    batch = processor([scan(0), scan(1)], ["First <im_patch> then <im_patch> liver [SEG]"])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 2 * model.config.num_image_tokens
    both = model(**batch, draw_masks=True)
    alone = model.draw(
        both.volume_features,
        text=model.seg_prompts(
            model(**batch, output_hidden_states=True).hidden_states[-1],
            find_seg_tokens(batch["input_ids"], model.config.seg_token_id),
        ),
        volume_index=torch.tensor([1]),  # a [SEG] draws on the last volume shown before it
    )
    torch.testing.assert_close(both.mask_logits, alone, atol=1e-5, rtol=0)


def test_left_and_right_padding_say_the_same(model, processor):
    texts = ["A long question about the liver?", "Short?"]
    states = []
    for side in ("left", "right"):
        batch = processor([scan(0), scan(1)], texts, padding_side=side)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits[1]
        states.append(logits[batch["attention_mask"][1].bool()])
    torch.testing.assert_close(*states, atol=1e-4, rtol=0)


def test_save_and_load_round_trip_is_bit_equal(model, processor, batch, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, M3DForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = model(**batch, draw_masks=True), again.eval()(**batch, draw_masks=True)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.mask_logits, after.mask_logits)
    same = AutoProcessor.from_pretrained(tmp_path)
    assert same.preprocess == processor.preprocess
    assert torch.equal(same(scan(0), "Hi")["input_ids"], processor(scan(0), "Hi")["input_ids"])
    assert AutoConfig.from_pretrained(tmp_path).num_image_tokens == model.config.num_image_tokens


@torch.no_grad()
def test_generate_looks_once_and_a_kept_prefix_says_the_same(model, processor):
    batch = processor(scan(0), "What is it?")
    seen = looks(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(**batch, **settings)
    assert seen == [("detail", 1), ("tower", 1)]
    features = model.get_image_features(batch["pixel_values"])
    length = 1 + model.config.num_image_tokens
    prefix = model(
        input_ids=batch["input_ids"][:, :length], mm_encoder_outputs={"image": features}, use_cache=True
    ).past_key_values
    for _ in range(2):
        kept = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            past_key_values=copy.deepcopy(prefix),
            **settings,
        )
        assert kept.tolist() == whole.tolist()


def test_gradients_reach_every_part_and_checkpointing_changes_nothing(model, batch):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        out = model(**batch, labels=batch["input_ids"], draw_masks=True)
        (out.loss + out.mask_logits.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.seg_projector[3].p = 0.0
    plain, checkpointed = gradients(False), gradients(True)
    assert model.vision_tower.gradient_checkpointing
    silent = {name for name, _ in model.named_parameters()} - set(plain)
    unused = ("iou_prediction_head", "point_embeddings", "not_a_point_embed", "mask_embedding")
    assert all(any(part in name for part in unused) for name in silent), silent
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], atol=1e-6, rtol=1e-4)


def test_words_and_masks_rest_on_the_same_eyes(model, batch):
    """Both losses reach the detail network, each on its own."""
    weight = model.vision_tower.detail.network.convInit.conv.weight
    for loss in (lambda out: out.loss, lambda out: out.mask_logits.square().mean()):
        model.zero_grad()
        loss(model(**batch, labels=batch["input_ids"], draw_masks=True)).backward()
        assert weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_head_with_an_encoder_of_its_own_draws_with_that_ones_detail(tokenizer_and_ids, batch):
    shared = small_config(*tokenizer_and_ids)
    own = M3DVisionConfig(**{**shared.vision.to_dict(), "cls_token": False, "detail_channels": 3})
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(small_config(*tokenizer_and_ids, encoder_config=own)).eval()
    assert model.seg_head.detail_channels == 3 and model.vision_tower.detail.channels == 4
    features = model.get_image_features(batch["pixel_values"])
    assert torch.equal(features.seg_detail, model.seg_head.image_encoder.detail(batch["pixel_values"]))
    assert model(**batch, draw_masks=True).mask_logits.shape == (3, 1, *GRID)


@pytest.mark.parametrize("draws", [True, False])
def test_the_detail_network_begins_as_torch_would_have_it(tokenizer_and_ids, draws):
    """Kaiming-uniform: +-1 / sqrt(27 x 8) for its convolutions 8 wide, not 0.02; with a head or without one."""
    config = small_config(*tokenizer_and_ids)
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(config if draws else M3DConfig(**config.to_dict() | {"seg_config": None}))
    tower = model.vision_tower
    weight, bound = tower.detail.network.down_layers[0][1].conv1.conv.weight, (27 * 8) ** -0.5
    assert weight.shape == (8, 8, 3, 3, 3)
    assert 0.97 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    read = tower.detail_embedding.projection.weight  # 4 features, mixed into 8, in 8 halves
    assert read.shape == (16, 64) and 0.95 / 8 < read.abs().max() <= 1 / 8


def test_every_kind_of_prompt_changes_the_mask(model, processor):
    features = model.get_image_features(processor(scan(0))["pixel_values"])
    one = torch.zeros(1, dtype=torch.long)
    text = torch.randn(1, 16)
    base = model.draw(features, text=text, volume_index=one)
    more = {
        "points": Prompts(points=torch.tensor([[[1.0, 2.0, 3.0]]]), point_labels=torch.ones(1, 1)),
        "boxes": Prompts(boxes=torch.tensor([[0.0, 0, 0, 3, 9, 9]])),
        "mask": Prompts(mask=torch.randn(1, 1, *GRID)),
    }
    for prompts in more.values():
        drawn = model.draw(features, text=text, volume_index=one, prompts=prompts)
        assert (drawn - base).abs().max() > 1e-4


def test_lora_trains_the_language_model_alone(model, batch, tmp_path):
    names = language_linears(model)
    assert names and all(name.startswith("language_model.") and "lm_head" not in name for name in names)
    before = model(**batch, draw_masks=True)
    wrapped = add_lora(copy.deepcopy(model), Lora(rank=2, alpha=4, dropout=0.0), train_whole=False)
    learning = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    out = wrapped(**batch, draw_masks=True)
    torch.testing.assert_close(out.logits, before.logits, atol=1e-5, rtol=0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    changed = wrapped(**batch, draw_masks=True).logits
    assert (changed - before.logits).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**batch, draw_masks=True).logits, changed, atol=1e-4, rtol=0)


def test_lora_with_whole_parts_saves_and_loads(model, batch, tmp_path):
    from peft import PeftModel

    wrapped = add_lora(copy.deepcopy(model), Lora(rank=2, alpha=4, dropout=0.0))
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in learning) and any("seg_head" in name for name in learning)
    assert not any("language_model" in n and "lora_" not in n and "token_adapter" not in n for n in learning)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    wrapped.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    a, b = wrapped(**batch, draw_masks=True), again(**batch, draw_masks=True)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pooling": "cubic"}, "pooling='cubic' is not one of spatial, stacked, sequence"),
        ({"pool_size": 3}, "pool_size=3 must divide every side of the patch grid"),
        ({"pool_size": 3, "pooling": "stacked"}, "pool_size=3 must divide every side of the patch grid"),
    ],
)
def test_config_refuses_nonsense(wrong, said):
    with pytest.raises(ValueError, match=said):
        M3DConfig(vision_config=M3DVisionConfig(), **wrong)


def test_published_configuration_is_the_default():
    config = M3DConfig()
    assert config.num_image_tokens == 256
    assert config.vision_config.grid == (8, 16, 16)
    assert config.seg_config is None


def test_a_model_without_a_head_says_so(tokenizer_and_ids, processor):
    config = M3DConfig(
        vision_config=M3DVisionConfig(
            image_size=list(GRID), patch_size=[4, 8, 8], hidden_size=16, num_attention_heads=2
        ),
        text_config={
            "model_type": "llama",
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "vocab_size": 300,
            "num_key_value_heads": 2,
        },
        pool_size=1,
        **tokenizer_and_ids[1],
    )
    model = M3DForConditionalGeneration(config).eval()
    assert model.seg_head is None
    with pytest.raises(ValueError, match="no mask head"):
        model(**processor(scan(0), "Liver [SEG]"), draw_masks=True)
