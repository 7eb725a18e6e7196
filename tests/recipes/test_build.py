"""A model from a language model's folder and sizes: what is loaded is loaded whole, what is new begins as it should."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import m3d
from data_prep.preprocess import Preprocess, Window
from m3d.models.perceiver import StackingPerceiver
from m3d.recipes import merge
from m3d.recipes.assemble import load_language_model, teach_tokens
from m3d.recipes.build import HeadSizes, Init, VisionSizes, build
from m3d.recipes.checkpoints import begin_manifest, config_hash, portable, write_manifest
from m3d.recipes.handover import kind_of, save_model
from m3d.recipes.instruct import published_parts
from m3d.recipes.outline import Outline
from m3d.recipes.parts import Parts, apply
from m3d.recipes.talk import ExchangesConfig, TalkConfig
from m3d.train.optim import OptimConfig
from tests.conftest import GRID, byte_tokenizer

PREPROCESS = Preprocess(grid=GRID, intensity=Window(0, 255))
VISION = VisionSizes(width=16, layers=2, heads=2, patch=(4, 8, 8), detail_channels=4)
HEAD = HeadSizes(own_encoder=False, decoder_heads=2, decoder_mlp=32, iou_hidden=16)


def language_folder(folder: Path, *, rows: int | None = None, tied: bool = False) -> Path:
    """A LLaMA that has never heard of us: 259 tokens in a table of ``rows``."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tower_and_head_can_be_taken_from_a_whole_model(tmp_path):
    """As another language model needs them; what that one read names with is of use only at the same width."""
    words = str(language_folder(tmp_path / "words"))
    torch.manual_seed(1)
    whole = build(Init(language_model=words, vision=VISION, head=HEAD, pool=1), PREPROCESS)
    (tmp_path / "whole").mkdir()
    save_model(tmp_path / "whole", whole.model, whole.processor)
    init = Init(language_model=words, segvol=str(tmp_path / "whole"), pool=1)
    taken = build(init, PREPROCESS)
    assert set(taken.notes) == {"vision_tower", "seg_head", "seg_projector"}
    before, now = whole.model.state_dict(), taken.model.state_dict()
    own = [name for name in before if name.startswith(("vision_tower.", "seg_head.", "seg_projector."))]
    assert own and all(torch.equal(before[name], now[name]) for name in own)
    outline = Outline(tmp_path, grid=GRID)
    assert outline.head(init, outline.vision(init)).to_dict() == taken.model.config.seg.to_dict()
    silent = build(Init(language_model=words, vision=VISION, pool=1), PREPROCESS)
    (tmp_path / "silent").mkdir()
    save_model(tmp_path / "silent", silent.model, silent.processor)
    with pytest.raises(ValueError, match="silent has no mask head"):
        build(Init(language_model=words, segvol=str(tmp_path / "silent"), pool=1), PREPROCESS)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [None, 320], ids=["exact", "padded"])
def test_new_tokens_begin_as_the_mean_of_the_known_ones(tmp_path, rows, tied):
    language_model, tokenizer = load_language_model(language_folder(tmp_path, rows=rows, tied=tied))
    before = language_model.get_input_embeddings().weight[:259].clone()
    head = language_model.get_output_embeddings().weight[:259].clone()
    ids = teach_tokens(language_model, tokenizer)
    assert list(ids.values()) == [259, 260, 261, 262]
    for table, known in (
        (language_model.get_input_embeddings(), before),
        (language_model.get_output_embeddings(), head),
    ):
        assert len(table.weight) == (rows or 263)
        assert torch.equal(table.weight[:259], known)
        torch.testing.assert_close(table.weight[259:263], known.mean(dim=0).expand(4, -1))
    kept = language_model.get_input_embeddings().weight.clone()
    assert teach_tokens(language_model, tokenizer) == ids  # a second time changes nothing
    assert torch.equal(language_model.get_input_embeddings().weight, kept)


def test_a_model_is_made_around_a_language_model(tmp_path):
    torch.manual_seed(0)
    built = build(Init(language_model=str(language_folder(tmp_path)), vision=VISION, head=HEAD, pool=1), PREPROCESS)
    known, _ = load_language_model(tmp_path)
    for name, value in known.state_dict().items():
        assert torch.equal(built.model.language_model.state_dict()[name][: len(value)], value), name
    state = built.model.state_dict()
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in state.values())
    blank = [name for name, value in state.items() if value.ndim > 1 and not value.any() and "cls_token" not in name]
    assert blank == []  # to_empty has left nothing undrawn
    assert 0.015 < state["vision_tower.patch_embedding.position_embeddings"].std() < 0.025
    assert state["seg_head.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].std() > 0.5
    assert built.processor.num_image_tokens == built.model.config.num_image_tokens == 12
    ids = built.processor.tokenizer(built.processor.write("Draw it. Liver [SEG]"), return_tensors="pt")["input_ids"]
    out = built.model(input_ids=ids, pixel_values=torch.rand(1, 1, *GRID), draw_masks=True)
    assert out.mask_logits.shape == (1, 1, *GRID)


def test_a_model_may_stack_patches_and_its_outline_knows(tmp_path):
    """Two patches along every side become one token as wide as eight; the dry run counts the same."""
    vision = replace(VISION, patch=(4, 8, 12))
    init = Init(language_model=str(language_folder(tmp_path)), vision=vision, head=HEAD, pool=2, pooling="stacked")
    torch.manual_seed(0)
    built = build(init, PREPROCESS)
    assert isinstance(built.model.perceiver, StackingPerceiver)
    assert built.model.perceiver.projector[0].in_features == 8 * 16
    assert built.processor.num_image_tokens == 1
    outlined = Outline(tmp_path, grid=GRID).whole(init)
    assert (outlined.pooling, outlined.num_image_tokens) == ("stacked", 1)
    assert outlined.vision.detail_channels == built.model.config.vision.detail_channels == 4


def test_a_frozen_language_model_may_be_in_half_precision_and_nothing_else_is(tmp_path):
    init = Init(language_model=str(language_folder(tmp_path)), vision=VISION, head=HEAD, pool=1, dtype="bfloat16")
    model = build(init, PREPROCESS).model
    apply(model, published_parts())
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    assert {kinds[name] for name, value in model.named_parameters() if value.requires_grad} == {torch.float32}
    assert kinds["language_model.lm_head.table.weight"] == torch.bfloat16


def test_large_models_leave_the_language_model_where_it_is(tmp_path):
    """Align and instruct keep their parts; the merged folder has everything, and says the same."""
    base = language_folder(tmp_path / "llm")
    first, second, merged = (tmp_path / name for name in ("align", "instruct", "merged"))
    generator = torch.Generator().manual_seed(0)
    init = Init(language_model=str(base), vision=VISION, head=HEAD, pool=1)
    for folder, begin, parts in (
        (first, init, Parts()),
        (second, Init(checkpoint=str(first), language_model=str(base)), published_parts()),
    ):
        built = build(begin, PREPROCESS)
        apply(built.model, parts)
        with torch.no_grad():
            for parameter in built.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        folder.mkdir()
        save_model(folder, built.model, built.processor, kind="parts", lora=parts.lora)
        write_manifest(folder, begin_manifest(stage_config(folder), parents={"language_model": str(base)}))
        assert kind_of(folder) == "parts"
    with pytest.raises(ValueError, match="left out llm; give the folder of llm as language_model"):
        merge.main(merge.Config(checkpoint=str(second), output=str(merged)))
    other = language_folder(tmp_path / "other", tied=True)
    with pytest.raises(ValueError, match=r"was trained around llm, and .* is another language model"):
        merge.main(merge.Config(checkpoint=str(second), language_model=str(other), output=str(merged)))
    merge.main(merge.Config(checkpoint=str(second), language_model=str(base), output=str(merged), dtype="float32"))
    found, trained = m3d.load(merged, device="cpu"), built.model.eval()
    ids = built.processor.tokenizer(built.processor.write("Draw it. Liver [SEG]"), return_tensors="pt")["input_ids"]
    pixels = torch.rand(1, 1, *GRID)
    with torch.no_grad():
        expected = trained(input_ids=ids, pixel_values=pixels, draw_masks=True)
        got = found.model(input_ids=ids, pixel_values=pixels, draw_masks=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.mask_logits, expected.mask_logits, atol=1e-3, rtol=1e-3)


def stage_config(folder: Path) -> TalkConfig:
    return TalkConfig(
        stage=folder.name, output=str(folder), data=ExchangesConfig(stores=("stores/x",)),
        init=Init(language_model="llm"), optim=OptimConfig(steps=1),
    )  # fmt: skip


def test_a_recipe_knows_no_machine_and_its_hash_no_place():
    one, other = stage_config(Path("one/align")), stage_config(Path("runs/two/align"))
    assert config_hash(one) == config_hash(other)
    assert portable({"init": {"language_model": "/models/Llama-2-7b"}, "engine": 1, "lr": 0.1}) == {
        "init": {"language_model": "Llama-2-7b"}, "lr": 0.1,
    }  # fmt: skip
    assert config_hash(one) != config_hash(stage_config(Path("one/instruct")))


def test_beginnings_that_contradict_themselves_are_refused(tmp_path):
    for wrong, match in (
        ({}, "needs a checkpoint of an earlier stage, or a language_model"),
        ({"checkpoint": "a", "vision": VISION}, "brings all parts; leave out init.vision"),
        ({"language_model": "a", "segvol": "b", "head": HEAD}, "both a mask head"),
        ({"language_model": "a", "vision_tower": "b", "vision": VISION}, "both a tower"),
    ):
        with pytest.raises(ValueError, match=match):
            Init(**wrong)
    with pytest.raises(FileNotFoundError, match="run the stage that makes it first"):
        build(Init(language_model=str(tmp_path)), PREPROCESS)
