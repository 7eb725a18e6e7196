"""The ViT and the CLIP pair equal the reference to 1e-4 on fixtures made with its code (tests/fixtures/*/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from encoders import ViT3D, VolumeTextCLIP
from encoders.published import rename

FIXTURES = Path(__file__).parents[1] / "fixtures"


def read(name: str) -> tuple[dict, dict, dict, dict]:
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    return config, *(load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))


def vit(config: dict, width: str, heads: str, layers: str, mlp: str, size: str) -> ViT3D:
    return ViT3D(
        image_size=tuple(config[size]),
        patch_size=tuple(config["patch_size"]),
        hidden_size=config[width],
        mlp_dim=config[mlp],
        num_layers=config[layers],
        num_heads=config[heads],
    )


@pytest.fixture(scope="module")
def tower() -> tuple[ViT3D, dict, dict]:
    config, weights, inputs, outputs = read("vision_a")
    prefix = "vision_tower.vision_tower."
    model = vit(config, "dim", "heads", "layers", "mlp", "image_size")
    model.load_state_dict(rename({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}))
    return model.eval(), inputs, outputs


def test_vision_tower_equals_reference(tower):
    model, inputs, outputs = tower
    images = inputs["images"].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(model.patches(images), outputs["features_patch"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model(images)[:, :3], outputs["features_cls_patch_first3"], atol=1e-4, rtol=0)
        layers = torch.stack(model.layers(images))[:, :, ::8]
    torch.testing.assert_close(layers, outputs["hidden_states"], atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_nothing(tower):
    model, inputs, _ = tower
    images = inputs["images"].float() / 255
    model.train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(images).square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    model.eval()
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)


def test_a_volume_of_another_size_is_refused(tower):
    with pytest.raises(ValueError, match=r"takes volumes \(B, 1, 8, 48, 32\), got \(1, 1, 8, 48, 48\)"):
        tower[0](torch.zeros(1, 1, 8, 48, 48))


@pytest.fixture(scope="module")
def pair() -> tuple[VolumeTextCLIP, dict, dict]:
    config, weights, inputs, outputs = read("clip_a")
    width = config["hidden_size"]
    model = VolumeTextCLIP(
        vit(config, "hidden_size", "num_heads", "num_layers", "mlp_dim", "img_size"),
        BertModel(BertConfig(**config["bert"])),
        vision_width=width,
        text_width=width,
        shared_width=width,
        raw_scale=True,
    )
    model.load_state_dict(rename(weights))
    return model.eval(), inputs, outputs


def test_clip_equals_reference_gradients_included(pair):
    model, inputs, outputs = pair
    images, text = inputs["images"].float() / 255, (inputs["input_ids"], inputs["attention_mask"])
    seen, read_ = model.encode_volumes(images), model.encode_texts(*text)
    torch.testing.assert_close(seen[:, 0], outputs["image_cls"], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[:, 1::37], outputs["image_feats_patch_sample"], atol=1e-4, rtol=0)
    torch.testing.assert_close(read_, outputs["text_feats"], atol=1e-4, rtol=0)
    logits = model.scale * seen[:, 0] @ read_[:, 0].T
    torch.testing.assert_close((logits + logits.T) / 2, outputs["logits"], atol=1e-4, rtol=0)

    loss = model(images, *text)["contrastive"]
    torch.testing.assert_close(loss, outputs["loss"], atol=1e-4, rtol=0)
    loss.backward()
    gradients = {
        "grad_cls_token": model.vision_tower.cls_token,
        "grad_logit_scale": model.log_scale,
        "grad_mm_vision_proj_weight": model.vision_projection.weight,
    }
    for name, parameter in gradients.items():
        torch.testing.assert_close(parameter.grad, outputs[name], atol=1e-4, rtol=0)
    patch = model.vision_tower.patch_embedding.projection.weight.grad[:, :64]
    torch.testing.assert_close(patch, outputs["grad_patch_weight"], atol=1e-4, rtol=0)


def test_initial_temperature_is_007():
    model = VolumeTextCLIP(torch.nn.Identity(), torch.nn.Identity(), vision_width=2, text_width=2, shared_width=2)
    assert 1 / model.scale.item() == pytest.approx(0.07)
