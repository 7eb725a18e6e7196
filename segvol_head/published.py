"""SegVol as released: its size, and the names of its weights.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from segvol_head.mask_decoder import MaskDecoder3D
from segvol_head.prompt_encoder import PromptEncoder3D, Sides
from segvol_head.segvol import SegVol

LANDMARK = "prompt_encoder.no_mask_embed.weight"
"""A key every release has; whatever stands before it (``model.``, ``module.``) stands before all keys."""

DEAD = re.compile(
    r"prompt_encoder\.mask_downscaling\."  # 2-D convolutions that a 3-D mask can never pass
    r"|text_encoder\."  # the CLIP text tower, which is not ours to carry
    r"|image_encoder\.blocks\.\d+\.(norm_)?cross_attn\."  # MONAI 1.4 and later put unused layers into every block
    r"|image_encoder\.patch_embedding\.cls_token$"  # MONAI 0.8 and earlier
)
ATTENTION = r"(q|k|v|out)_proj\.(weight|bias)"
KNOWN = re.compile(
    r"image_encoder\.(blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv\.weight|out_proj\.(weight|bias))"
    r"|mlp\.linear[12]\.(weight|bias))|norm\.(weight|bias)|cls_token"
    r"|patch_embedding\.(position_embeddings|patch_embeddings\.1\.(weight|bias)))$"
    r"|prompt_encoder\.(pe_layer\.positional_encoding_gaussian_matrix"
    r"|point_embeddings\.[0-3]\.weight|not_a_point_embed\.weight|no_mask_embed\.weight)$"
    r"|mask_decoder\.((iou_token|mask_tokens)\.weight|output_upscaling\.[013]\.(weight|bias)"
    r"|(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.\d+\.(weight|bias)"
    r"|txt_align_upscaled_embedding\.(weight|bias)"
    rf"|transformer\.(norm_final_attn\.(weight|bias)|final_attn_token_to_image\.{ATTENTION}"
    rf"|layers\.\d+\.((self_attn|cross_attn_token_to_image|cross_attn_image_to_token)\.{ATTENTION}"
    r"|norm[1-4]\.(weight|bias)|mlp\.lin[12]\.(weight|bias))))$"
)


def published_segvol(image_encoder: nn.Module | None) -> SegVol:
    """SegVol as published: 32x256x256 voxels, patches of 4x16x16, width 768, two-way decoder of depth 2."""
    size: Sides = (32, 256, 256)
    grid: Sides = (8, 16, 16)
    prompts = PromptEncoder3D(768, grid, size, coordinates="published")
    decoder = MaskDecoder3D(768, depth=2, num_heads=8, mlp_dim=2048, num_masks=4, upscale_norm="volume", grid=grid)
    return SegVol(image_encoder, prompts, decoder, image_size=size)


def prefix_of(keys: Iterable[str]) -> str:
    """What stands before every key of a release: ``model.``, ``module.`` or nothing.

    Raises:
        ValueError: These are no SegVol weights.
    """
    landmark = next((key for key in keys if key.endswith(LANDMARK)), None)
    if landmark is None:
        raise ValueError(f"these are not SegVol weights: no key ends with {LANDMARK!r}")
    return landmark.removesuffix(LANDMARK)


def new_name(name: str) -> str | None:
    """Our name of a released parameter, its prefix taken off; None for a part that could never run.

    Raises:
        ValueError: It is no parameter of SegVol.
    """
    if DEAD.match(name):
        return None
    if not KNOWN.match(name):
        raise ValueError(f"{name!r} is no parameter of SegVol")
    return name.replace("patch_embeddings.1.", "projection.")


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released SegVol weights under our names, without the parts that could never run.

    Every key must be known: the reference dropped strangers in silence, and with them whole files.

    Raises:
        ValueError: A key does not belong to SegVol.
    """
    prefix, renamed, strangers = prefix_of(state_dict), {}, []
    for key, value in state_dict.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or not (KNOWN.match(name) or DEAD.match(name)):
            strangers.append(key)
        elif (ours := new_name(name)) is not None:
            renamed[ours] = value
    if strangers:
        raise ValueError(f"{len(strangers)} keys do not belong to SegVol: {', '.join(sorted(set(strangers))[:8])}")
    return renamed
