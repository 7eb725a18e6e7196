"""What conversion writes is taken by what it is for: `m3d.load`, the recipes' ``init``, the bench, the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import m3d
from data_prep.preprocess import Preprocess
from data_prep.volume import Volume
from m3d.bench.embeddings import ClipEmbedder
from m3d.cli.main import main
from m3d.convert.run import convert
from m3d.export.reference import export_clip, export_lamed, export_segvol
from m3d.models.weights import read_weights
from m3d.recipes.build import Init, build
from tests.conftest import byte_tokenizer
from tests.fixtures import released
from tests.fixtures.released import SMALL

HEADS = ["--vision-heads", "4", "--text-heads", "4"]


@pytest.fixture
def scan() -> Volume:
    """A scan of another shape, spacing and orientation than any grid."""
    array = np.random.default_rng(0).normal(0, 300, (21, 30, 11)).astype(np.float32)
    return Volume(array, np.diag([1.0, 1.5, 3.0, 1.0]))


def test_a_converted_lamed_answers_about_a_scan(tmp_path, scan):
    folder = convert(released.lamed(tmp_path / "theirs"), tmp_path / "ours", SMALL).folder
    model = m3d.load(folder, device="cpu")
    seen = model.look(scan)
    assert isinstance(seen.ask("w9 w10 w11", max_new_tokens=4).text, str)
    drawn = seen.segment(points=[((10, 15, 5), 1)])
    assert drawn.masks[0].array.shape == scan.shape


def test_a_converted_segvol_draws_by_name_and_by_point(tmp_path, scan):
    folder = convert(released.segvol(tmp_path / "theirs"), tmp_path / "ours", SMALL).folder
    seen = m3d.load(folder, device="cpu").look(scan)
    one, other = (seen.segment(name).masks[0] for name in ("word3", "word9"))
    assert one.array.shape == scan.shape
    assert one.score != other.score
    assert seen.segment(points=[((10, 15, 5), 1)]).masks[0].array.shape == scan.shape
    with pytest.raises(ValueError, match="no language model"):
        seen.ask("Is there a liver?")


def test_recipes_begin_from_converted_parts(tmp_path):
    """The bare ViT, the released stage 1's perceiver and SegVol's head around a language model of any kind."""
    _, vision, *_ = released.read("vision_a")
    config = json.dumps({"image_size": [8, 48, 32], "patch_size": [2, 8, 4]})
    (tmp_path / "config.json").write_text(config)
    prefix = "vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): one for name, one in vision.items() if name.startswith(prefix)}
    torch.save(tower, tmp_path / "pretrained_ViT.bin")
    prefix = "mm_projector[spp_mlp2_spatial]."
    stage_1 = {name.replace(prefix, "model.mm_projector."): one for name, one in vision.items() if prefix in name}
    tokenizer = byte_tokenizer()
    stage_1["model.embed_tokens.weight"] = torch.randn(len(tokenizer) + 4, 40)
    torch.save(stage_1, tmp_path / "mm_projector.bin")
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(language).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")

    parts = {
        "vision_tower": convert(tmp_path / "pretrained_ViT.bin", tmp_path / "vit", SMALL),
        "perceiver": convert(tmp_path / "mm_projector.bin", tmp_path / "perceiver", SMALL),
        "segvol": convert(released.segvol(tmp_path / "theirs"), tmp_path / "segvol", SMALL),
    }
    folders = {name: str(done.folder) for name, done in parts.items()}
    preprocess = Preprocess.read(parts["vision_tower"].folder)
    built = build(Init(language_model=str(tmp_path / "words"), **folders), preprocess)
    assert set(built.notes) == {"vision_tower", "perceiver", "embed_tokens", "seg_head"}
    state = built.model.state_dict()
    for name, done in parts.items():
        written = read_weights(done.folder)
        own = [one for one in written if one in state and not one.startswith("seg_projector")]
        assert own and all(torch.equal(written[one], state[one]) for one in own), name
    with pytest.raises(ValueError, match=r"pools .*init says .*set init.pooling"):
        build(Init(language_model=str(tmp_path / "words"), perceiver=folders["perceiver"], pool=1), preprocess)


def test_a_converted_clip_is_what_the_bench_embeds_with(tmp_path):
    _, _, inputs, outputs = released.read("clip_a")
    folder = convert(released.clip(tmp_path / "theirs"), tmp_path / "ours", SMALL).folder
    embedder = ClipEmbedder.load(folder)
    found = embedder.scans(inputs["images"][:, 0].float() / 255, [])
    torch.testing.assert_close(found, outputs["image_cls"], atol=1e-4, rtol=0)
    assert embedder.texts(["word3 word4"]).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["lamed", "clip", "segvol"])
def test_exported_again_it_is_what_was_published_bit_for_bit(tmp_path, kind):
    """Names, shapes and values, those that nothing calls too; SegVol's export leaves CLIP's text tower out."""
    make, back, fixture = {
        "lamed": (released.lamed, export_lamed, "lamed_a"),
        "clip": (released.clip, export_clip, "clip_a"),
        "segvol": (released.segvol, export_segvol, "segvol_a"),
    }[kind]
    folder = convert(make(tmp_path / "theirs"), tmp_path / "ours", SMALL, largest_shard=400_000).folder
    back(folder, tmp_path / "again")
    found = {name: one for path in (tmp_path / "again").glob("*.safetensors") for name, one in load_file(path).items()}
    _, weights, *_ = released.read(fixture)
    if kind == "segvol":
        weights = {f"model.{name}": one for name, one in weights.items() if not name.startswith("text_encoder.")}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], one) for name, one in weights.items())


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_reports_converts_and_says_what_for(tmp_path, capsys):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    assert main(["convert", str(theirs), "--dry-run", *HEADS]) == 0
    said = capsys.readouterr().out
    assert "theirs: lamed" in said
    assert "used          235" in said
    assert "2-D mask prompts, which no 3-D mask can pass" in said
    assert not ours.exists()

    assert main(["convert", str(theirs), str(ours), "--dtype", "bfloat16", *HEADS]) == 0
    said = capsys.readouterr().out
    assert "in bfloat16, loaded whole; m3d.load reads it" in said
    assert main(["convert", str(theirs), "--out", str(ours), "--force", "--json", *HEADS]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["dtype"], said["keys"]["unused"]) == ("lamed", "float32", [])


def test_the_command_ends_in_one_line_that_says_what_to_do(tmp_path, capsys):
    theirs = released.lamed(tmp_path / "theirs")
    for words, told in (
        ([str(theirs), str(tmp_path / "ours")], "--vision-heads N"),
        (["someone/unknown", str(tmp_path / "ours")], "GoodBaiBai88/M3D-CLIP"),
        ([str(tmp_path / "words"), str(tmp_path / "ours")], "no such file or folder"),
    ):
        assert main(["convert", *words]) == 1
        told_lines = capsys.readouterr().err.strip().splitlines()
        assert told in told_lines[-1]
        assert told_lines[-1].startswith("m3d: error: ")
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(theirs)])
    assert caught.value.code == 2


def test_a_dry_run_of_what_does_not_fit_fails_after_its_report(tmp_path, capsys):
    _, weights, *_ = released.read("lamed_a")
    del weights["lm_head.weight"]
    theirs = released.lamed(tmp_path / "theirs", weights=weights)
    assert main(["convert", str(theirs), "--dry-run", *HEADS]) == 1
    said = capsys.readouterr()
    assert "missing         1 (language_model.lm_head.weight)" in said.out
    assert "1 parameters are missing" in said.err
