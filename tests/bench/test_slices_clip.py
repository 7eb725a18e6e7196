"""The 2D baseline: which slices it sees and how, and that a scan is the mean of what open_clip makes of them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before open_clip is imported
import open_clip
from safetensors.torch import save_file
from transformers import BertConfig, BertTokenizerFast

from data_prep.record import Intensity
from m3d.bench.retrieval import run_retrieval, score_retrieval
from m3d.bench.slices_clip import SlicesClip, axial, slice_places
from m3d.cli.main import main
from m3d.train.cases import stored
from tests.fixtures import small_store

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of open_clip's as a folder, with weights from nothing."""
    root = tmp_path_factory.mktemp("open_clip") / "tiny"
    root.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    state = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(state, root / "open_clip_model.safetensors")
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store.build(tmp_path_factory.mktemp("slices") / "store")


def asked(cases):
    return [(case, record) for case in cases for record in case.records if record.task == "retrieval"]


def media_of(tmp_path, **changes):
    return small_store.stored_image("mini/a", 0, tmp_path).media.model_copy(update=changes)


def test_ten_slices_lie_in_the_middles_of_equal_parts():
    assert slice_places(100) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert slice_places(32) == [1, 4, 8, 11, 14, 17, 20, 24, 27, 30]
    assert slice_places(5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_slices_stand_as_radiologists_see_them():
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert np.array_equal(axial(volume, "SPL"), volume)
    assert np.array_equal(axial(volume, None), volume)
    assert np.array_equal(axial(volume.transpose(2, 1, 0), "LPS"), volume)
    assert np.array_equal(axial(volume[::-1, :, ::-1].transpose(2, 1, 0), "RPI"), volume)
    assert np.array_equal(axial(volume[:, ::-1].transpose(1, 0, 2), "ASL"), volume)


def test_grey_is_the_window_in_hounsfield_units(folder, tmp_path):
    volume = np.linspace(0, 1, 10, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)  # 0 to 255 HU
    media = media_of(tmp_path)
    own = SlicesClip.load(folder).pictures(volume, media)
    assert own[:, 0, 0].tolist() == [0, 28, 57, 85, 113, 142, 170, 198, 227, 255]
    narrow = SlicesClip.load(folder, window=(85.0, 170.0), slices=10).pictures(volume, media)
    # 0, 28.3, 56.7, 85, 113.3, 141.7, 170 ... HU
    assert narrow[:, 0, 0].tolist() == [0, 0, 0, 0, 85, 170, 255, 255, 255, 255]


def test_a_scan_is_the_mean_of_its_slices(folder, tmp_path):
    clip = SlicesClip.load(folder, slices=3)
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (2, 9, 40, 48)).astype(np.uint8)
    found = clip.scans(torch.from_numpy(grey.astype(np.float32) / 255), [media_of(tmp_path, orient="SPL")] * 2)

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for scan, vector in zip(grey, found, strict=True):
        with torch.no_grad():
            pictures = [preprocess(Image.fromarray(scan[place]).convert("RGB")) for place in (1, 4, 7)]
            each = [model.encode_image(picture[None])[0] for picture in pictures]
        mean = sum(one / one.norm() for one in each) / 3
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_texts_are_open_clips(folder):
    model = open_clip.create_model(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["A liver.", "No liver."])
    with torch.no_grad():
        wanted = model.encode_text(tokens, normalize=True)
    assert torch.allclose(SlicesClip.load(folder).texts(["A liver.", "No liver."]), wanted, atol=1e-6)


def test_a_text_tower_of_hugging_faces_is_taken_from_the_folder(tmp_path):
    tokenizer, bert = tmp_path / "made", {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
    bert |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 1.0}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "liver", "no", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tokenizer)
    config = BertConfig(**bert)
    config.save_pretrained(tokenizer)
    text = {"hf_model_name": "some/bert", "hf_tokenizer_name": "some/bert", "hf_pooler_type": "cls_pooler"}
    text |= {"hf_proj_type": "linear", "context_length": 16}
    described = {"embed_dim": 16, "vision_cfg": CONFIG["vision_cfg"], "text_cfg": text}
    (tokenizer / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    here = {**text, "hf_model_name": str(tokenizer), "hf_model_pretrained": False}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(16, CONFIG["vision_cfg"], here).eval()
    state = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(state, tokenizer / "open_clip_model.safetensors")

    clip = SlicesClip.load(tokenizer)
    ids = torch.tensor([[2, 5, 6, 8, 3] + [0] * 11, [2, 7, 6, 8, 3] + [0] * 11])
    with torch.no_grad():
        wanted = model.encode_text(ids, normalize=True)
    assert torch.allclose(clip.texts(["A liver.", "No liver."]), wanted, atol=1e-6)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)


def test_it_runs_as_any_embedder(folder, store, tmp_path):
    clip = SlicesClip.load(folder)
    run_retrieval(asked(stored(store, "train")), clip, tmp_path)
    found = score_retrieval(tmp_path)
    assert found["embedder"] == clip.about()
    assert (found["embedder"]["model"], found["embedder"]["slices"]) == ("tiny", 10)
    assert found["embedder"].keys() == {"kind", "model", "weights_sha256", "slices", "window"}
    assert str(folder.parent) not in json.dumps(found)
    assert set(found["metrics"]["R@1 image to text, pool 2"]) >= {"value", "low", "high", "blind", "chance"}
    again = SlicesClip.load(folder, window=(0, 100))
    with pytest.raises(ValueError, match="embedder differ"):
        run_retrieval(asked(stored(store, "train")), again, tmp_path)


def test_the_command_asks_it_alone(folder, store, tmp_path):
    (tmp_path / "bench.yaml").write_text(json.dumps({"split": "train", "tasks": {"report": {}}}))
    out = tmp_path / "out"
    words = ["--open-clip", str(folder), "--data", str(store), "--out", str(out), "--device", "cpu"]
    assert main(["bench", "run", str(tmp_path / "bench.yaml"), *words, "tasks={retrieval: {}}"]) == 0
    assert main(["bench", "score", str(out), "--no-page"]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert list(found["tasks"]) == ["retrieval"] and found["clip"]["name"] == "tiny"
    assert found["tasks"]["retrieval"]["metrics"]["R@1 image to text, pool 2"]["chance"] == 0.5


def test_a_named_model_takes_weights_from_a_file(folder, tmp_path):
    (tmp_path / "tiny-by-name.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-by-name.json")
    named = SlicesClip.load("tiny-by-name", folder / "open_clip_model.safetensors")
    assert named.about()["weights_sha256"] == SlicesClip.load(folder).about()["weights_sha256"]
    save_file({"text_projection": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        SlicesClip.load("tiny-by-name", tmp_path / "other.safetensors")


def test_a_folder_is_known_by_its_name_however_it_is_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    clip = SlicesClip.load(".", window=(-160, 240), slices=3)
    assert (clip.about()["model"], clip.about()["slices"], clip.about()["window"]) == ("tiny", 3, [-160, 240])


def test_without_open_clip_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match="'open_clip' is needed here: pip install open_clip_torch"):
        SlicesClip.load(folder)
    with pytest.raises(ModuleNotFoundError, match="'open_clip' is needed here: pip install open_clip_torch"):
        SlicesClip.load("ViT-B-32")


def test_nothing_is_downloaded(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"pretrained=None is no file: place the weights of ViT-B-32"):
        SlicesClip.load("ViT-B-32")
    with pytest.raises(FileNotFoundError, match="pretrained=openai is no file"):
        SlicesClip.load("ViT-B-32", "openai")
    with pytest.raises(ValueError, match="would fetch roberta-base from Hugging Face; give a folder with"):
        SlicesClip.load("roberta-ViT-B-32", folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="open_clip has no model 'PMC-CLIP'"):
        SlicesClip.load("PMC-CLIP")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json is missing"):
        SlicesClip.load(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        SlicesClip.load(tmp_path)
    bert = {**CONFIG, "text_cfg": {"hf_model_name": "some/bert", "hf_tokenizer_name": "some/bert"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": bert}))
    with pytest.raises(FileNotFoundError, match="place there the config of some/bert"):
        SlicesClip.load(tmp_path)


def test_a_window_needs_hounsfield_units(folder, store):
    clip, cases = SlicesClip.load(folder, window=(-100, 300)), stored(store, "train")
    clip.check(cases)
    media = cases[0].image.media.model_copy(update={"intensity": Intensity(unit="norm01")})
    object.__setattr__(cases[0].image, "media", media)
    with pytest.raises(ValueError, match="is not known in HU"):
        clip.check(cases)
    with pytest.raises(ValueError, match="limits in HU, lower first"):
        SlicesClip.load(folder, window=(300, -100))
