"""Sizes that released files do not say: read off the shapes of their weights, or constants of the released code."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import BertConfig, CLIPTextConfig

from m3d.convert.report import Shape
from m3d.models.config import M3DSegConfig, M3DVisionConfig

Shapes = Mapping[str, Shape]
IMAGE, PATCH = (32, 256, 256), (4, 16, 16)
HEAD_WIDTH = 64
"""Width of an attention head in every released model (REFERENCE A1.1, BERT-base, CLIP)."""
MASK_HEADS = 8


def count(names: Iterable[str], start: str) -> int:
    """How many numbered layers stand after ``start``."""
    numbers = {int(found[1]) for name in names if (found := re.match(re.escape(start) + r"(\d+)\.", name))}
    return len(numbers)


def heads_of(width: int, given: int | None, what: str, option: str) -> int:
    """``given``, or that many that each is 64 wide.

    Raises:
        ValueError: The width is no multiple of 64, and nobody says how many there are.
    """
    if given is not None:
        return given
    if width % HEAD_WIDTH:
        raise ValueError(f"{what} is {width} wide, no multiple of {HEAD_WIDTH}: say how many heads it has, {option} N")
    return width // HEAD_WIDTH


def tower_config(shapes: Shapes, fields: Mapping[str, Any], *, heads: int | None) -> M3DVisionConfig:
    """A 3D ViT by its released weights, their names beginning with ``blocks`` and ``patch_embedding``.

    Raises:
        ValueError: The image and patch sizes of its config are not those of its weights.
    """
    image = list(fields.get("image_size") or fields.get("img_size") or fields.get("spatial_size") or IMAGE)
    patch = list(fields.get("patch_size") or PATCH)
    _, patches, width = shapes["patch_embedding.position_embeddings"]
    voxels = shapes["patch_embedding.patch_embeddings.1.weight"][1]
    channels = int(fields.get("image_channel") or fields.get("in_channels") or 1)
    grid = [side // size for side, size in zip(image, patch, strict=True)]
    makes = math.prod(grid), math.prod(patch) * channels
    if makes != (patches, voxels):
        raise ValueError(
            f"image_size={image} and patch_size={patch} make {makes[0]} patches of {makes[1]} values, the weights have "
            f"{patches} of {voxels}; put their config.json beside them"
        )
    return M3DVisionConfig(
        image_size=image,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        intermediate_size=shapes["blocks.0.mlp.linear1.weight"][0],
        num_hidden_layers=count(shapes, "blocks."),
        num_attention_heads=heads_of(width, heads or fields.get("num_heads"), "the vision tower", "--vision-heads"),
        cls_token="cls_token" in shapes,
    )


def head_config(shapes: Shapes, fields: Mapping[str, Any], *, heads: int | None) -> M3DSegConfig:
    """A released SegVol head with its own encoder, by its weights."""
    decoder = "mask_decoder."
    encoder = "image_encoder."
    own = {name.removeprefix(encoder): shape for name, shape in shapes.items() if name.startswith(encoder)}
    return M3DSegConfig(
        encoder_config=tower_config(own, fields, heads=heads),
        decoder_depth=count(shapes, f"{decoder}transformer.layers."),
        decoder_heads=MASK_HEADS,
        decoder_mlp_dim=shapes[f"{decoder}transformer.layers.0.mlp.lin1.weight"][0],
        iou_hidden_size=shapes[f"{decoder}iou_prediction_head.layers.0.weight"][0],
        num_masks=shapes[f"{decoder}mask_tokens.weight"][0],
        coordinates="published",
        upscale_norm="volume",
    )


def bert_config(shapes: Shapes, *, heads: int | None) -> BertConfig:
    """M3D-CLIP's text tower by its weights, their names beginning with ``embeddings`` and ``encoder``."""
    vocabulary, width = shapes["embeddings.word_embeddings.weight"]
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=count(shapes, "encoder.layer."),
        num_attention_heads=heads_of(width, heads, "the text tower", "--text-heads"),
        intermediate_size=shapes["encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes["embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes["embeddings.token_type_embeddings.weight"][0],
    )


def clip_text_config(shapes: Shapes, *, heads: int | None) -> CLIPTextConfig:
    """SegVol's text tower, CLIP ViT-B/32's, by its weights; CLIP's last two tokens begin and end a text."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count(shapes, "encoder.layers."),
        num_attention_heads=heads_of(width, heads, "the text tower", "--text-heads"),
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
