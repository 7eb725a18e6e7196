"""M3D-CLIP: a ViT and a text tower whose class tokens agree on which report belongs to which scan.

The towers are given, never built here. The temperature is stored as its logarithm and used exponentiated (CLIP, section
2.5); the released M3D-CLIP multiplied by the logarithm itself, which `raw_scale` reproduces for its weights.
"""

# B = pairs, N = volume tokens, T = text tokens, C = tower width, E = shared width

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def contrastive_loss(volume_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over one batch of unit vectors ``(B, E)``; pair i is the positive of row and column i."""
    logits = scale * volume_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class VolumeTextCLIP(nn.Module):
    """Two towers, two linear projections and a temperature (M3D-LaMed, section 4.1).

    ``text_tower`` is any module called as ``text_tower(input_ids=..., attention_mask=...)`` that returns an object with
    ``last_hidden_state`` (B, T, C), as transformers' BERT does. ``raw_scale`` uses the stored scale as the factor
    itself, as the released M3D-CLIP does.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        text_tower: nn.Module,
        *,
        vision_width: int,
        text_width: int,
        shared_width: int,
        raw_scale: bool = False,
    ) -> None:
        super().__init__()
        self.vision_tower, self.text_tower, self.raw_scale = vision_tower, text_tower, raw_scale
        self.vision_projection = nn.Linear(vision_width, shared_width)
        self.text_projection = nn.Linear(text_width, shared_width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities: 1 / temperature, at most 100 (CLIP, section 2.5)."""
        return self.log_scale if self.raw_scale else self.log_scale.exp().clamp(max=100.0)

    def encode_volumes(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, 1 + N, E)`` unit vectors; index 0 is the volume's."""
        return F.normalize(self.vision_projection(self.vision_tower(volumes)), dim=-1)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(B, T) -> (B, T, E)`` unit vectors; index 0 is the text's."""
        states = self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.text_projection(states), dim=-1)

    def forward(self, volumes: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The pair's losses by name."""
        seen = self.encode_volumes(volumes)[:, 0]
        read = self.encode_texts(input_ids, attention_mask)[:, 0]
        return {"contrastive": contrastive_loss(seen, read, self.scale)}
