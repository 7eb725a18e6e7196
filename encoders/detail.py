"""Features of every voxel beside the patch tokens: a convolutional network that the ViT reads too.

Small structures need full resolution, and where only the mask head had this network, the ViT beside it learned nothing.
So it looks first, the ViT reads what it found (as in TransUNet, Chen et al. 2021), and the mask head draws with it: the
language model's tokens and the masks rest on one pair of eyes. Ours, not published.

Part of m3d-lamed; import through `m3d`.
"""

# B = volumes, F = features, C = width of the tokens, (D, H, W) = voxels, (d, h, w) = patches

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

STRIDE = 8
"""Three halvings: sides are padded to multiples of it."""
CELLS = 2
"""A patch is read as the means of this many cells along each side."""


class DetailNetwork(nn.Module):
    """A small SegResNet whose ``channels`` outputs are features of every voxel; ``filters`` is its width there."""

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


class DetailEmbedding(nn.Module):
    """What a ViT reads of the features: how much of what fills each half of a patch.

    The features are mixed voxel by voxel and bent before they are averaged, so that a mean can say "a third of this is
    mandible".
    """

    def __init__(self, channels: int, patch_size: tuple[int, int, int], width: int) -> None:
        super().__init__()
        if any(side % CELLS for side in patch_size):
            raise ValueError(f"every side of patch_size={patch_size} must be even to be read in halves")
        self.cell = [side // CELLS for side in patch_size]
        self.mix = nn.Conv3d(channels, 2 * channels, kernel_size=1)
        self.norm = nn.LayerNorm(2 * channels * CELLS**3)
        self.projection = nn.Linear(2 * channels * CELLS**3, width)

    def forward(self, detail: Tensor) -> Tensor:
        """``(B, F, D, H, W) -> (B, d h w, C)``."""
        p, q, r = self.cell
        cells = reduce(F.gelu(self.mix(detail)), "b f (d p) (h q) (w r) -> b f d h w", "mean", p=p, q=q, r=r)
        patches = rearrange(cells, "b f (d p) (h q) (w r) -> b (d h w) (f p q r)", p=CELLS, q=CELLS, r=CELLS)
        read: Tensor = self.projection(self.norm(patches))
        return read
