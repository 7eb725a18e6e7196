"""From image and prompt tokens to a low-resolution mask.

Part of m3d-lamed; import through `m3d`.
"""

# P = prompts, T = prompt tokens, C = width, M = masks, N = image tokens, (d, h, w) = token grid

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segvol_head.norms import ChannelNorm
from segvol_head.prompt_encoder import Sides
from segvol_head.rows import rows
from segvol_head.two_way import TwoWayTransformer

UpscaleNorm = Literal["volume", "channel"]


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., first width) -> (..., last width)``."""
        *hidden, last = self.layers
        for layer in hidden:
            tokens = F.relu(layer(tokens))
        out: Tensor = last(tokens)
        return out


@dataclass(frozen=True)
class LowRes:
    """What the decoder says about P prompts.

    ``masks`` are logits ``(P, M, 4d, 4h, 4w)``, ``mask_tokens`` ``(P, M, C)`` the tokens that drew them,
    ``iou_token`` ``(P, C)`` what the quality head reads.
    """

    masks: Tensor
    mask_tokens: Tensor
    iou_token: Tensor


class MaskDecoder3D(nn.Module):
    """SegVol's mask decoder.

    ``upscale_norm="volume"`` is published: its affine parameters cover channels and space, which ties the decoder to
    one ``grid`` (and is most of its size). ``"channel"`` normalises channels alone and fits any grid. Of the
    ``num_masks`` masks only the first is drawn unless all are asked for, as the published model uses it.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        num_masks: int = 4,
        upscale_norm: UpscaleNorm = "channel",
        grid: Sides | None = None,
        iou_hidden: int = 256,
    ) -> None:
        super().__init__()
        if width % 8:
            raise ValueError(f"width={width} must be divisible by 8: upscaling divides it by 4, then by 2")
        self.num_masks = num_masks
        self.transformer = TwoWayTransformer(width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(num_masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(width, width // 4, kernel_size=2, stride=2),
            _upscale_norm(upscale_norm, width // 4, grid),
            nn.GELU(),
            nn.ConvTranspose3d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(width, width, width, width // 8) for _ in range(num_masks))
        self.iou_prediction_head = Mlp(width, iou_hidden, iou_hidden, num_masks)
        self.txt_align_upscaled_embedding = nn.Linear(width, width // 8)

    def forward(
        self,
        image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        *,
        text: Tensor | None = None,
        all_masks: bool = False,
    ) -> LowRes:
        """``(P, C, d, h, w), (1, C, d, h, w), (P, T, C), (P, C) -> (P, M, 4d, 4h, 4w)``, M = 1 unless all are asked.

        ``image`` already carries the dense embedding of its prompt.
        """
        own = torch.cat([rows(table, sparse.device) for table in (self.iou_token, self.mask_tokens)])
        own = own.expand(len(sparse), -1, -1)
        tokens, looked_at = self.transformer(
            torch.cat([own.to(sparse.dtype), sparse], dim=1),
            rearrange(image, "p c d h w -> p (d h w) c"),
            rearrange(image_pe, "1 c d h w -> 1 (d h w) c"),
        )
        d, h, w = image.shape[2:]
        upscaled = self.output_upscaling(rearrange(looked_at, "p (d h w) c -> p c d h w", d=d, h=h, w=w))
        drawn = self.num_masks if all_masks else 1
        mask_tokens = tokens[:, 1 : 1 + drawn]
        pens = torch.stack([self.output_hypernetworks_mlps[i](mask_tokens[:, i]) for i in range(drawn)], dim=1)
        if text is not None:
            pens = pens + self.txt_align_upscaled_embedding(text.to(sparse.dtype))[:, None]
        masks = (pens @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        return LowRes(masks, mask_tokens, tokens[:, 0])

    def quality(self, low_res: LowRes) -> Tensor:
        """The decoder's own estimate of each mask's IoU ``(P, M)``; the published head was never trained."""
        scores: Tensor = self.iou_prediction_head(low_res.iou_token)
        return scores[:, : low_res.masks.shape[1]]


def _upscale_norm(kind: UpscaleNorm, channels: int, grid: Sides | None) -> nn.Module:
    if kind == "channel":
        return ChannelNorm(channels)
    if kind != "volume":
        raise ValueError(f"upscale_norm={kind!r} must be 'volume' (published) or 'channel'")
    if grid is None:
        raise ValueError("upscale_norm='volume' needs grid=(d, h, w): its parameters cover space")
    return nn.LayerNorm((channels, *(2 * side for side in grid)))
