"""Adapters that peft itself reads: equal words, and with what lies beside them the whole model again."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_prep.preprocess import Preprocess
from m3d.export.adapters import export_peft
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.lora import Lora
from m3d.recipes.assemble import around, load_language_model, teach_tokens
from m3d.recipes.handover import load_model, save_model
from m3d.recipes.parts import Parts, apply
from tests.conftest import byte_tokenizer

GRID = (8, 16, 24)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def trained(folder: Path, tokenizer, parts: Parts, *, tied: bool = False) -> tuple[Path, Path]:
    """A language model on disk, and the checkpoint of a model around it in which all that may learn has moved."""
    torch.manual_seed(1)
    base, output = folder / "base", folder / "model"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied, **SIZES)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    language_model, taught = load_language_model(base)
    ids = teach_tokens(language_model, taught)
    config = M3DConfig(
        vision_config=M3DVisionConfig(image_size=list(GRID), patch_size=[4, 8, 8], **SIZES),
        text_config=language_model.config,
        seg_config=M3DSegConfig(
            decoder_heads=2, decoder_mlp_dim=32, iou_hidden_size=16, num_masks=1, coordinates="grid",
            upscale_norm="channel",
        ),
        pool_size=1,
        tie_word_embeddings=tied,
        **ids,
    )  # fmt: skip
    model = around(config, language_model)
    apply(model, parts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    output.mkdir()
    processor = M3DProcessor(taught, Preprocess(grid=GRID), config.num_image_tokens)
    save_model(output, model.eval(), processor, kind="parts", lora=parts.lora)
    return base, output


@pytest.fixture
def plain_tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_the_adapter_and_the_parts_complete_it(plain_tokenizer, tmp_path: Path, tied: bool):
    parts = Parts(
        language_model="lora", vision_tower="lora", seg_projector="full", seg_head="full", lora=Lora(rank=2, alpha=6)
    )
    base, output = trained(tmp_path, plain_tokenizer, parts, tied=tied)
    done = export_peft(output, tmp_path / "peft")
    ours, processor = load_model(output, language_model=base)
    ours.eval()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    language_model = AutoModelForCausalLM.from_pretrained(base)
    language_model.resize_token_embeddings(len(tokenizer))
    theirs = PeftModel.from_pretrained(language_model, str(tmp_path / "peft")).eval()
    ids = tokenizer("<im_patch>a mask [SEG] <bx_start>1<bx_end>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said, expected = theirs(input_ids=ids).logits, ours.language_model(input_ids=ids).logits
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
    with theirs.disable_adapter(), torch.no_grad():
        assert not torch.allclose(theirs(input_ids=ids).logits, expected, atol=1e-3)

    whole = M3DForConditionalGeneration(M3DConfig.from_pretrained(tmp_path / "peft" / "m3d"))
    whole.language_model = theirs.merge_and_unload()
    beside = load_file(tmp_path / "peft" / "m3d" / "m3d_parts.safetensors")
    missing, unexpected = whole.load_state_dict(beside, strict=False)
    assert not unexpected and all(name.startswith("language_model.") for name in missing)
    prompt = processor.tokenizer(processor.write("Draw it. Liver [SEG]"), return_tensors="pt")["input_ids"]
    pixels = torch.rand(1, 1, *GRID)
    with torch.no_grad():
        one = whole.eval()(input_ids=prompt, pixel_values=pixels, draw_masks=True)
        other = ours(input_ids=prompt, pixel_values=pixels, draw_masks=True)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.mask_logits, other.mask_logits, atol=1e-4, rtol=1e-4)

    readme = (tmp_path / "peft" / "README.md").read_text()
    assert "m3d/m3d_parts.safetensors" in readme and "perceiver, seg_head, seg_projector, vision_tower" in readme
    assert all(note in readme for note in done.notes) and "resize_token_embeddings" in readme
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["task_type"]) == (2, 6, "CAUSAL_LM")
    assert len(described["trainable_token_indices"]) == (1 if tied else 2)


def test_a_whole_checkpoint_has_no_adapters(model, processor, tmp_path: Path):
    (tmp_path / "whole").mkdir()
    save_model(tmp_path / "whole", model, processor)
    with pytest.raises(ValueError, match="whole has no LoRA adapters: they were folded into its weights"):
        export_peft(tmp_path / "whole", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_lora_elsewhere_alone_is_no_adapter_of_a_language_model(plain_tokenizer, tmp_path: Path):
    _, output = trained(tmp_path, plain_tokenizer, Parts(vision_tower="lora"))
    with pytest.raises(ValueError, match="other parts than its language model"):
        export_peft(output, tmp_path / "peft")
