"""4 and 8 bits: the language model alone, whatever transformers is asked for; without bitsandbytes a clear word.

The tests that load need bitsandbytes (the extra ``quantize``), and skip without it.
"""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig

import m3d
from data_prep.preprocess import Preprocess
from data_prep.volume import Volume, spl_affine
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor
from m3d.models.quantize import quantization, refuse_odd_layers
from tests.conftest import GRID, small_config

PARTS = ("vision_tower", "perceiver", "seg_head", "seg_projector", "box_head")


def scan() -> Volume:
    return Volume(np.random.default_rng(0).random(GRID, np.float32), spl_affine((2.0, 1.0, 1.0)))


@pytest.fixture(scope="module")
def folder(tokenizer_and_ids, tmp_path_factory):
    """A checkpoint whose language model has layers of 64, which every kernel takes."""
    tokenizer, ids = tokenizer_and_ids
    small = small_config(tokenizer, ids)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = M3DConfig(
        vision_config=small.vision, text_config=text, seg_config=small.seg, pool_size=1, box_head=True, **ids
    )
    torch.manual_seed(0)
    model, where = M3DForConditionalGeneration(config), tmp_path_factory.mktemp("quantized")
    model.save_pretrained(where)
    M3DProcessor(tokenizer, Preprocess(grid=GRID), config.num_image_tokens).save_pretrained(where)
    return where


def test_without_bitsandbytes_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"quantize='4bit' needs 'bitsandbytes': pip install 'm3d-lamed\[qu"):
        m3d.load(folder, device="cpu", quantize="4bit")


def test_other_widths_are_refused(folder):
    with pytest.raises(ValueError, match="quantize='3bit' is not one of 4bit, 8bit"):
        m3d.load(folder, device="cpu", quantize="3bit")


def test_a_layer_that_the_cpu_cannot_pack_is_named_when_it_is_loaded():
    """bitsandbytes asserts in the first answer, on CPUs with avx512_bf16."""
    model = nn.ModuleDict({"even": nn.Linear(8, 64), "odd": nn.Linear(8, 48)})
    refuse_odd_layers(model)
    for layer in model.values():
        layer.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match="needs layers of a multiple of 32, and odd has 48; use '8bit', or a GPU"):
        refuse_odd_layers(model)


@pytest.mark.parametrize(("how", "kind", "alike"), [("8bit", "Linear8bitLt", 0.999), ("4bit", "Linear4bit", 0.97)])
def test_the_language_model_alone_is_quantised_and_says_nearly_the_same(folder, how, kind, alike):
    pytest.importorskip("bitsandbytes")
    whole, small = m3d.load(folder, device="cpu"), m3d.load(folder, device="cpu", quantize=how)
    linears = {name: layer for name, layer in small.model.named_modules() if isinstance(layer, nn.Linear)}
    quantised = {name for name, layer in linears.items() if type(layer).__name__ == kind}
    assert len(quantised) == 2 * 7 and all(name.startswith("language_model.model.layers.") for name in quantised)
    for name, layer in linears.items():
        if name not in quantised:
            assert layer.weight.dtype == torch.float32
    assert {name.split(".")[0] for name in linears} == {*PARTS, "language_model"}
    saved = whole.model.get_memory_footprint() - small.model.get_memory_footprint()
    assert saved == 2 * (4 * 64 * 64 + 3 * 64 * 128) * (4 - int(how[0]) / 8)  # weights by bytes each, from float32
    batch = whole.processor(scan(), "Draw. liver [SEG]")
    with torch.no_grad():
        a, b = (one.model(**batch, draw_masks=True) for one in (whole, small))
    assert torch.cosine_similarity(a.logits.flatten(), b.logits.flatten().float(), dim=0) > alike
    assert torch.cosine_similarity(a.mask_logits.flatten(), b.mask_logits.flatten(), dim=0) > 0.99
    assert torch.equal(a.volume_features.seg_tokens, b.volume_features.seg_tokens)  # the eyes are the same
    seen = small.look(scan())
    assert seen.ask("Where?", max_new_tokens=4).text is not None
    assert len(seen.segment(points=[((3, 8, 8), 1)]).masks) == 1


def test_transformers_own_way_spares_the_same_parts(folder):
    """Whoever forgets ``llm_int8_skip_modules`` still draws with a head that is whole."""
    pytest.importorskip("bitsandbytes")
    model = M3DForConditionalGeneration.from_pretrained(folder, quantization_config=quantization("8bit", torch.float32))
    theirs = M3DForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["o_proj"])
    )
    for one, kept in ((model, ()), (theirs, ("o_proj",))):
        plain = [name for name, layer in one.named_modules() if type(layer) is nn.Linear]
        assert {name.split(".")[0] for name in plain} >= set(PARTS)
        assert all(any(part in name for part in (*PARTS, "lm_head", *kept)) for name in plain)
