"""What sees and what reads: the 3D ViT, the text tower's place, the CLIP pair.

Part of m3d-lamed; import through `m3d`.
"""

from encoders.clip import VolumeTextCLIP, contrastive_loss
from encoders.vit3d import ViT3D

__all__ = ["ViT3D", "VolumeTextCLIP", "contrastive_loss"]
