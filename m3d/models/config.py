"""M3DConfig: everything a checkpoint's `config.json` says about the model, checked when it is built.

Defaults are the published M3D-LaMed (paper, section 4; DESIGN 4). Sub-configs: ``vision_config`` (the 3D ViT),
``text_config`` (any Hugging Face causal LM) and ``seg_config`` (the SegVol head, or None for a model that only talks).
"""

import math
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

POOLING = ("spatial", "stacked", "sequence")
PROJECTORS = ("mlp", "linear")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")


class M3DVisionConfig(PreTrainedConfig):
    """A 3D ViT: sizes are (D, H, W) in voxels of the prepared grid.

    ``detail_channels`` > 0 adds features of every voxel, which the patches read and the mask head draws with; the
    network that makes them is ``detail_filters`` wide (`encoders.detail`). Published weights have none.
    """

    model_type = "m3d_vision"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] | None = None
    patch_size: list[int] | tuple[int, ...] | None = None
    in_channels: int = 1
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    cls_token: bool = True
    detail_channels: int = 0
    detail_filters: int = 8

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Fill in the published sizes and refuse those that cannot be."""
        self.image_size = list(self.image_size or (32, 256, 256))
        self.patch_size = list(self.patch_size or (4, 16, 16))
        if len(self.image_size) != 3 or len(self.patch_size) != 3:
            raise ValueError(f"image_size={self.image_size} and patch_size={self.patch_size} need three sides each")
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"every side of patch_size={self.patch_size} must divide image_size={self.image_size}")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along D, H, W."""
        assert self.image_size is not None and self.patch_size is not None
        d, h, w = (side // patch for side, patch in zip(self.image_size, self.patch_size, strict=True))
        return d, h, w


class M3DSegConfig(PreTrainedConfig):
    """The SegVol head. The defaults load the published weights; the notes say what ours does otherwise.

    ``encoder_config`` is the head's own ViT, or None to share the vision tower's tokens (one pass a volume).
    ``coordinates="published"`` keeps the reference's swapped axes for its weights; ``grid`` is right, for new training.
    ``upscale_norm="volume"`` is the published LayerNorm over channels and space; ``channel`` fits any grid.
    ``mask_prompt`` adds the previous-mask prompt, which the published weights never learned.
    Where the encoder that it looks through has detail, the head draws with it.
    ``vocabulary`` are the names of the structures that it has learned to draw.
    """

    model_type = "m3d_seg"
    base_config_key = "seg_config"
    sub_configs_defaults: ClassVar = {"encoder_config": SubConfigSpec(config_class=M3DVisionConfig, optional=True)}

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_hidden_size: int = 256
    num_masks: int = 4
    coordinates: Literal["published", "grid"] = "published"
    upscale_norm: Literal["volume", "channel"] = "volume"
    mask_prompt: bool = False
    projector_dropout: float = 0.1
    merge: Literal["each", "mean"] = "each"
    vocabulary: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse unknown switches."""
        _one_of("coordinates", self.coordinates, ("published", "grid"))
        _one_of("upscale_norm", self.upscale_norm, ("volume", "channel"))
        _one_of("merge", self.merge, ("each", "mean"))
        self.vocabulary = list(self.vocabulary or [])
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def encoder(self) -> M3DVisionConfig | None:
        """``encoder_config``, by its type; None where the vision tower is shared."""
        return self.encoder_config if isinstance(self.encoder_config, M3DVisionConfig) else None


class M3DConfig(PreTrainedConfig):
    """A vision tower, a perceiver, a language model and, where it draws, a SegVol head.

    ``image_token_id`` marks where volumes stand in a prompt, ``seg_token_id`` where a mask is drawn; both are rows that
    `M3DProcessor` adds to the language model's vocabulary, with ``box_start_token_id`` and ``box_end_token_id``. With
    ``box_head`` the state at ``<bx_start>`` gives the box in numbers (m3d/models/box_head.py); no published one does.
    """

    model_type = "m3d"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=M3DVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "seg_config": SubConfigSpec(config_class=M3DSegConfig, optional=True),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    seg_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 32000
    box_start_token_id: int = 32001
    box_end_token_id: int = 32002
    seg_token_id: int = 32003
    pooling: str = "spatial"
    pool_size: int = 2
    projector: str = "mlp"
    projector_depth: int = 2
    box_head: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Check what belongs together before anything is built."""
        _one_of("pooling", self.pooling, POOLING)
        _one_of("projector", self.projector, PROJECTORS)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        grid = self.vision.grid
        if self.pooling != "sequence" and any(side % self.pool_size for side in grid):
            raise ValueError(f"pool_size={self.pool_size} must divide every side of the patch grid {grid}")

    @property
    def vision(self) -> M3DVisionConfig:
        """``vision_config``, by its type."""
        if not isinstance(self.vision_config, M3DVisionConfig):
            raise ValueError(f"vision_config must be an M3DVisionConfig, got {type(self.vision_config).__name__}")
        return self.vision_config

    @property
    def text(self) -> PreTrainedConfig:
        """``text_config``, by its type."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config

    @property
    def seg(self) -> M3DSegConfig | None:
        """``seg_config``, by its type; None for a model that only talks."""
        return self.seg_config if isinstance(self.seg_config, M3DSegConfig) else None

    @property
    def num_image_tokens(self) -> int:
        """How many language tokens a volume becomes: 256 as published."""
        return math.prod(self.vision.grid) // self.pool_size**3
