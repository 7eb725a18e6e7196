"""Random pose and contrast that leave the text true: no flips (texts speak of sides), no scaling (they speak of mL)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How much: rotation in degrees about each axis, shift in mm, gain and offset of intensity, noise."""

    rotate_degrees: float = 8.0
    shift_mm: float = 12.0
    gain: float = 0.1
    offset: float = 0.05
    noise: float = 0.02
    probability: float = 0.8

    def __call__(
        self, image: Tensor, labels: Tensor, spacing: tuple[float, float, float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move and recolour one case, ``(D, H, W)`` image in [0, 1] and its labels alike."""
        if float(torch.rand((), generator=generator)) > self.probability:
            return image, labels
        grid = self._grid(image.shape, spacing, generator)
        moved = F.grid_sample(image[None, None], grid, padding_mode="zeros", align_corners=False)[0, 0]
        followed = F.grid_sample(labels[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0]
        gain, offset = ((2 * torch.rand(2, generator=generator) - 1) * torch.tensor([self.gain, self.offset])).tolist()
        noise = self.noise * float(torch.rand((), generator=generator)) * torch.randn(image.shape, generator=generator)
        inside = (moved > 0).float()
        return (moved * (1 + gain) + (offset + noise) * inside).clamp(0, 1), followed.to(labels.dtype)

    def _grid(self, shape: torch.Size, spacing: tuple[float, float, float], generator: torch.Generator) -> Tensor:
        """A rigid motion in mm, written in grid_sample's (x, y, z) units of half the volume."""
        angles = torch.deg2rad((2 * torch.rand(3, generator=generator) - 1) * self.rotate_degrees)
        rotation = torch.eye(3)
        for (a, b), angle in zip(((0, 1), (0, 2), (1, 2)), angles, strict=True):
            turn = torch.eye(3)
            turn[a, a], turn[b, b] = angle.cos(), angle.cos()
            turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
            rotation = rotation @ turn
        half = torch.tensor([side * mm / 2 for side, mm in zip(reversed(shape), reversed(spacing), strict=True)])
        shift = (2 * torch.rand(3, generator=generator) - 1) * self.shift_mm / half
        theta = torch.cat([rotation * half[None] / half[:, None], shift[:, None]], dim=1)
        return F.affine_grid(theta[None], [1, 1, *shape], align_corners=False)
