"""Layer normalisation for feature maps.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of every voxel: ``(B, C, D, H, W)``, whatever the grid."""

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, D, H, W) -> (B, C, D, H, W)``."""
        last = rearrange(features, "b c d h w -> b d h w c")
        return rearrange(super().forward(last), "b d h w c -> b c d h w")
