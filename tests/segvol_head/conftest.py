"""The reference's own numbers, and models small enough to run in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from encoders.vit3d import ViT3D
from segvol_head import MaskDecoder3D, PromptEncoder3D, SegVol
from segvol_head.published import rename

FIXTURES = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Parity:
    """One fixture: what went into the reference, and what came out."""

    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def image_size(self) -> tuple[int, int, int]:
        d, h, w = self.config["image_size"]
        return d, h, w

    def segvol(self) -> SegVol:
        """Build the published SegVol at the fixture's size, with its weights."""
        config, patch = self.config, self.config["patch_size"]
        d, h, w = (side // p for side, p in zip(self.image_size, patch, strict=True))
        encoder = ViT3D(
            image_size=self.image_size,
            patch_size=tuple(patch),
            hidden_size=config["dim"],
            mlp_dim=config["mlp"],
            num_layers=config["layers"],
            num_heads=config["heads"],
            cls_token=False,
        )
        decoder = MaskDecoder3D(
            config["dim"],
            depth=config["sam_depth"],
            num_heads=config["sam_num_heads"],
            mlp_dim=config["sam_mlp_dim"],
            upscale_norm="volume",
            grid=(d, h, w),
            iou_hidden=config["iou_head_hidden_dim"],
        )
        prompts = PromptEncoder3D(config["dim"], (d, h, w), self.image_size, coordinates="published")
        model = SegVol(encoder, prompts, decoder, image_size=self.image_size)
        model.load_state_dict(rename(self.weights), strict=True)
        return model.eval()

    def text_pooled(self, token_ids: Tensor) -> Tensor:
        """The reference's text tower, a CLIP text model, written out: ``(B, L) -> (B, width)`` at the first EOS."""
        text = {
            key.removeprefix("text_encoder.clip_text_model.text_model."): value for key, value in self.weights.items()
        }
        clip = self.config["clip_text"]

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, text[f"{name}.weight"], text[f"{name}.bias"])

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], text[f"{name}.weight"], text[f"{name}.bias"])

        x = text["embeddings.token_embedding.weight"][token_ids]
        x = x + text["embeddings.position_embedding.weight"][: token_ids.shape[1]]
        for i in range(clip["num_hidden_layers"]):
            layer, heads = f"encoder.layers.{i}", clip["num_attention_heads"]
            y = norm(f"{layer}.layer_norm1", x)
            q, k, v = (
                linear(f"{layer}.self_attn.{part}_proj", y).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + linear(f"{layer}.self_attn.out_proj", mixed)
            y = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
            x = x + linear(f"{layer}.mlp.fc2", y * torch.sigmoid(1.702 * y))
        x = norm("final_layer_norm", x)
        end = (token_ids == clip["eos_token_id"]).int().argmax(dim=1)
        return x[torch.arange(len(x)), end]

    def text_embedding(self, token_ids: Tensor) -> Tensor:
        """What SegVol prompts with: the pooled text, projected."""
        aligned = self.weights["text_encoder.dim_align.weight"], self.weights["text_encoder.dim_align.bias"]
        return F.linear(self.text_pooled(token_ids), *aligned)


def _read(name: str) -> Parity:
    folder = FIXTURES / name
    parts = [
        load_file(folder / f"{part}.safetensors") if (folder / f"{part}.safetensors").exists() else {}
        for part in ("inputs", "outputs", "weights")
    ]
    return Parity(json.loads((folder / "config.json").read_text()), *parts)


@pytest.fixture(scope="session")
def segvol_a() -> Parity:
    return _read("segvol_a")


@pytest.fixture(scope="session")
def segflow() -> Parity:
    return _read("segflow")


@pytest.fixture(scope="session")
def losses() -> Parity:
    return _read("losses")


@pytest.fixture
def small_segvol() -> Callable[..., SegVol]:
    """Build a small SegVol of the new kind: any grid, true coordinates, no image encoder."""

    def build(detail: int = 0, **options: Any) -> SegVol:
        torch.manual_seed(0)
        size, grid = (8, 16, 12), (2, 4, 3)
        encoder_options = {name: options.pop(name) for name in ("coordinates", "mask_prompt") if name in options}
        prompts = PromptEncoder3D(16, grid, size, **encoder_options)
        decoder = MaskDecoder3D(16, num_heads=2, mlp_dim=32, iou_hidden=8, **options)
        return SegVol(None, prompts, decoder, image_size=size, detail_channels=detail).eval()

    return build
