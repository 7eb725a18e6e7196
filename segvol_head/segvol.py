"""SegVol: look at a volume once, then draw a mask for every prompt.

Part of m3d-lamed; import through `m3d`.
"""

# B = volumes, N = image tokens, C = width, P = prompts, M = masks, F = detail features, (D, H, W) = voxels

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segvol_head.mask_decoder import LowRes, MaskDecoder3D, Mlp
from segvol_head.prompt_encoder import PromptEncoder3D, Sides
from segvol_head.prompts import Prompts


@dataclass(frozen=True)
class ImageFeatures:
    """What is kept of B volumes: ``tokens (B, C, d, h, w)`` and, where the head draws with it, ``(B, F, D, H, W)``."""

    tokens: Tensor
    detail: Tensor | None = None


class SegVol(nn.Module):
    """Promptable segmentation of volumes; the parts are given, never built here.

    ``image_encoder`` maps ``(B, 1, D, H, W)`` to ``(B, N, C)`` tokens in d-major order; without one, `features`
    takes tokens from a tower that is shared with somebody else. SegVol draws at four times the token grid and
    interpolates from there; small structures need more. With ``detail_channels`` (ours, not published) the encoder
    hands out features of every voxel as well, computed once per volume, and a prompt costs one dot product with them;
    such an encoder has a ``look`` that gives an object with ``tokens`` and ``detail``.
    """

    def __init__(
        self,
        image_encoder: nn.Module | None,
        prompt_encoder: PromptEncoder3D,
        mask_decoder: MaskDecoder3D,
        *,
        image_size: Sides,
        detail_channels: int = 0,
    ) -> None:
        super().__init__()
        if tuple(image_size) != tuple(prompt_encoder.image_size):
            raise ValueError(
                f"image_size={image_size}, but the prompt encoder was built for {prompt_encoder.image_size}"
            )
        self.image_encoder, self.prompt_encoder, self.mask_decoder = image_encoder, prompt_encoder, mask_decoder
        self.image_size = image_size
        self.detail_channels, width = detail_channels, prompt_encoder.width
        self.detail_hyper = Mlp(width, width, width, detail_channels + 1) if detail_channels else None
        self.detail_align = nn.Linear(width, detail_channels) if detail_channels else None

    def init_weights(self) -> None:
        """Draw the head's weights anew, as SAM does; the image encoder has its own way."""
        for part in (self.prompt_encoder, self.mask_decoder, self.detail_hyper, self.detail_align):
            for module in part.modules() if part is not None else ():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()

    def encode(self, volumes: Tensor) -> ImageFeatures:
        """Look at volumes, once: ``(B, 1, D, H, W)``."""
        self._check_volumes(volumes)
        if self.image_encoder is None:
            raise ValueError("this SegVol has no image encoder of its own; give its shared tokens to `features`")
        if not self.detail_channels:
            return self.features(self.image_encoder(volumes))
        look: Any = self.image_encoder.look
        seen = look(volumes)
        return self.features(seen.tokens, seen.detail)

    def features(self, tokens: Tensor, detail: Tensor | None = None) -> ImageFeatures:
        """Features from patch tokens ``(B, N, C)`` of any tower and, where the head draws with it, its detail."""
        d, h, w = self.prompt_encoder.grid
        expected = (d * h * w, self.prompt_encoder.width)
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"image tokens must be (B, {expected[0]}, {expected[1]}) for the grid {(d, h, w)}, "
                f"got {tuple(tokens.shape)}; was a class token left in?"
            )
        grid = rearrange(tokens, "b (d h w) c -> b c d h w", d=d, h=h, w=w)
        if not self.detail_channels:
            return ImageFeatures(grid)
        voxels = (len(tokens), self.detail_channels, *self.image_size)
        if detail is None or tuple(detail.shape) != voxels:
            got = "none" if detail is None else tuple(detail.shape)
            raise ValueError(f"this SegVol draws with features of every voxel, {voxels}; got {got}")
        return ImageFeatures(grid, detail)

    def low_res(
        self, features: ImageFeatures, prompts: Prompts, image_index: Tensor | None = None, *, all_masks: bool = False
    ) -> LowRes:
        """Masks at four times the token grid ``(P, M, 4d, 4h, 4w)``, and the tokens that drew them."""
        index = _image_index(image_index, len(features.tokens), prompts, features.tokens.device)
        sparse, dense = self.prompt_encoder(prompts)
        image = features.tokens[index] + dense
        position = self.prompt_encoder.dense_position()
        drawn: LowRes = self.mask_decoder(image, position, sparse, text=prompts.text, all_masks=all_masks)
        return drawn

    def decode(
        self, features: ImageFeatures, prompts: Prompts, image_index: Tensor | None = None, *, all_masks: bool = False
    ) -> Tensor:
        """Mask logits ``(P, 1, D, H, W)`` in float32; prompt p belongs to volume ``image_index[p]``.

        The index may be left out for one volume, or when there is one prompt for each.
        """
        index = _image_index(image_index, len(features.tokens), prompts, features.tokens.device)
        if len(prompts) == 0:
            drawn = self.mask_decoder.num_masks if all_masks else 1
            return features.tokens.new_zeros((0, drawn, *self.image_size), dtype=torch.float32)
        low_res = self.low_res(features, prompts, index, all_masks=all_masks)
        logits = F.interpolate(low_res.masks.float(), size=self.image_size, mode="trilinear", align_corners=False)
        if self.detail_hyper is None:
            return logits
        if features.detail is None:
            raise ValueError("this SegVol draws with features of every voxel, these have none; make them with `encode`")
        pens: Tensor = self.detail_hyper(low_res.mask_tokens)
        weights, bias = pens[..., :-1], pens[..., -1]
        if self.detail_align is not None and prompts.text is not None:  # the decoder's text alignment, for detail
            weights = weights + self.detail_align(prompts.text.to(weights.dtype))[:, None]
        return logits + _draw_detail(weights, features.detail, index) + bias[..., None, None, None].float()

    def _check_volumes(self, volumes: Tensor) -> None:
        if volumes.ndim != 5 or tuple(volumes.shape[1:]) != (1, *self.image_size):
            raise ValueError(
                f"volumes must be (B, 1, {', '.join(map(str, self.image_size))}), got {tuple(volumes.shape)}"
            )


def _draw_detail(weights: Tensor, detail: Tensor, index: Tensor) -> Tensor:
    """``(P, M, F)`` pens on ``(B, F, D, H, W)`` -> ``(P, M, D, H, W)``; no copy of a volume for each of its prompts.

    In float32 under autocast too. In bfloat16 torch 2.13 divides by zero on a CPU, in the gradient of 4 masks of
    393,216 voxels and 16 features on one thread, which ends the process.
    """
    owners = index.tolist()
    order = [p for b in range(len(detail)) for p, owner in enumerate(owners) if owner == b]
    with torch.autocast(detail.device.type, enabled=False):
        strokes = [
            torch.einsum("pmf,fdhw->pmdhw", weights[index == b].float(), detail[b].float())
            for b in range(len(detail))
            if b in owners
        ]
    back = sorted(range(len(order)), key=order.__getitem__)
    drawn = torch.cat(strokes) if len(strokes) > 1 else strokes[0]
    return drawn if back == list(range(len(back))) else drawn[back]


def _image_index(index: Tensor | None, num_images: int, prompts: Prompts, device: torch.device) -> Tensor:
    num_prompts = len(prompts)
    if index is None:
        if num_images == 1:
            return torch.zeros(num_prompts, dtype=torch.long, device=device)
        if num_images == num_prompts:
            return torch.arange(num_prompts, device=device)
        raise ValueError(f"{num_prompts} prompts for {num_images} volumes: image_index must say which is whose")
    if index.shape != (num_prompts,):
        raise ValueError(f"image_index must be ({num_prompts},), one volume per prompt, got {tuple(index.shape)}")
    if num_prompts and not 0 <= int(index.min()) <= int(index.max()) < num_images:
        raise ValueError(f"image_index {index.tolist()} points outside the {num_images} volumes")
    return index.to(device=device, dtype=torch.long)
