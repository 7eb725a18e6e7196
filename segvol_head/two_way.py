"""The two-way transformer: prompts look at the image, and the image looks back.

SAM's decoder (Kirillov et al. 2023, appendix A), attention through ``scaled_dot_product_attention``.
Parameter names are SAM's, so that published weights load.

Part of m3d-lamed; import through `m3d`.
"""

# P = prompts, T = prompt tokens, N = image tokens, C = width

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the outer one."""

    def __init__(self, width: int, num_heads: int, *, downsample: int = 1) -> None:
        super().__init__()
        inner = width // downsample
        if inner % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide the inner width {inner} (width={width} / {downsample})"
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``(P, Nq, C), (P, Nk, C), (P, Nk, C) -> (P, Nq, C)``."""
        q, k, v = (
            rearrange(tokens, "p n (head c) -> p head n c", head=self.num_heads)
            for tokens in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(rearrange(mixed, "p head n c -> p n (head c)"))
        return out


class TokenMlp(nn.Module):
    """The two linear layers between the attentions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(P, T, C) -> (P, T, C)``."""
        out: Tensor = self.lin2(F.relu(self.lin1(tokens)))
        return out


class TwoWayBlock(nn.Module):
    """Prompt self-attention, prompt to image, MLP, image to prompt; each followed by its norm.

    In the first block the self-attention has neither positions nor a residual: so it was published.
    """

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, num_heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, num_heads, downsample=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, mlp_dim)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, num_heads, downsample=2)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """``(P, T, C), (P, N, C)`` and their positions ``-> (P, T, C), (P, N, C)``."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pe
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """A few two-way blocks, and a last look of the prompts at the image."""

    def __init__(self, width: int, *, depth: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, num_heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(width, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """``(P, T, C), (P, N, C), (1, N, C) -> (P, T, C), (P, N, C)``; the tokens are their own positions."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image
