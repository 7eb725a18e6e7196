"""How the layers of the mask head and of the detail network begin: as torch has them, not as Hugging Face does."""

import math

import torch
from torch import nn
from transformers import initialization as init

from encoders.vit3d import ViT3D
from segvol_head import SegVol
from segvol_head.prompt_encoder import RandomFourierPosition

OUTSIDE_LOGIT = -6.0
OWN_INIT, OUTSIDE_BIAS, UNIT_GAIN = "_m3d_own_init", "_m3d_outside_bias", "_m3d_unit_gain"


def keep_own_init(*parts: nn.Module | None) -> None:
    """Mark layers for `init_as_torch_does`: transformers asks about each layer alone, without its place."""
    for layer in (layer for part in parts if part is not None for layer in part.modules()):
        setattr(layer, OWN_INIT, True)


def keep_own_head(head: SegVol, projector: nn.Sequential) -> None:
    """Mark a mask head and the projector of ``[SEG]`` states before it."""
    keep_own_init(projector, head.prompt_encoder, head.mask_decoder, head.detail_hyper, head.detail_align)
    for layer in projector:
        setattr(layer, UNIT_GAIN, True)
    if isinstance(head.image_encoder, ViT3D):
        keep_own_init(head.image_encoder.detail, head.image_encoder.detail_embedding)
    if head.detail_hyper is not None:
        setattr(head.detail_hyper.layers[-1], OUTSIDE_BIAS, True)


def init_as_torch_does(layer: nn.Module) -> None:
    """Embeddings N(0, 1), linear layers and convolutions Kaiming-uniform, as in SAM and MONAI.

    With Hugging Face's 0.02 a chain of three layers hands on a fiftieth of its input, and masks start as a constant.
    The last bias says "outside" to every voxel, for most are (the prior of RetinaNet, section 4.1). The projector of
    ``[SEG]`` states keeps their scale, so that a name is as loud as the head's own tokens and masks part by name early.
    """
    if isinstance(layer, nn.Embedding):
        init.normal_(layer.weight)
    elif isinstance(layer, RandomFourierPosition):
        init.normal_(layer.positional_encoding_gaussian_matrix)
    elif isinstance(layer, nn.Linear | nn.Conv3d | nn.ConvTranspose3d):
        if hasattr(layer, UNIT_GAIN):
            init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if layer.bias is not None:
            outside = torch.zeros_like(layer.bias)
            outside[-1] = OUTSIDE_LOGIT if hasattr(layer, OUTSIDE_BIAS) else 0.0
            init.copy_(layer.bias, outside)
    elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        init.ones_(layer.weight)
        init.zeros_(layer.bias)
