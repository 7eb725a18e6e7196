"""The M3D-CLIP pair as a checkpoint: its config, how it is built from it, and its folder.

The folder holds ``config.json``, ``model.safetensors``, the text tower's tokenizer and ``preprocess.json``. The vision
tower's weights are named ``vision_tower.*``, as in `M3DForConditionalGeneration`, so later stages read them from here.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import SubConfigSpec

from data_prep.preprocess import Preprocess
from encoders import VolumeTextCLIP
from encoders.clip import Pooling
from m3d.models.config import M3DVisionConfig
from m3d.models.modeling import build_vision_tower
from m3d.models.weights import put, read_weights, write_weights

VISION, TEXT = "vision_tower.", "text_tower."


class M3DCLIPConfig(PreTrainedConfig):
    """Two towers and what joins them; the defaults are the published M3D-CLIP's (its ``raw_scale`` is True)."""

    model_type = "m3d_clip"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=M3DVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    shared_width: int = 768
    volume_pooling: Pooling = "cls"
    text_pooling: Pooling = "cls"
    learned_bias: bool = False
    raw_scale: bool = False
    volume_hidden: int = 0

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Take copies of the sub-configs.

        transformers sets ``_attn_implementation`` of sub-configs anew, to None. On an object shared with a living tower
        that would switch the tower's attention mask off, and padding would be read as words.
        """
        self.vision_config, self.text_config = copy.deepcopy(self.vision_config), copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def vision(self) -> M3DVisionConfig:
        """``vision_config``, by its type."""
        assert isinstance(self.vision_config, M3DVisionConfig)
        return self.vision_config

    @property
    def text(self) -> PreTrainedConfig:
        """``text_config``, by its type."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config


@dataclass(frozen=True, eq=False)
class Pair:
    """A pair as it is used: the model, and what prepares words and scans for it."""

    model: VolumeTextCLIP
    config: M3DCLIPConfig
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess


def build_pair(
    config: M3DCLIPConfig, text_tower: nn.Module, *, scale: float = 1 / 0.07, bias: float = 0.0
) -> VolumeTextCLIP:
    """The pair that ``config`` describes around a text tower; ``bias`` matters where it is learned."""
    if config.volume_pooling == "cls" and not config.vision.cls_token:
        raise ValueError("volume_pooling='cls' needs a vision tower with cls_token; take 'mean'")
    return VolumeTextCLIP(
        build_vision_tower(config.vision),
        text_tower,
        vision_width=config.vision.hidden_size,
        text_width=config.text.hidden_size,
        shared_width=config.shared_width,
        volume_pooling=config.volume_pooling,
        text_pooling=config.text_pooling,
        scale=scale,
        bias=bias if config.learned_bias else None,
        raw_scale=config.raw_scale,
        volume_hidden=config.volume_hidden,
    )


def save_pair(folder: Path, pair: Pair) -> None:
    """Write a pair's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(_plain_state(pair.model), folder)
    pair.config.save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    pair.preprocess.write(folder)


def load_pair(folder: Path | str) -> Pair:
    """Read a folder that `save_pair` wrote.

    Raises:
        FileNotFoundError: It is no such folder.
        ValueError: Its weights are not those of its config.
    """
    folder = Path(folder)
    if _fields(folder).get("model_type") != M3DCLIPConfig.model_type:
        raise FileNotFoundError(f"{folder} is no M3D-CLIP folder; `m3d train` with a pretrain_clip config makes one")
    config = M3DCLIPConfig.from_pretrained(folder)
    model = build_pair(config, without_pooler(AutoModel.from_config(config.text)))
    put(model, read_weights(folder), str(folder))
    return Pair(model.eval(), config, AutoTokenizer.from_pretrained(folder), Preprocess.read(folder))


def vision_tower_of(folder: Path | str) -> tuple[M3DVisionConfig, dict[str, Tensor]]:
    """The vision tower of an M3D or M3D-CLIP folder: its config, and its weights by the tower's own names.

    Raises:
        FileNotFoundError: The folder has no config, or no ``vision_tower.*`` weights in safetensors.
    """
    folder = Path(folder)
    fields = _fields(folder).get("vision_config")
    if fields is None:
        raise FileNotFoundError(f"{folder}: no config.json with a vision_config; init takes an M3D or M3D-CLIP folder")
    state = read_weights(folder, VISION)
    if not state:
        raise FileNotFoundError(
            f"{folder}: none of its weights is named {VISION}*; init takes an M3D or M3D-CLIP folder"
        )
    return M3DVisionConfig.from_dict(fields), state


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Take BERT's pooler away: nothing uses it, and DDP waits in vain for gradients of what is not used."""
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)
    return model


def _plain_state(model: VolumeTextCLIP) -> dict[str, Tensor]:
    """The weights as they are saved: on the CPU, LoRA merged into a copy of the text tower."""
    state = model.state_dict()
    if isinstance(model.text_tower, PeftModel):
        merged: nn.Module = copy.deepcopy(model.text_tower).merge_and_unload()
        state = {name: one for name, one in state.items() if not name.startswith(TEXT)}
        state |= {f"{TEXT}{name}": one for name, one in merged.state_dict().items()}
    for name in {"log_scale", "logit_bias"} & state.keys():
        state[name] = state[name].reshape(())  # training gives them a dimension
    return {name: one.detach().cpu() for name, one in state.items()}


def _fields(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says; nothing where there is none."""
    path = folder / "config.json"
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return fields


AutoConfig.register("m3d_clip", M3DCLIPConfig)
