"""The mask head with what it sees through, alone: what `pretrain_segvol` trains before any language model listens.

The folder holds ``config.json``, ``model.safetensors`` and ``preprocess.json``. Weights are named ``vision_tower.*``,
``seg_head.*`` and ``seg_projector.*`` as in `M3DForConditionalGeneration`, so later stages read them from here.
"""

# V = volumes, M = masks, E = width of name vectors, C = width of the head

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from encoders.vit3d import ViT3D
from m3d.models.config import M3DConfig, M3DSegConfig, M3DVisionConfig
from m3d.models.modeling import M3DForConditionalGeneration
from m3d.models.weights import put, read_weights
from segvol_head import ImageFeatures, Prompts, SegVol

TextSource = Literal["language", "clip"]
HANDED_OVER = ("vision_tower", "seg_head", "seg_projector")


class M3DSegVolConfig(PreTrainedConfig):
    """A tower, a head, and ``text_width``, the width of the vectors that stand for names.

    ``text_source="language"`` says that they are a language model's states, as ``[SEG]`` will be, so that
    ``seg_projector`` is of use to later stages; ``clip`` that they are a text tower's. ``text_projector="linear"`` is
    the released SegVol's, one linear layer from its text tower; ours has two, as ``[SEG]`` states do.
    """

    model_type = "m3d_segvol"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=M3DVisionConfig),
        "seg_config": SubConfigSpec(config_class=M3DSegConfig),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    seg_config: dict[str, Any] | PreTrainedConfig | None = None
    text_width: int = 4096
    text_source: TextSource = "language"
    text_projector: Literal["mlp", "linear"] = "mlp"

    @classmethod
    def of(cls, folder: Path) -> "M3DSegVolConfig":
        """That of a folder of pretrain_segvol, or of a whole model's folder, whose tower and head are meant.

        Raises:
            ValueError: The whole model has no head.
        """
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not isinstance(config, M3DConfig):
            found: M3DSegVolConfig = cls.from_pretrained(folder)
            return found
        return cls.within(config, str(folder))

    @classmethod
    def within(cls, config: M3DConfig, where: str) -> "M3DSegVolConfig":
        """That of a whole model's tower and head.

        Raises:
            ValueError: It has no head.
        """
        if config.seg is None:
            raise ValueError(f"{where} has no mask head (its seg_config is null); init.segvol needs one that draws")
        return cls(vision_config=config.vision, seg_config=config.seg, text_width=config.text.hidden_size)

    @property
    def vision(self) -> M3DVisionConfig:
        """``vision_config``, by its type."""
        assert isinstance(self.vision_config, M3DVisionConfig)
        return self.vision_config

    @property
    def seg(self) -> M3DSegConfig:
        """``seg_config``, by its type."""
        assert isinstance(self.seg_config, M3DSegConfig)
        return self.seg_config


class PromptedSegVol(nn.Module):
    """It draws what points, boxes, earlier masks and vectors of names ask for; the parts are those of the whole model.

    ``vision_tower`` is None where the head has an encoder of its own.
    """

    def __init__(self, config: M3DSegVolConfig) -> None:
        super().__init__()
        self.config = config
        whole = M3DForConditionalGeneration(_around(config))
        assert whole.seg_head is not None and whole.seg_projector is not None
        self.vision_tower = whole.vision_tower if config.seg.encoder is None else None
        self.seg_head: SegVol = whole.seg_head
        self.seg_projector: nn.Module = whole.seg_projector
        if config.text_projector == "linear":
            self.seg_projector = nn.Linear(config.text_width, self.seg_head.prompt_encoder.width)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return next(self.seg_projector.parameters()).dtype

    @property
    def tower(self) -> ViT3D:
        """What it looks through: the shared tower, or the head's own encoder."""
        tower = self.seg_head.image_encoder if self.vision_tower is None else self.vision_tower
        assert isinstance(tower, ViT3D)
        return tower

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """The patch tokens that the head looks at: ``(V, 1, D, H, W) -> (V, N, C)``."""
        return self.tower.patches(pixel_values.to(self.dtype))

    def look(self, pixel_values: Tensor) -> ImageFeatures:
        """Look at volumes, once for all that is asked about them."""
        seen = self.tower.look(pixel_values.to(self.dtype))
        return self.seg_head.features(self.tower.without_cls(seen.tokens), seen.detail)

    def draw(
        self,
        features: ImageFeatures,
        volume_index: Tensor,
        *,
        names: Tensor | None = None,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Draw M masks from vectors of names ``(M, E)``, geometric ``prompts``, or both: ``(M, 1, D, H, W)`` logits."""
        if names is not None:
            text: Tensor = self.seg_projector(names.to(self.dtype))
            prompts = Prompts(text=text) if prompts is None else replace(prompts, text=text)
        if prompts is None:
            raise ValueError("nothing says what to draw: give names, points, a box or a mask")
        logits: Tensor = self.seg_head.decode(features, prompts, volume_index)
        return logits


def load_segvol(folder: Path) -> PromptedSegVol:
    """Read a head's folder.

    Raises:
        ValueError: Its weights are not those of its config.
    """
    model = PromptedSegVol(M3DSegVolConfig.from_pretrained(folder))
    put(model, read_weights(folder), str(folder))
    return model.eval()


def _around(config: M3DSegVolConfig) -> M3DConfig:
    """A whole model's config with a language model of next to nothing: its parts are built and initialised there."""
    text = LlamaConfig(
        vocab_size=8,
        hidden_size=config.text_width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return M3DConfig(
        vision_config=config.vision,
        text_config=text,
        seg_config=config.seg,
        pool_size=1,
        projector="linear",
        projector_depth=1,
    )


AutoConfig.register("m3d_segvol", M3DSegVolConfig)
