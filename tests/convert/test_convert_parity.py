"""Through files on disk and back: what converted checkpoints compute is what the released code computes, to 1e-4."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from data_prep.preprocess import Foreground, MinMax, Preprocess
from m3d.convert.run import convert
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.clip import load_pair, vision_tower_of
from m3d.models.modeling import build_vision_tower
from m3d.models.name_tower import NameTower
from m3d.models.perceiver import SpatialPoolingPerceiver, projection
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.models.weights import put, read_weights
from m3d.recipes.handover import load_model
from segvol_head import Prompts
from tests.fixtures import released
from tests.fixtures.released import SMALL

CLOSE = {"atol": 1e-4, "rtol": 0}


def load(folder) -> M3DForConditionalGeneration:
    return M3DForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_lamed_speaks_and_draws_as_released(tmp_path, suffix):
    _, _, inputs, outputs = released.read("lamed_a")
    done = convert(released.lamed(tmp_path / "theirs", suffix=suffix), tmp_path / "ours", SMALL, largest_shard=400_000)
    assert (len(done.report.used), len(done.report.dead), done.loaded) == (235, 10, True)
    assert len(list(done.folder.glob("model-*.safetensors"))) > 3

    model = load(done.folder)
    given = {"pixel_values": inputs["images"].float() / 255, "attention_mask": inputs["attention_mask"]}
    out = model(input_ids=inputs["input_ids"], labels=inputs["labels"], draw_masks=True, **given)
    torch.testing.assert_close(out.logits, outputs["logits"], **CLOSE)
    torch.testing.assert_close(out.loss, outputs["lm_loss"], **CLOSE)
    torch.testing.assert_close(out.mask_logits[outputs["seg_ids"]], outputs["seg_logits_sample"], **CLOSE)
    ids = inputs["input_ids"][:, :37]
    asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"], **asked
    )
    assert said[:, 37:].tolist() == outputs["generated"].tolist()


def test_lamed_brings_its_words_its_ids_and_its_preparation(tmp_path):
    done = convert(released.lamed(tmp_path / "theirs"), tmp_path / "ours", SMALL)
    processor, config = M3DProcessor.from_pretrained(done.folder), load(done.folder).config
    ids = [config.image_token_id, config.box_start_token_id, config.box_end_token_id, config.seg_token_id]
    assert ids == [596, 597, 598, 599]
    tokens = ["<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"]
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == ids
    assert processor.tokenizer.pad_token_id == 0  # the unknown token, as in the reference
    assert processor.tokenizer(processor.write("w9 [SEG]"))["input_ids"].count(596) == config.num_image_tokens == 24
    assert processor.preprocess == Preprocess(
        grid=(8, 48, 32), orientation="SPL", intensity=MinMax(), crop=Foreground()
    )
    ends = GenerationConfig.from_pretrained(done.folder)
    assert (ends.eos_token_id, ends.pad_token_id, bool(ends.do_sample)) == ([2, 7], 0, False)
    assert not list(done.folder.glob("*.py"))


def phi3(folder) -> Phi3ForCausalLM:
    """A small M3D-LaMed-Phi-3: lamed_a's other parts around a Phi-3 of transformers, whose weights it returns."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 600}
    own = Phi3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, rope_theta=4321.0, sliding_window=9,
        max_position_embeddings=128, original_max_position_embeddings=128, eos_token_id=7, pad_token_id=0,
    )  # fmt: skip
    language = Phi3ForCausalLM(own).eval()
    _, weights, *_ = released.read("lamed_a")
    others = {
        name: one
        for name, one in weights.items()
        if not name.startswith(("model.layers.", "model.embed_tokens", "model.norm", "lm_head"))
    }
    state = others | language.state_dict()
    released.lamed(folder, weights={name: one.contiguous() for name, one in state.items()})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {**sizes, "model_type": "lamed_phi3", "architectures": ["LamedPhi3ForCausalLM"], "eos_token_id": 7}
    fields |= {"rope_theta": 4321.0, "sliding_window": 9, "num_key_value_heads": 2, "max_position_embeddings": 128}
    fields |= {"original_max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(fields))
    return language


@torch.no_grad()
def test_phi3_is_built_from_its_fields(tmp_path):
    """Fused projections, rope, grouped queries and the sliding window are those of transformers' own Phi-3."""
    language = phi3(tmp_path / "theirs")
    model = load(convert(tmp_path / "theirs", tmp_path / "ours", SMALL).folder)
    ids = torch.randint(3, 590, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, language(input_ids=ids).logits, **CLOSE)
    assert model.generation_config.eos_token_id == [2, 7]

    _, _, inputs, _ = released.read("lamed_a")
    images, seen = inputs["images"].float() / 255, inputs["input_ids"][:, :37]
    features = model.get_image_features(images).pooler_output
    words = language.get_input_embeddings()(seen)
    spliced = torch.cat([words[:, :1], features, words[:, 25:]], dim=1)  # as prepare_inputs_for_multimodal does
    torch.testing.assert_close(
        model(input_ids=seen, pixel_values=images).logits, language(inputs_embeds=spliced).logits, **CLOSE
    )


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(tmp_path):
    """``model_with_lora.bin`` alone, and the folder of the released model whose config and words it shares."""
    _, weights, *_ = released.read("lamed_a")
    beside = released.lamed(tmp_path / "theirs")
    torch.save(released.with_lora(weights), tmp_path / "model_with_lora.bin")
    return tmp_path / "model_with_lora.bin", beside


def test_lora_is_folded_in(tmp_path, lora_file):
    file, beside = lora_file
    done = convert(file, tmp_path / "ours", replace(SMALL, beside=beside))
    state, raw = load_file(done.folder / "model.safetensors"), torch.load(file, weights_only=True)
    layer = "base_model.model.model.layers.1.self_attn.v_proj"
    base, down, up = (raw[f"{layer}.{half}"] for half in ("base_layer.weight", *LORA))
    merged = base.double() + 32 / 4 * up.double() @ down.double()
    ours = state["language_model.model.layers.1.self_attn.v_proj.weight"]
    torch.testing.assert_close(ours.double(), merged, atol=1e-6, rtol=1e-6)
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(state[f"language_model.{untouched}"], raw[f"base_model.model.{untouched}"])
    assert done.manifest["keys"]["folded_lora"] == 2 * 8
    assert "alpha 32" in done.notes[0]


LORA = ("lora_A.default.weight", "lora_B.default.weight")


@torch.no_grad()
def test_lora_that_is_kept_computes_the_same_and_goes_on_learning(tmp_path, lora_file):
    file, beside = lora_file
    options = replace(SMALL, beside=beside, lora_alpha=8)
    merged = load(convert(file, tmp_path / "merged", options).folder)
    kept = convert(file, tmp_path / "kept", replace(options, lora="keep")).folder
    assert not list(kept.glob("model*.safetensors"))
    model, _ = load_model(kept, language_model=kept / "language_model")
    adapters = [one for name, one in model.named_parameters() if ".lora_A." in name]
    assert len(adapters) == 8
    _, _, inputs, _ = released.read("lamed_a")
    given = {"input_ids": inputs["input_ids"], "pixel_values": inputs["images"].float() / 255}
    torch.testing.assert_close(model.eval()(**given).logits, merged(**given).logits, **CLOSE)


# -- M3D-CLIP, the bare ViT, the perceiver, SegVol --------------------------------------------------------------------


@torch.no_grad()
def test_clip_finds_as_released(tmp_path):
    _, _, inputs, outputs = released.read("clip_a")
    done = convert(released.clip(tmp_path / "theirs"), tmp_path / "ours", SMALL)
    pair = load_pair(done.folder)
    images, text = inputs["images"].float() / 255, (inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(pair.model.embed_volumes(images), outputs["image_cls"], **CLOSE)
    torch.testing.assert_close(pair.model.encode_texts(*text), outputs["text_feats"], **CLOSE)
    torch.testing.assert_close(pair.model(images, *text)["contrastive"], outputs["loss"], **CLOSE)
    assert pair.tokenizer("word3 word0")["input_ids"] == [2, 8, 5, 3]
    assert pair.tokenizer.model_max_length == 24
    assert vision_tower_of(done.folder)[0].hidden_size == 48
    kept = load_file(done.folder / "released" / "unused.safetensors")
    assert sorted(kept) == ["language_encoder.pooler.dense.bias", "language_encoder.pooler.dense.weight"]


@torch.no_grad()
def test_a_bare_vit_sees_as_released_even_cut_out_of_one_buffer(tmp_path):
    """pretrained_ViT.bin is as large as all of M3D-CLIP: views of the buffer that the optimizer kept."""
    config, weights, inputs, outputs = released.read("vision_a")
    prefix = "vision_tower.vision_tower."
    own = {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}
    flat = torch.cat([torch.zeros(50_000), *(one.flatten() for one in own.values())])
    ends = torch.tensor([50_000, *(one.numel() for one in own.values())]).cumsum(0).tolist()
    views = {
        name: flat[start : start + one.numel()].view(one.shape)
        for (name, one), start in zip(own.items(), ends, strict=False)
    }
    torch.save(views, tmp_path / "pretrained_ViT.bin")
    sizes = {"image_size": config["image_size"], "patch_size": config["patch_size"]}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    done = convert(tmp_path / "pretrained_ViT.bin", tmp_path / "ours", SMALL)
    assert (done.folder / "model.safetensors").stat().st_size < 4 * sum(one.numel() for one in own.values()) + 20_000
    found, state = vision_tower_of(done.folder)
    tower = build_vision_tower(found).eval()
    put(tower, state, "vision")
    torch.testing.assert_close(tower.patches(inputs["images"].float() / 255), outputs["features_patch"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "kind", "depth"), [("spp_mlp2_spatial", "mlp", 2), ("spp_linear1_spatial", "linear", 1)]
)
def test_a_perceiver_projects_as_released(tmp_path, variant, kind, depth):
    config, weights, _, outputs = released.read("vision_a")
    prefix = f"mm_projector[{variant}]."
    state = {
        name.replace(prefix, "model.mm_projector."): one for name, one in weights.items() if name.startswith(prefix)
    }
    table = torch.randn(50, config["llm_hidden"])
    torch.save(state | {"model.embed_tokens.weight": table}, tmp_path / "mm_projector.bin")
    done = convert(tmp_path / "mm_projector.bin", tmp_path / "ours", SMALL)
    said = json.loads((done.folder / "config.json").read_text())
    assert (said["projector"], said["projector_depth"], said["pooling"], said["pool_size"]) == (
        kind,
        depth,
        "spatial",
        2,
    )
    grid = tuple(a // b for a, b in zip(config["image_size"], config["patch_size"], strict=True))
    perceiver = SpatialPoolingPerceiver(grid, 2, projection(kind, depth, config["dim"], config["llm_hidden"]))
    put(perceiver, read_weights(done.folder, "perceiver."), "perceiver")
    torch.testing.assert_close(perceiver(outputs["features_patch"]), outputs[f"projected[{variant}]"], **CLOSE)
    assert torch.equal(read_weights(done.folder, "language_model.")["model.embed_tokens.weight"], table)


@torch.no_grad()
def test_segvol_reads_names_and_draws_as_released(tmp_path):
    _, _, inputs, outputs = released.read("segvol_a")
    done = convert(released.segvol(tmp_path / "theirs"), tmp_path / "ours", SMALL)
    tower = NameTower.read(done.folder)
    pooled = tower.pooled(inputs["text_input_ids"])
    torch.testing.assert_close(pooled, outputs["text_pooled"], **CLOSE)
    model = PromptedSegVol(M3DSegVolConfig.from_pretrained(done.folder))
    put(model, read_weights(done.folder), "segvol")
    model.eval()
    torch.testing.assert_close(model.seg_projector(pooled), outputs["text_embedding"], **CLOSE)
    features, index = model.look(inputs["images"].float() / 255), torch.arange(len(pooled))
    drawn = model.draw(features, index, names=pooled)
    torch.testing.assert_close(drawn, outputs["text/logits_sample"], **CLOSE)
    points = Prompts(points=inputs["points"], point_labels=inputs["point_labels"])
    drawn = model.draw(features, index, names=pooled, prompts=points)
    torch.testing.assert_close(drawn, outputs["point+text/logits_sample"], **CLOSE)
    drawn = model.draw(features, index, prompts=Prompts(boxes=inputs["boxes"]))
    torch.testing.assert_close(drawn, outputs["box/logits_sample"], **CLOSE)
    assert tower.vectors(["word3", "word4 word5"]).shape == (2, 32)


def test_segvol_v1_pth_holds_the_same(tmp_path):
    """The released training code writes {'model': module.*, 'epoch'} (REFERENCE A2)."""
    folder = released.segvol(tmp_path / "theirs")
    _, weights, *_ = released.read("segvol_a")
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 7}, folder / "SegVol_v1.pth")
    first = convert(folder, tmp_path / "bin", SMALL).folder
    second = convert(folder / "SegVol_v1.pth", tmp_path / "pth", SMALL).folder
    one, other = (load_file(at / "model.safetensors") for at in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_lower_precision_is_the_nearest_of_each_value(tmp_path):
    theirs = released.lamed(tmp_path / "theirs")
    exact = convert(theirs, tmp_path / "exact", SMALL).folder
    half = convert(theirs, tmp_path / "half", replace(SMALL, dtype=torch.bfloat16)).folder
    one, other = (load_file(at / "model.safetensors") for at in (exact, half))
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_whole_folder_is_as_good_as_its_one_file(tmp_path):
    """merged_model.bin beside config and words, as merge_lora_weights writes it."""
    _, weights, *_ = released.read("lamed_a")
    folder = released.lamed(tmp_path / "theirs")
    sharded = convert(folder, tmp_path / "sharded", SMALL).folder
    for shard in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        shard.unlink()
    save_file(weights, tmp_path / "all.safetensors")
    torch.save(weights, folder / "merged_model.bin")
    whole = convert(folder, tmp_path / "whole", SMALL).folder
    one, other = (load_file(at / "model.safetensors") for at in (sharded, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
