"""Prompts to tokens: points, boxes, text and an earlier mask become what the decoder attends to.

Part of m3d-lamed; import through `m3d`.
"""

# P = prompts, N = points, T = prompt tokens, C = width, (D, H, W) = voxels, (d, h, w) = token grid

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segvol_head.norms import ChannelNorm
from segvol_head.prompts import NEGATIVE, PADDING, POSITIVE, Prompts
from segvol_head.rows import rows

Coordinates = Literal["published", "grid"]
Sides = tuple[int, int, int]

MASK_LOGIT_LIMIT = 16.0
"""Earlier masks are cut to this: beyond it a sigmoid says nothing new, and empty answers may hold -inf."""


class RandomFourierPosition(nn.Module):
    """Positions in [0, 1]^3 as sines and cosines of fixed random projections (SAM's encoding)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.empty(3, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew."""
        nn.init.normal_(self.positional_encoding_gaussian_matrix)

    def forward(self, position: Tensor) -> Tensor:
        """``(..., 3) -> (..., 2F)``, always computed in float32: the phases run to many turns."""
        with torch.autocast(position.device.type, enabled=False):
            matrix = self.positional_encoding_gaussian_matrix.float()
            phase = 2 * math.pi * ((2 * position.float() - 1) @ matrix)
            return torch.cat([phase.sin(), phase.cos()], dim=-1)


class MaskEmbedding(nn.Module):
    """An earlier mask, as a dense embedding on the token grid."""

    def __init__(self, width: int, grid: Sides, hidden: int = 16) -> None:
        super().__init__()
        self.input_size = tuple(4 * side for side in grid)
        self.layers = nn.Sequential(
            nn.Conv3d(1, hidden // 4, kernel_size=2, stride=2),
            ChannelNorm(hidden // 4),
            nn.GELU(),
            nn.Conv3d(hidden // 4, hidden, kernel_size=2, stride=2),
            ChannelNorm(hidden),
            nn.GELU(),
            nn.Conv3d(hidden, width, kernel_size=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the convolutions are made of."""
        return next(self.parameters()).dtype

    def forward(self, mask: Tensor) -> Tensor:
        """``(P, 1, D, H, W) -> (P, C, d, h, w)``; any D, H, W."""
        logits = mask.float().clamp(-MASK_LOGIT_LIMIT, MASK_LOGIT_LIMIT)
        if tuple(logits.shape[2:]) != self.input_size:
            logits = F.interpolate(logits, size=self.input_size, mode="trilinear", align_corners=False)
        embedded: Tensor = self.layers(logits.to(self.dtype))
        return embedded


class PromptEncoder3D(nn.Module):
    """SegVol's prompt encoder.

    ``coordinates="published"`` keeps a mistake that the released weights have learned to live with: the first two
    axes are swapped in the dense encoding, and points are divided by each other's sides, so that a click and the
    cell under it have different positions. ``"grid"`` is right, for new training. ``mask_prompt`` adds a learned
    path for earlier masks; the released weights never had one.
    """

    def __init__(
        self,
        width: int,
        grid: Sides,
        image_size: Sides,
        *,
        coordinates: Coordinates = "grid",
        mask_prompt: bool = False,
    ) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width} must be even: half of it is sines, half cosines")
        if coordinates not in ("published", "grid"):
            raise ValueError(f"coordinates={coordinates!r} must be 'published' or 'grid'")
        self.width, self.grid, self.image_size, self.coordinates = width, grid, image_size, coordinates
        self.pe_layer = RandomFourierPosition(width // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.no_mask_embed = nn.Embedding(1, width)
        self.mask_embedding = MaskEmbedding(width, grid) if mask_prompt else None

    @property
    def dtype(self) -> torch.dtype:
        """What the tokens are made of."""
        return self.no_mask_embed.weight.dtype

    def dense_position(self) -> Tensor:
        """Where each cell of the token grid is: ``(1, C, d, h, w)``."""
        device = self.no_mask_embed.weight.device
        sides = [(torch.arange(side, device=device) + 0.5) / side for side in self.grid]
        d, h, w = torch.meshgrid(*sides, indexing="ij")
        order = (h, d, w) if self.coordinates == "published" else (d, h, w)
        encoded: Tensor = self.pe_layer(torch.stack(order, dim=-1))
        return encoded.to(self.dtype).movedim(-1, 0)[None]

    def _position(self, voxels: Tensor) -> Tensor:
        d, h, w = self.image_size
        sides = (h, d, w) if self.coordinates == "published" else (d, h, w)
        centre = voxels.float() + 0.5
        encoded: Tensor = self.pe_layer(centre / centre.new_tensor(sides))
        return encoded.to(self.dtype)

    def _kind(self, index: int) -> Tensor:
        """What is added to a position to say what stands there: ``(1, C)``."""
        embedding = self.point_embeddings[index]
        assert isinstance(embedding, nn.Embedding)
        return rows(embedding, self.pe_layer.positional_encoding_gaussian_matrix.device)

    def _embed_points(self, points: Tensor, labels: Tensor, *, pad: bool) -> Tensor:
        position = self._position(points)
        label = labels[..., None]
        zero = position.new_zeros(())
        nowhere = rows(self.not_a_point_embed, points.device)
        tokens = torch.where(label == PADDING, nowhere, position)
        tokens = tokens + torch.where(label == NEGATIVE, self._kind(0), zero)
        tokens = tokens + torch.where(label == POSITIVE, self._kind(1), zero)
        if not pad:
            return tokens
        padding = nowhere.expand(len(points), 1, -1)
        return torch.cat([tokens, padding], dim=1)

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = self._position(rearrange(boxes, "p (corner side) -> p corner side", corner=2))
        return corners + torch.cat([self._kind(2), self._kind(3)])

    def _embed_mask(self, mask: Tensor | None, num_prompts: int) -> Tensor:
        if mask is None:
            nothing = rows(self.no_mask_embed, self.pe_layer.positional_encoding_gaussian_matrix.device)
            return nothing[..., None, None, None].expand(num_prompts, -1, *self.grid)
        if self.mask_embedding is None:
            raise ValueError(
                "this model has not learned to use an earlier mask; "
                "leave out the mask prompt, or train with mask_prompt=True"
            )
        embedded: Tensor = self.mask_embedding(mask)
        return embedded

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Tokens ``(P, T, C)`` in the order points, box, text; and the dense embedding ``(P, C, d, h, w)``."""
        tokens = [self.no_mask_embed.weight.new_empty(len(prompts), 0, self.width)]
        if prompts.points is not None and prompts.point_labels is not None:
            tokens.append(self._embed_points(prompts.points, prompts.point_labels, pad=prompts.boxes is None))
        if prompts.boxes is not None:
            tokens.append(self._embed_boxes(prompts.boxes))
        if prompts.text is not None:
            if prompts.text.shape[-1] != self.width:
                raise ValueError(f"text prompts are {prompts.text.shape[-1]} wide, this decoder needs {self.width}")
            tokens.append(prompts.text[:, None].to(self.dtype))
        return torch.cat(tokens, dim=1), self._embed_mask(prompts.mask, len(prompts))
