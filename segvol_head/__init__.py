"""What draws: SegVol's prompt encoder, two-way decoder, losses and zoom-out-zoom-in inference.

Part of m3d-lamed; import through `m3d`.
"""

from segvol_head.losses import bce_loss, dice_loss
from segvol_head.mask_decoder import LowRes, MaskDecoder3D
from segvol_head.prompt_encoder import PromptEncoder3D
from segvol_head.prompts import Prompts
from segvol_head.segvol import ImageFeatures, SegVol

__all__ = ["ImageFeatures", "LowRes", "MaskDecoder3D", "PromptEncoder3D", "Prompts", "SegVol", "bce_loss", "dice_loss"]
