"""What of a model the released code cannot read, setting by setting, and which sizes would need that code changed.

The released classes read some settings from ``config.json`` and have the others written into their code; what they have
no code for at all is a refusal, a size that is written there only a note.
"""

from collections.abc import Iterator
from typing import Any

from m3d.models.clip import M3DCLIPConfig
from m3d.models.config import M3DConfig, M3DSegConfig, M3DVisionConfig

LANGUAGE_MODELS = {"llama": "LamedLlamaForCausalLM", "phi3": "LamedPhi3ForCausalLM"}
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DECODER = {"decoder_depth": 2, "decoder_heads": 8, "decoder_mlp_dim": 2048, "iou_hidden_size": 256}


def lamed_refusals(config: M3DConfig) -> list[str]:
    """Settings of a whole model that LaMed has no code for."""
    found = []
    if config.text.model_type not in LANGUAGE_MODELS:
        known = " and ".join(LANGUAGE_MODELS)
        found.append(f"text_config.model_type={config.text.model_type!r} (it has classes for {known})")
    if config.box_head:
        found.append("box_head=true (it says boxes in digits alone)")
    if config.pooling == "stacked":
        found.append("pooling='stacked' (it averages: 'spatial' or 'sequence')")
    found += _tower_refusals("vision_config", config.vision, cls_token=True)
    if config.seg is not None:
        found += head_refusals(config.seg)
        encoder = config.seg.encoder
        if encoder is not None and _frame(encoder) != _frame(config.vision):
            found.append("seg_config.encoder_config (it builds both towers for one image_size, patch_size and width)")
    return found


def head_refusals(seg: M3DSegConfig) -> list[str]:
    """Settings of a mask head that SegVol has no code for."""
    found = []
    if seg.encoder is None:
        found.append("seg_config.encoder_config=null (its head shares no tower)")
    else:
        found += _tower_refusals("seg_config.encoder_config", seg.encoder, cls_token=False)
    if seg.coordinates != "published":
        found.append(f"seg_config.coordinates={seg.coordinates!r} (its axes are swapped: 'published')")
    if seg.upscale_norm != "volume":
        found.append(f"seg_config.upscale_norm={seg.upscale_norm!r} (its norm is over channels and space: 'volume')")
    if seg.mask_prompt:
        found.append("seg_config.mask_prompt=true (it takes no earlier mask)")
    if seg.num_masks != 4:
        found.append(f"seg_config.num_masks={seg.num_masks} (it has 4)")
    return found


def clip_refusals(config: M3DCLIPConfig) -> list[str]:
    """Settings of a CLIP pair that M3D-CLIP has no code for."""
    found = [*_tower_refusals("vision_config", config.vision, cls_token=True)]
    if config.text.model_type != "bert":
        found.append(f"text_config.model_type={config.text.model_type!r} (its text tower is BERT)")
    found += [
        f"{name}={getattr(config, name)!r} (it takes the class token)"
        for name in ("volume_pooling", "text_pooling")
        if getattr(config, name) != "cls"
    ]
    if config.learned_bias:
        found.append("learned_bias=true (it adds nothing to similarities)")
    if config.volume_hidden:
        found.append(f"volume_hidden={config.volume_hidden} (it projects the tower's tokens as they are)")
    if len({config.vision.hidden_size, config.text.hidden_size, config.shared_width}) > 1:
        found.append("widths of the two towers and shared_width differ (it has one for all)")
    return found


def size_notes(config: M3DConfig | M3DSegConfig) -> list[str]:
    """Sizes that the released code has written into it, where these are others."""
    if isinstance(config, M3DSegConfig):
        return [*_sizes("seg_config", config, DECODER), *_sizes("seg_config.encoder_config", config.encoder, TOWER)]
    found = list(_sizes("vision_config", config.vision, TOWER))
    return found + (size_notes(config.seg) if config.seg is not None else [])


def refuse(what: str, found: list[str]) -> None:
    """Stop with all that the released code cannot read.

    Raises:
        ValueError: There is something.
    """
    if found:
        raise ValueError(f"the released {what} code cannot read this model: {'; '.join(found)}")


def _tower_refusals(where: str, tower: M3DVisionConfig, *, cls_token: bool) -> Iterator[str]:
    if tower.detail_channels:
        yield f"{where}.detail_channels={tower.detail_channels} (its towers have no detail path)"
    if tower.cls_token != cls_token:
        yield f"{where}.cls_token={str(tower.cls_token).lower()} (that tower has {'one' if cls_token else 'none'})"


def _frame(tower: M3DVisionConfig) -> tuple[Any, ...]:
    return tower.image_size, tower.patch_size, tower.hidden_size


def _sizes(where: str, config: object, fixed: dict[str, int]) -> Iterator[str]:
    for name, size in fixed.items():
        if config is not None and getattr(config, name) != size:
            yield f"{where}.{name}={getattr(config, name)}, there {size}"
