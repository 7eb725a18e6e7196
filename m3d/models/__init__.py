"""Where config meets modules: the model, its config, processor and pipeline, registered with transformers."""

from m3d.models.config import M3DConfig, M3DSegConfig, M3DVisionConfig
from m3d.models.modeling import M3DForConditionalGeneration, M3DOutput, M3DVolumeFeatures
from m3d.models.pipeline import VolumeTextToTextPipeline
from m3d.models.processing import M3DProcessor

__all__ = [
    "M3DConfig",
    "M3DForConditionalGeneration",
    "M3DOutput",
    "M3DProcessor",
    "M3DSegConfig",
    "M3DVisionConfig",
    "M3DVolumeFeatures",
    "VolumeTextToTextPipeline",
]
