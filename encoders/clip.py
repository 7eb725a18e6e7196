"""M3D-CLIP: a ViT and a text tower that agree on which report belongs to which scan.

The towers are given, never built here. The temperature is stored as its logarithm and used exponentiated (CLIP, section
2.5); the released M3D-CLIP multiplied by the logarithm itself, which `raw_scale` reproduces for its weights. Negatives
of other processes are `m3d.train.contrastive`'s business.
"""

# B = pairs, N = volume tokens, T = text tokens, C = tower width, E = shared width

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pooling = Literal["cls", "mean"]
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
LARGEST_SCALE = 100.0


def contrastive_loss(
    volume_features: Tensor, text_features: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE over one batch of unit vectors ``(B, E)``; pair i is the positive of row and column i.

    A bias is the same for all and changes nothing.
    """
    logits = scale * volume_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class VolumeTextCLIP(nn.Module):
    """Two towers, two linear projections and a temperature (M3D-LaMed, section 4.1).

    ``text_tower`` is any module called as ``text_tower(input_ids=..., attention_mask=...)`` that returns an object with
    ``last_hidden_state`` (B, T, C), as transformers' BERT does. A volume or text is its class token, or the mean of its
    patches or words ("cls" as published). ``scale`` is where the factor on similarities starts; ``bias`` is what
    SigLIP adds to them, learned, and None elsewhere. ``raw_scale`` uses the stored scale as the factor itself, as the
    released M3D-CLIP does. ``volume_hidden`` > 0 reads each of a volume's tokens through a layer of that many GELUs
    before they are pooled, for a tower that stands still (ours; a mean of tokens is linear in them).
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        text_tower: nn.Module,
        *,
        vision_width: int,
        text_width: int,
        shared_width: int,
        volume_pooling: Pooling = "cls",
        text_pooling: Pooling = "cls",
        scale: float = 1 / 0.07,
        bias: float | None = None,
        raw_scale: bool = False,
        volume_hidden: int = 0,
    ) -> None:
        super().__init__()
        self.vision_tower, self.text_tower, self.raw_scale = vision_tower, text_tower, raw_scale
        self.volume_pooling, self.text_pooling = volume_pooling, text_pooling
        read = nn.Sequential(nn.Linear(vision_width, volume_hidden), nn.GELU()) if volume_hidden else nn.Identity()
        self.volume_reader = read
        self.vision_projection = nn.Linear(volume_hidden or vision_width, shared_width)
        self.text_projection = nn.Linear(text_width, shared_width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if bias is not None else None

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities: 1 / temperature, at most 100 (CLIP, section 2.5).

        The ceiling holds for the value alone: with a gradient of zero above it, the scale could never come back.
        """
        if self.raw_scale:
            return self.log_scale
        held = self.log_scale.clamp(max=math.log(LARGEST_SCALE))
        return (self.log_scale + (held - self.log_scale).detach()).exp()

    def encode_volumes(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, 1 + N, E)`` unit vectors of all tokens, the class token first."""
        return F.normalize(self.vision_projection(self.volume_reader(self.vision_tower(volumes))), dim=-1)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(B, T) -> (B, T, E)`` unit vectors of all tokens, the class token first."""
        return F.normalize(self.text_projection(self._words(input_ids, attention_mask)), dim=-1)

    def embed_volumes(self, volumes: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, E)``: one unit vector a volume."""
        return self.embed_tokens(self.vision_tower(volumes))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """``(B, N, C) -> (B, E)``: one unit vector for what the vision tower saw of a volume."""
        if self.volume_pooling == "cls":
            return F.normalize(self.vision_projection(self.volume_reader(tokens[:, 0])), dim=-1)
        patches = tokens if getattr(self.vision_tower, "cls_token", None) is None else tokens[:, 1:]
        return F.normalize(self.vision_projection(self.volume_reader(patches).mean(dim=1)), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(B, T) -> (B, E)``: one unit vector a text."""
        words = self._words(input_ids, attention_mask)
        real = attention_mask[..., None].to(words.dtype)
        pooled = words[:, 0] if self.text_pooling == "cls" else (words * real).sum(dim=1) / real.sum(dim=1)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def forward(
        self,
        volumes: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        seen: bool = False,
        loss: PairLoss = contrastive_loss,
        chunk: int = 0,
    ) -> dict[str, Tensor]:
        """The mean loss of these pairs, by name.

        With ``seen``, ``volumes`` are the vision tower's tokens ``(B, N, C)``. ``chunk`` > 0 encodes that many at a
        time, and each chunk again on the way back: the gradient of the whole batch in the memory of a chunk.
        """
        looked = _in_chunks(self.embed_tokens if seen else self.embed_volumes, chunk, volumes)
        read = _in_chunks(self.embed_texts, chunk, input_ids, attention_mask)
        with torch.autocast(looked.device.type, enabled=False):  # bfloat16 cannot tell similarities of 0.01 apart
            bias = None if self.logit_bias is None else self.logit_bias.float()
            return {"contrastive": loss(looked.float(), read.float(), self.scale.float(), bias)}

    def _words(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words: Tensor = self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return words


def _in_chunks(embed: Callable[..., Tensor], chunk: int, *inputs: Tensor) -> Tensor:
    if not 0 < chunk < len(inputs[0]):
        return embed(*inputs)
    pieces = list(zip(*(one.split(chunk) for one in inputs), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([embed(*piece) for piece in pieces])
    return torch.cat([checkpoint(embed, *piece, use_reentrant=False) for piece in pieces])
