"""Any causal LM of transformers by its config: tied and scaled tables, fused layers, sliding windows, spare rows.

Each is tiny and random here; what is shown is that nothing in our model counts on LLaMA.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, LogitsProcessorList

from data_prep.preprocess import Preprocess
from data_prep.volume import Volume, spl_affine
from m3d.inference.measuring import speak
from m3d.inference.talking import encode
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.lora import Lora, inject_lora
from m3d.models.packed_mask import window_of
from m3d.models.token_rows import EmbeddingRows, learn_rows
from m3d.recipes.assemble import around, load_language_model, teach_tokens
from m3d.recipes.handover import save_model
from m3d.recipes.parts import token_rows
from m3d.train.collate import Collator
from m3d.train.objective import LossWeights, TalkAndDraw
from tests.conftest import byte_tokenizer
from tests.fixtures.small_llms import KINDS, SLIDING, WINDOW, text_config
from tests.train.test_packing import items, learn

pytestmark = pytest.mark.slow  # all architectures together; each test takes a second or two
GRID = (8, 16, 24)
SHORT, LONG = "Where?", "What is it that you see there?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each language model with its tokenizer, in a folder as it comes from its makers."""
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("llms")
    for kind in KINDS:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(text_config(kind, len(tokenizer))).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


def whole(folder) -> tuple[M3DForConditionalGeneration, M3DProcessor]:
    """The model around a language model, as our recipes build it."""
    language_model, tokenizer = load_language_model(folder)
    ids = teach_tokens(language_model, tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = M3DConfig(
        vision_config=M3DVisionConfig(image_size=list(GRID), patch_size=[4, 8, 8], detail_channels=4, **sizes),
        text_config=language_model.config,
        seg_config=M3DSegConfig(
            decoder_heads=2, decoder_mlp_dim=32, iou_hidden_size=16, num_masks=1, coordinates="grid", mask_prompt=True,
            upscale_norm="channel", projector_dropout=0.0,
        ),
        pool_size=1,
        **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = around(config, language_model).eval()
    return model, M3DProcessor(tokenizer, Preprocess(grid=GRID), config.num_image_tokens)


def scan(seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).random(GRID, np.float32), spl_affine((2.0, 1.0, 1.0)))


def taught(model: M3DForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor) -> list[float]:
    """Losses of the words while all learns, once with eyes and mask head, and then the language model by itself."""
    labels = ids.clone()
    labels[:, :-8] = -100  # "liver [SEG]" and the end
    model.train()
    out = model(input_ids=ids, pixel_values=pixels, labels=labels, draw_masks=True)
    (out.loss + out.mask_logits.square().mean()).backward()
    assert all(p.grad is not None for part in (model.vision_tower, model.language_model) for p in part.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    losses = [out.loss.item()]
    with torch.no_grad():
        seen = {"image": model.get_image_features(pixels)}
    while losses[-1] > 0.1 and len(losses) < 150:
        optimizer.zero_grad()
        loss = model(input_ids=ids, mm_encoder_outputs=seen, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_draw_is_saved_loaded_and_draws(kind, folders, tmp_path):
    model, own = whole(folders / kind)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(tables[0]) == model.config.text.vocab_size == len(tables[1])
    spare = len(tables[0]) - len(own.tokenizer)
    assert spare > 50 if kind == "qwen2" else spare == 0  # our four tokens take spare rows, and none is cut off
    assert (tables[0] is tables[1]) == (kind in ("qwen2", "gemma", "gemma2", "gemma3"))
    batch = own(scan(), "Draw. liver [SEG]")
    ids = torch.cat([batch["input_ids"], torch.tensor([[own.tokenizer.eos_token_id]])], dim=1)
    losses = taught(model, ids, batch["pixel_values"])
    assert losses[-1] <= 0.1 < losses[0]
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = AutoProcessor.from_pretrained(tmp_path)
    asked = same(scan(), "Draw.")
    assert torch.equal(asked["input_ids"], own(scan(), "Draw.")["input_ids"])
    said = again.eval().generate(**asked, max_new_tokens=10, do_sample=False)
    assert same.post_process_image_text_to_text(said) == ["Draw. liver [SEG]"]
    with torch.no_grad():
        drawn = again(input_ids=said, pixel_values=asked["pixel_values"], draw_masks=True)
        before = model(input_ids=said, pixel_values=asked["pixel_values"], draw_masks=True)
    assert drawn.mask_logits.shape == (1, 1, *GRID)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(drawn.logits, before.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn.mask_logits, before.mask_logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_layers_and_learned_rows_are_folded_into_what_they_meant(kind, folders, tmp_path):
    """Our four rows learn beside a table that may scale what it looks up, and may be the output's table as well."""
    model, own = whole(folders / kind)
    batch = own(scan(), "Draw. liver [SEG] <bx_start>")
    plain = model(**batch, draw_masks=True)
    learn_rows(model.language_model, token_rows(model))
    torch.testing.assert_close(model(**batch).logits, plain.logits, atol=1e-5, rtol=1e-5)  # beside the table, as in it
    inject_lora(model, ["language_model"], Lora(rank=2, alpha=4, dropout=0.0))
    table = model.get_input_embeddings()
    assert isinstance(table, EmbeddingRows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or parameter is table.learned:
                parameter.add_(0.1 * torch.randn_like(parameter))
        learned = model.eval()(**batch, draw_masks=True)
    assert (learned.logits - plain.logits).abs().max() > 1e-2
    save_model(tmp_path, model, own, lora=Lora(rank=2, alpha=4, dropout=0.0))
    folded = M3DForConditionalGeneration.from_pretrained(tmp_path).eval()(**batch, draw_masks=True)
    torch.testing.assert_close(folded.logits, learned.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.mask_logits, learned.mask_logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_answers_together_behind_a_kept_prefix_are_those_without_any_cache(kind, folders):
    """As a scan is asked: the volume is read once, questions of different lengths go in one batch."""
    model, own = whole(folders / kind)
    for part in (model.perceiver, model.language_model):  # far from all alike
        for parameter in part.parameters():
            parameter.mul_(1.5)
    _, past = encode(model, own, own.pixels(own.preprocess.apply(scan())))
    prompts = [own(scan(), text)["input_ids"][0] for text in (SHORT, LONG)]
    assert window_of(model.config.text) == (WINDOW if kind in SLIDING else None)
    settings = {"measured": None, "max_new_tokens": 8}
    together = speak(model, own.tokenizer, prompts, past=past, **settings)
    pixels = own(scan())["pixel_values"]
    for ids, answered in zip(prompts, together, strict=True):
        alone = model.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], pixel_values=pixels, use_cache=False,
            max_new_tokens=8, do_sample=False, pad_token_id=0, logits_processor=LogitsProcessorList(),
        )  # fmt: skip
        assert answered.tolist() == alone[0].tolist()
    assert past.get_seq_length() == 1 + own.num_image_tokens  # it was copied, not read on


PACKED = [(kind, how) for kind in SLIDING for how in ("sdpa", "eager") if (kind, how) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("kind", "attention"), [*PACKED, ("gemma", "sdpa")])  # Gemma 2 caps its scores: eager alone
def test_packed_rows_slide_as_each_exchange_would_alone(kind, attention, folders):
    apart, own = whole(folders / kind)
    apart.train().set_attn_implementation({"text_config": attention})
    assert apart.language_model.config._attn_implementation == attention
    together = copy.deepcopy(apart)
    talks = items(own)
    plain, packed = Collator(processor=own, packing=False)(talks), Collator(processor=own)(talks)
    assert plain["attention_mask"].ndim == 2 and packed["attention_mask"].ndim == 4
    expected, wanted = learn(apart, plain)
    losses, gradients = learn(together, packed)
    assert losses == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-4 * largest)
        assert error < 2e-5, (name, float(error))


def test_layers_that_take_no_mask_are_refused_in_packs(folders):
    model, own = whole(folders / "llama")
    model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    batch = Collator(processor=own)(items(own))
    with pytest.raises(ValueError, match="layers of linear_attention, which take no packed rows; turn packing off"):
        TalkAndDraw(model, LossWeights())(batch)
