"""To the released code's folders and back: names, shapes and bits are those of the published files."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig

from data_prep.preprocess import Preprocess
from encoders.published import rename as rename_clip
from m3d.convert.layouts import Options
from m3d.convert.run import UNUSED, convert
from m3d.export.folders import MARKER, stream_weights, whole_folder
from m3d.export.names import to_clip, to_lamed, to_segvol
from m3d.export.reference import export_clip, export_lamed, export_segvol
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.clip import M3DCLIPConfig
from m3d.models.processing import add_m3d_tokens
from m3d.models.published import rename_lamed
from m3d.models.weights import write_weights
from segvol_head.published import rename as rename_segvol
from tests.conftest import byte_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    folder = FIXTURES / name
    return json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors")


def vision(sizes: dict, frame: dict, *, cls_token: bool) -> M3DVisionConfig:
    return M3DVisionConfig(
        image_size=frame.get("image_size") or frame["img_size"],
        patch_size=frame["patch_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        cls_token=cls_token,
    )


def lamed_config(config: dict) -> M3DConfig:
    llama, sam = config["llama"], config["sam"]
    known = LlamaConfig().to_dict()
    return M3DConfig(
        vision_config=vision(config["vit"], llama, cls_token=True),
        text_config=LlamaConfig(**{name: llama[name] for name in llama if name in known}),
        seg_config=M3DSegConfig(
            encoder_config=vision(sam["encoder"], llama, cls_token=False),
            decoder_depth=sam["depth"],
            decoder_heads=sam["num_heads"],
            decoder_mlp_dim=sam["mlp_dim"],
            iou_hidden_size=sam["iou_head_hidden_dim"],
            merge="mean",
        ),
        image_token_id=596,
        box_start_token_id=597,
        box_end_token_id=598,
        seg_token_id=llama["seg_token_id"],
        projector_depth=llama["proj_layer_num"],
    )


@pytest.fixture(scope="module")
def lamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity fixture as a checkpoint of ours on disk, with what the released code never runs kept beside it."""
    config, weights = fixture("lamed_a")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<filler {number}>" for number in range(596 - len(tokenizer))])
    assert list(add_m3d_tokens(tokenizer).values()) == [596, 597, 598, 599]
    folder = tmp_path_factory.mktemp("lamed") / "ours"
    model = M3DForConditionalGeneration(lamed_config(config))
    model.load_state_dict(rename_lamed(weights))
    model.save_pretrained(folder)
    preprocess = Preprocess(grid=tuple(config["llama"]["image_size"]))
    M3DProcessor(tokenizer, preprocess, model.config.num_image_tokens).save_pretrained(folder)
    (folder / UNUSED).parent.mkdir()
    save_file({name: one for name, one in weights.items() if "mask_downscaling" in name}, folder / UNUSED)
    return folder


def test_lamed_comes_back_bit_for_bit(lamed: Path, tmp_path: Path):
    config, weights = fixture("lamed_a")
    done = export_lamed(lamed, tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == weights.keys() and done.tensors == len(weights) == 245
    for name, one in weights.items():
        assert written[name].dtype == one.dtype and torch.equal(written[name], one), name
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {name: fields[name] for name in config["llama"]} == config["llama"]
    assert (fields["model_type"], fields["architectures"]) == ("lamed_llama", ["LamedLlamaForCausalLM"])
    assert fields["rope_scaling"] is None and fields["torch_dtype"] == "float32" and "rope_parameters" not in fields
    tokens = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())["added_tokens"]
    assert {"<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"} <= {one["content"] for one in tokens}
    assert any("vision_config.hidden_size=48, there 768" in note for note in done.notes)
    assert not any("zeros" in note for note in done.notes)


def test_what_was_exported_is_converted_and_exported_again(lamed: Path, tmp_path: Path):
    """Through the files of both directions: `m3d convert` reads what `m3d export` writes, and it comes out the same."""
    export_lamed(lamed, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", Options(vision_heads=4))
    export_lamed(tmp_path / "ours", tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    fields, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    assert {name: again.get(name) for name in fields} == fields


def test_what_is_not_kept_and_never_runs_is_zeros_and_said(lamed: Path, tmp_path: Path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in lamed.iterdir():
        if path.is_file():
            (plain / path.name).write_bytes(path.read_bytes())
    done = export_lamed(plain, tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    _, weights = fixture("lamed_a")
    dead = {name for name in weights if "mask_downscaling" in name}
    assert {name: one.shape for name, one in written.items()} == {name: one.shape for name, one in weights.items()}
    assert all(torch.equal(written[name], weights[name]) for name in weights.keys() - dead)
    assert len(dead) == 10 and not any(written[name].any() for name in dead)
    said = "10 tensors (prompt_encoder.mask_downscaling.*) are zeros"
    assert any(said in note for note in done.notes) and said in (tmp_path / "theirs" / "README.md").read_text()


def test_an_export_is_replaced_only_when_asked_and_nothing_else_is(lamed: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    export_lamed(lamed, theirs)
    assert json.loads((theirs / MARKER).read_text())["format"] == "lamed"
    with pytest.raises(FileExistsError, match="--force"):
        export_lamed(lamed, theirs)
    export_lamed(lamed, theirs, force=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="no earlier export"):
        export_lamed(lamed, tmp_path / "work", force=True)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    (theirs / "eval").mkdir()
    (theirs / "eval" / "mask.txt").write_text("hours")
    with pytest.raises(ValueError, match=r"1 files that no export wrote, such as eval/mask\.txt"):
        export_lamed(lamed, theirs, force=True)
    assert (theirs / "eval" / "mask.txt").read_text() == "hours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "work"]  # no half-written folder


def test_what_appears_meanwhile_is_not_replaced_either(tmp_path: Path):
    folder = tmp_path / "theirs"
    with pytest.raises(FileExistsError, match="--force"), whole_folder(folder, force=False) as partial:
        (partial / "config.json").write_text("{}")
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_broken_file_leaves_nothing(lamed: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in lamed.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        export_lamed(broken, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_the_released_code_has_no_place_for_is_named(model: M3DForConditionalGeneration, tmp_path: Path):
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="released LaMed code cannot read") as refused:
        export_lamed(tmp_path / "ours", tmp_path / "theirs")
    for setting in (
        "vision_config.detail_channels=4",
        "seg_config.encoder_config=null",
        "seg_config.coordinates='grid'",
        "seg_config.upscale_norm='channel'",
        "seg_config.mask_prompt=true",
        "seg_config.num_masks=1",
    ):
        assert setting in str(refused.value)
    assert "box_head" not in str(refused.value) and "pooling" not in str(refused.value)
    assert not (tmp_path / "theirs").exists()


def test_segvol_comes_back_bit_for_bit(lamed: Path, tmp_path: Path):
    _, weights = fixture("lamed_a")
    part = "model.seg_module."
    expected = {name.replace(part, "model."): one for name, one in weights.items() if name.startswith(part)}
    done = export_segvol(lamed, tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == expected.keys() and any("text tower" in note for note in done.notes)
    alive = {name for name in expected if "mask_downscaling" not in name}
    assert all(torch.equal(written[name], expected[name]) for name in alive)
    assert len(rename_segvol(written)) == len(alive)


def test_m3d_clip_comes_back_bit_for_bit(tmp_path: Path):
    config, weights = fixture("clip_a")
    ours = tmp_path / "ours"
    ours.mkdir()
    state = {name: one for name, one in rename_clip(weights).items() if "pooler" not in name}
    write_weights(state, ours)
    described = M3DCLIPConfig(
        vision_config=vision(config, config, cls_token=True),
        text_config=BertConfig(**config["bert"]),
        shared_width=48,
        raw_scale=True,
    )
    described.save_pretrained(ours)
    export_clip(ours, tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {name: one.shape for name, one in written.items()} == {name: one.shape for name, one in weights.items()}
    assert all(torch.equal(written[name], one) for name, one in weights.items() if "pooler" not in name)
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for name in ("hidden_size", "mlp_dim", "num_layers", "num_heads", "img_size", "patch_size", "in_channels"):
        assert fields[name] == config[name], name

    described.raw_scale = False  # ours: exp(log_scale) is the factor; there: the factor itself
    described.save_pretrained(ours)
    export_clip(ours, tmp_path / "theirs", force=True)
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    torch.testing.assert_close(written["logit_scale"], weights["logit_scale"].exp())
    described.volume_pooling = "mean"
    described.save_pretrained(ours)
    with pytest.raises(ValueError, match="volume_pooling='mean'"):
        export_clip(ours, tmp_path / "no")


def published(name: str) -> dict[str, torch.Tensor]:
    with (FIXTURES / "keys" / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    sides = {row["key"]: [int(side) for side in row["shape"].split("x") if side.isdigit()] for row in rows}
    return {key: torch.empty(shape, device="meta") for key, shape in sides.items()}


def test_every_published_name_is_written_again():
    lamed, clip = published("keys_lamed_llama2.tsv"), published("keys_m3dclip.tsv")
    dead = {name for name in lamed if "mask_downscaling" in name}
    assert set(to_lamed(rename_lamed(lamed)).values()) == lamed.keys() - dead
    assert set(to_clip(rename_clip(clip)).values()) == clip.keys()
    head = {name: one for name, one in rename_lamed(lamed).items() if name.startswith("seg_head.")}
    part = "model.seg_module."
    there = {name.replace(part, "model.") for name in lamed if name.startswith(part)}
    assert set(to_segvol(head).values()) == {name for name in there if "mask_downscaling" not in name}
    with pytest.raises(ValueError, match=r"'box_head\.0\.weight' has no counterpart"):
        to_lamed([*rename_lamed(lamed), "box_head.0.weight"])


def test_shards_are_written_one_by_one_with_an_index(tmp_path: Path):
    source, target = tmp_path / "ours", tmp_path / "theirs"
    source.mkdir()
    target.mkdir()
    parts = [{"a": torch.rand(3).half(), "b": torch.arange(4)}, {"c": torch.rand(2, 2)}]
    for number, part in enumerate(parts, start=1):
        save_file(part, source / f"model-0000{number}-of-00002.safetensors")
    names = {"a": "x.a", "b": "x.b", "c": "y.c"}
    written = stream_weights(source, target, names, more={"dead": torch.zeros(1)})
    assert written == {"x.a": (3,), "x.b": (4,), "y.c": (2, 2), "dead": (1,)}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 2 + 4 * 8 + 4 * 4 + 4
    for name, file in index["weight_map"].items():
        assert name in load_file(target / file)
    assert torch.equal(load_file(target / "model-00001-of-00002.safetensors")["x.a"], parts[0]["a"])
