"""Every published name and shape is used or known to be dead, once; what does not fit is named with its remedy."""

import csv
import json
from pathlib import Path

import pytest
import torch

from m3d.convert.layouts import Options, kind_of
from m3d.convert.report import compare
from m3d.convert.run import LAYOUTS, convert, examine
from m3d.convert.source import Entry, Source
from tests.fixtures import released
from tests.fixtures.released import SMALL

FOLDER = Path(__file__).parents[1] / "fixtures" / "keys"
LLAMA = {  # the released config.json of M3D-LaMed-Llama-2-7B, without what is of its machine
    "model_type": "lamed_llama", "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "image_channel": 1, "image_size": [32, 256, 256], "intermediate_size": 11008,
    "max_position_embeddings": 4096, "mm_hidden_size": 768, "mm_projector_type": "spp", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "patch_size": [4, 16, 16], "pretraining_tp": 1,
    "proj_layer_num": 2, "proj_layer_type": "mlp", "proj_pooling_size": 2, "proj_pooling_type": "spatial",
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "seg_token_id": 32003,
    "segmentation_module": "segvol", "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    "vision_select_feature": "patch", "vision_select_layer": -1, "vision_tower": "vit3d", "vocab_size": 32004,
}  # fmt: skip


def published(name: str) -> dict[str, tuple[int, ...]]:
    with (FOLDER / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row["key"]: tuple(int(side) for side in row["shape"].split("x") if side.isdigit()) for row in rows}


def words_of(kind: str, folder: Path) -> None:
    if kind == "lamed":
        (folder / "config.json").write_text(json.dumps(LLAMA))
        released.llama_words(folder, 32000)
    elif kind == "m3d-clip":
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    else:
        small = released.segvol(folder / "small")
        for path in small.glob("tokenizer*"):
            path.rename(folder / path.name)


@pytest.mark.parametrize(
    ("file", "kind", "used", "dead"),
    [
        ("keys_lamed_llama2.tsv", "lamed", 703, 10),
        ("keys_m3dclip.tsv", "m3d-clip", 340, 2),
        ("keys_segvol.tsv", "segvol", 464, 10),
    ],
)
def test_every_published_name_is_consumed_exactly_once(tmp_path, file, kind, used, dead):
    shapes = published(file)
    assert kind_of(shapes, tmp_path) == kind
    words_of(kind, tmp_path)
    source = Source(tmp_path, (), {name: Entry(tmp_path, shape, torch.float32) for name, shape in shapes.items()})
    layout = LAYOUTS[kind](source, shapes, Options())
    report = compare(layout.published, layout.new_name, layout.expected)
    assert not report.wrong
    assert (len(report.used), len(report.dead)) == (used, dead)
    assert sorted([*report.used, *report.dead]) == sorted(shapes)
    assert len(set(report.used.values())) == len(report.used) == len(layout.expected)
    for name, ours in report.used.items():
        assert shapes[name] == layout.expected[ours]


def test_missing_unused_and_misshapen_names_are_all_told(tmp_path):
    _, weights, *_ = released.read("lamed_a")
    del weights["model.norm.weight"]
    weights |= {"model.router.weight": torch.zeros(3, 3), "model.seg_projector.0.bias": torch.zeros(63)}
    folder = released.lamed(tmp_path / "theirs", weights=weights)
    report = examine(folder, SMALL).report
    assert report.missing == ("language_model.model.norm.weight",)
    assert report.unused == ("model.router.weight",)
    assert report.mismatched == {"model.seg_projector.0.bias": ((63,), (64,))}
    said = "\n".join(report.lines())
    assert "missing         1 (language_model.model.norm.weight)" in said
    assert "model.seg_projector.0.bias is 63, needed 64" in said
    with pytest.raises(ValueError, match=r"1 parameters are missing .*fetch all weight files; 1 have no place here"):
        convert(folder, tmp_path / "ours", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_leftovers_of_older_libraries_are_dead_not_wrong(tmp_path):
    _, weights, *_ = released.read("lamed_a")
    block = "model.vision_tower.vision_tower.blocks.0.norm_cross_attn"
    weights |= {f"{block}.weight": torch.ones(48), f"{block}.bias": torch.zeros(48)}
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    report = examine(released.lamed(tmp_path / "theirs", weights=weights), SMALL).report
    assert not report.wrong
    assert len(report.dead) == 13


def test_two_names_for_one_place_are_refused():
    report = compare({"a.x": (1,), "b.x": (1,)}, lambda name: name.partition(".")[2], {"x": (1,)})
    assert (report.used, report.unused) == ({"a.x": "x"}, ("b.x",))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["model.layers.0.mlp.up_proj.weight", "model.vision_tower.vision_tower.norm.bias"], "lamed"),
        (["base_model.model.model.layers.0.x", "base_model.model.model.vision_tower.vision_tower.norm.bias"], "lamed"),
        (["vision_encoder.norm.bias", "language_encoder.x"], "m3d-clip"),
        (["module.prompt_encoder.no_mask_embed.weight"], "segvol"),
        (["model.mm_projector.projector.0.weight", "model.embed_tokens.weight"], "perceiver"),
        (["patch_embedding.position_embeddings", "blocks.0.norm1.bias"], "vision"),
        (["model.encoder.patch_embedding.position_embeddings"], "vision"),
    ],
)
def test_a_checkpoint_is_known_by_its_names(names, kind):
    assert kind_of(names, Path("x")) == kind


def test_what_is_ours_or_nobodys_is_refused():
    with pytest.raises(ValueError, match="has our names already"):
        kind_of(["vision_tower.patch_embedding.projection.weight"], Path("x"))
    with pytest.raises(ValueError, match="x is no checkpoint of M3D-LaMed, M3D-CLIP or SegVol"):
        kind_of(["conv1.weight"], Path("x"))


def test_config_and_words_that_do_not_belong_are_refused(tmp_path):
    folder = released.lamed(tmp_path / "theirs")
    fields = json.loads((folder / "config.json").read_text())

    def say(**changed) -> None:
        (folder / "config.json").write_text(json.dumps(fields | changed))

    say(seg_token_id=5)
    with pytest.raises(ValueError, match=r"seg_token_id=5, its tokenizer reads \[SEG\] as 599"):
        examine(folder, SMALL)
    say(model_type="lamed_mamba")
    with pytest.raises(ValueError, match="says model_type='lamed_mamba'"):
        examine(folder, SMALL)
    say(vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match="vision_select_feature='cls_patch' is not supported"):
        examine(folder, SMALL)
    say(image_size=[8, 48, 64])
    with pytest.raises(ValueError, match="make 384 patches of 64 values, the weights have 192"):
        examine(folder, SMALL)
    say()
    with pytest.raises(ValueError, match="48 wide, no multiple of 64: say how many heads it has, --vision-heads N"):
        examine(folder)
