"""The 3D vision transformer of M3D-CLIP and SegVol, without MONAI's version-bound state dict.

Parameter names follow the published checkpoints, so that their weights load strictly after the renaming in
`encoders.published`. Attention goes through `scaled_dot_product_attention`: the N x N matrix is never materialised.
"""

# B = volumes, N = patch tokens (d h w), C = width, F = features of a voxel, (D, H, W) = voxels

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoders.detail import DetailEmbedding, DetailNetwork

Size3 = tuple[int, int, int]


class PatchEmbedding(nn.Module):
    """Cut a volume into patches, project them and add where each came from."""

    def __init__(self, image_size: Size3, patch_size: Size3, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        if any(side % patch for side, patch in zip(image_size, patch_size, strict=True)):
            raise ValueError(f"every side of patch_size={patch_size} must divide image_size={image_size}")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.grid: Size3 = (
            image_size[0] // patch_size[0],
            image_size[1] // patch_size[1],
            image_size[2] // patch_size[2],
        )
        self.projection = nn.Linear(in_channels * math.prod(patch_size), hidden_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(self.grid), hidden_size))
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def forward(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, N, C)``, tokens in d-major order, patch voxels in (pd, ph, pw, channel) order."""
        if tuple(volumes.shape[1:]) != (self.in_channels, *self.image_size):
            raise ValueError(
                f"this ViT takes volumes (B, {self.in_channels}, {', '.join(map(str, self.image_size))}), "
                f"got {tuple(volumes.shape)}; prepare the scan with the checkpoint's own preprocess.json"
            )
        (d, h, w), (p, q, r) = self.grid, self.patch_size
        cells = volumes.reshape(-1, self.in_channels, d, p, h, q, w, r)
        patches = cells.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
        embedded: Tensor = self.projection(patches) + self.position_embeddings
        return embedded


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused, bias-free qkv projection (MONAI's `SABlock` layout)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, N, C)``."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, hidden_size: int, mlp_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, N, C)``."""
        out: Tensor = self.linear2(F.gelu(self.linear1(tokens)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    def __init__(self, hidden_size: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, mlp_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, N, C)``."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


@dataclass(frozen=True)
class Seen:
    """Normed tokens ``(B, N (+1), C)``, the class token first, and features of every voxel ``(B, F, D, H, W)``."""

    tokens: Tensor
    detail: Tensor | None = None


class ViT3D(nn.Module):
    """3D ViT (M3D-LaMed, section 4.1); the published size is 12 layers x 768, 12 heads, patches of 4x16x16.

    With ``cls_token`` a learned token, without a position of its own, stands before the patches. With
    ``detail_channels`` a convolutional network looks first, ``detail_filters`` wide, whose features the patches read as
    well (`encoders.detail`); 0 is the published tower. Set ``gradient_checkpointing`` to trade a second forward pass
    for the blocks' activations.
    """

    def __init__(
        self,
        *,
        image_size: Size3 = (32, 256, 256),
        patch_size: Size3 = (4, 16, 16),
        in_channels: int = 1,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        cls_token: bool = True,
        detail_channels: int = 0,
        detail_filters: int = 8,
    ) -> None:
        super().__init__()
        self.hidden_size, self.gradient_checkpointing = hidden_size, False
        self.patch_embedding = PatchEmbedding(image_size, patch_size, in_channels, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if cls_token else None
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, mlp_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.detail: DetailNetwork | None = None
        self.detail_embedding: DetailEmbedding | None = None
        if detail_channels:
            self.detail = DetailNetwork(detail_channels, detail_filters)
            self.detail_embedding = DetailEmbedding(detail_channels, patch_size, hidden_size)

    @property
    def grid(self) -> Size3:
        """Patches along D, H, W."""
        return self.patch_embedding.grid

    def layers(self, volumes: Tensor) -> list[Tensor]:
        """Every block's output before the final norm, ``num_layers`` x ``(B, N (+1), C)``."""
        return self._layers(volumes, self._look_closely(volumes))

    def look(self, volumes: Tensor) -> Seen:
        """``(B, 1, D, H, W)`` -> all that is seen, in one pass."""
        detail = self._look_closely(volumes)
        return Seen(self(volumes, detail), detail)  # a call, for the hooks with which ZeRO-3 gathers the class token

    def forward(self, volumes: Tensor, detail: Tensor | None = None) -> Tensor:
        """``(B, 1, D, H, W) -> (B, N (+1), C)``: normed tokens, the class token first where there is one.

        ``detail`` ``(B, F, D, H, W)`` is what `look` found already.
        """
        if detail is None:
            detail = self._look_closely(volumes)
        normed: Tensor = self.norm(self._layers(volumes, detail)[-1])
        return normed

    def patches(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, N, C)``: normed patch tokens without the class token."""
        return self.without_cls(self(volumes))

    def without_cls(self, tokens: Tensor) -> Tensor:
        """The patch tokens of ``(B, N (+1), C)``."""
        return tokens if self.cls_token is None else tokens[:, 1:]

    def _look_closely(self, volumes: Tensor) -> Tensor | None:
        found: Tensor | None = None if self.detail is None else self.detail(volumes)
        return found

    def _layers(self, volumes: Tensor, detail: Tensor | None) -> list[Tensor]:
        tokens = self.patch_embedding(volumes)
        if self.detail_embedding is not None and detail is not None:
            tokens = tokens + self.detail_embedding(detail)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        outputs = []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            outputs.append(tokens)
        return outputs
