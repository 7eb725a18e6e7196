"""Per-voxel features, computed once per volume whatever is asked about it.

SegVol draws at four times the token grid and interpolates from there. Small structures need more: this network sees
the volume at full resolution and knows nothing of prompts, so a prompt costs one dot product with its features.

Part of m3d-lamed; import through `m3d`.
"""

# B = volumes, F = features, D H W = voxels

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8
"""Three halvings: sides are padded to multiples of it."""


class DetailNetwork(nn.Module):
    """A small SegResNet whose ``channels`` outputs are features of every voxel."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        if filters % 8:
            raise ValueError(f"filters={filters} must be divisible by 8, the number of groups of its GroupNorm")
        from monai.networks.nets.segresnet import SegResNet  # here, because importing monai takes seconds

        self.channels = channels
        self.network = SegResNet(
            spatial_dims=3,
            init_filters=filters,
            in_channels=1,
            out_channels=channels,
            blocks_down=(1, 2, 2, 2),
            blocks_up=(1, 1, 1),
        )

    def forward(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, F, D, H, W)``, any D, H, W."""
        d, h, w = volumes.shape[2:]
        after = [amount for side in (w, h, d) for amount in (0, -side % STRIDE)]
        features: Tensor = self.network(F.pad(volumes, after))
        return features[..., :d, :h, :w]


def detail_network(channels: int, filters: int) -> DetailNetwork:
    """Build the detail path: ``filters`` is its width at full resolution, ``channels`` what it hands out."""
    return DetailNetwork(channels, filters)
