"""Folders that the released code of M3D-LaMed, M3D-CLIP and SegVol reads: names, shapes and settings are theirs.

Weights are safetensors, tensor by tensor the same bits. What the released code has no place for is an error that names
the setting; what it makes but never runs is written as zeros, for it loads strictly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from m3d.convert.run import UNUSED
from m3d.export.folders import Written, copy_files, mark, stream_weights, weight_names, whole_folder, write_json
from m3d.export.names import DEAD_MASKS, dead_masks, dead_pooler, to_clip, to_lamed, to_segvol
from m3d.export.unlike import LANGUAGE_MODELS, clip_refusals, head_refusals, lamed_refusals, refuse, size_notes
from m3d.models.clip import M3DCLIPConfig
from m3d.models.config import M3DConfig, M3DSegConfig
from m3d.models.segvol import M3DSegVolConfig

ALONG = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "preprocess.json"),
)
"""What goes along unchanged; the released code reads the tokenizer, and whoever prepares scans `preprocess.json`."""
OURS_ALONE = ("architectures", "model_type", "_name_or_path", "transformers_version", "dtype", "rope_parameters")


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, how many tensors, and what a reader of it should know."""

    folder: Path
    tensors: int
    notes: tuple[str, ...]


def export_lamed(source: Path, folder: Path, *, force: bool = False) -> Exported:
    """A whole model as ``LamedLlamaForCausalLM`` or ``LamedPhi3ForCausalLM`` keeps it.

    Raises:
        ValueError: It has parts or settings that LaMed has no code for; the message names them all.
    """
    config: Any = AutoConfig.from_pretrained(source, local_files_only=True)
    if not isinstance(config, M3DConfig):
        raise ValueError(f"{source.name} holds a {config.model_type!r} model; LaMed is a whole one that speaks")
    refuse("LaMed", lamed_refusals(config))
    notes = _size_notes("LaMed", size_notes(config))
    if config.seg is not None and config.seg.merge == "each":
        notes.append(
            "several [SEG] in one answer draw one mask there, of the mean of their states; here each draws one"
        )
    width = config.vision.hidden_size
    more = {} if config.seg is None else _unused(dead_masks("model.seg_module.", width), source)
    names = to_lamed(weight_names(source))
    with whole_folder(folder, force=force) as partial:
        written = stream_weights(source, partial, names, more=more)
        write_json(partial / "config.json", lamed_fields(config, _dtype_of(source)))
        return _finish("lamed", source, folder, partial, written, notes + _dead_notes(more))


def export_clip(source: Path, folder: Path, *, force: bool = False) -> Exported:
    """A CLIP pair as ``M3DCLIP`` keeps it; its scale is the factor itself there, and is written so.

    Raises:
        ValueError: It has parts or settings that M3D-CLIP has no code for; the message names them all.
    """
    config = M3DCLIPConfig.from_pretrained(source)
    refuse("M3D-CLIP", clip_refusals(config))
    pooler = "language_encoder.pooler.dense."
    names = to_clip(weight_names(source))
    has_pooler = f"{pooler}weight" in names.values()
    more = {} if has_pooler else _unused(dead_pooler(pooler, config.text.hidden_size), source)

    def factor(name: str, tensor: Tensor) -> Tensor:
        return tensor if config.raw_scale or name != "log_scale" else tensor.exp()

    with whole_folder(folder, force=force) as partial:
        written = stream_weights(source, partial, names, more=more, change=factor)
        write_json(partial / "config.json", clip_fields(config))
        notes = [
            *_dead_notes(more),
            "M3DCLIP builds its text tower from a BERT folder: set language_model_name_or_path",
        ]
        return _finish("m3d-clip", source, folder, partial, written, notes)


def export_segvol(source: Path, folder: Path, *, force: bool = False) -> Exported:
    """The mask head with its own encoder as SegVol's released file names it; CLIP's text tower is none of ours.

    Raises:
        ValueError: It has parts or settings that SegVol has no code for; the message names them all.
    """
    seg = _head_of(source)
    refuse("SegVol", head_refusals(seg))
    assert seg.encoder is not None
    names = to_segvol(name for name in weight_names(source) if name.startswith("seg_head."))
    more = _unused(dead_masks("model.", seg.encoder.hidden_size), source)
    notes = [
        *_size_notes("SegVol", size_notes(seg)),
        *_dead_notes(more),
        "without the CLIP text tower (model.text_encoder.*), which LaMed's loader skips; SegVol alone wants its own",
    ]
    with whole_folder(folder, force=force) as partial:
        written = stream_weights(source, partial, names, more=more)
        return _finish("segvol", source, folder, partial, written, notes)


def lamed_fields(config: M3DConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` by LaMed's names (REFERENCE A1.3), the language model's own fields as transformers 4 has them."""
    text, vision, seg = config.text, config.vision, config.seg
    kind = str(text.model_type)
    fields = {name: value for name, value in text.to_dict().items() if name not in OURS_ALONE}
    return {
        "architectures": [LANGUAGE_MODELS[kind]],
        "model_type": f"lamed_{kind}",
        **fields,
        **_legacy_rope(text.to_dict()),
        "torch_dtype": dtype,
        "vision_tower": "vit3d",
        "image_channel": vision.in_channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_select_layer": -1,
        "vision_select_feature": "patch",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "spp",
        "proj_layer_type": config.projector,
        "proj_layer_num": config.projector_depth,
        "proj_pooling_type": config.pooling,
        "proj_pooling_size": config.pool_size,
        "segmentation_module": None if seg is None else "segvol",
        "seg_token_id": config.seg_token_id,
    }


def clip_fields(config: M3DCLIPConfig) -> dict[str, Any]:
    """``config.json`` by M3D-CLIP's names (its released configuration class)."""
    vision = config.vision
    return {
        "architectures": ["M3DCLIP"],
        "model_type": "m3d_clip",
        "language_model_name_or_path": "",
        "in_channels": vision.in_channels,
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "mlp_dim": vision.intermediate_size,
        "num_layers": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "pos_embed": "perceptron",
        "dropout_rate": 0,
        "spatial_dims": 3,
        "max_text_len": 128,  # that class's default, which it does not read
        "vocab_size": config.text.vocab_size,
        "gather_loss": True,
        "local_loss": False,
    }


def _legacy_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 5 keeps in one."""
    rope = dict(text.get("rope_parameters") or {})
    if not rope:
        return {}
    theta = rope.pop("rope_theta", None)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return ({} if theta is None else {"rope_theta": theta}) | {"rope_scaling": scaling}


def _head_of(source: Path) -> M3DSegConfig:
    """The head of a whole model, or of a folder that has nothing else."""
    config: Any = AutoConfig.from_pretrained(source, local_files_only=True)
    seg = getattr(config, "seg", None)
    if not isinstance(config, M3DConfig | M3DSegVolConfig) or seg is None:
        raise ValueError(f"{source} has no mask head; export one that draws")
    assert isinstance(seg, M3DSegConfig)
    return seg


def _dtype_of(source: Path) -> str:
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return str(fields.get("dtype") or "float32")


def _unused(zeros: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """What the released code never runs: as it came, where conversion kept it beside the model, else zeros."""
    kept = load_file(source / UNUSED) if (source / UNUSED).is_file() else {}
    dtype = getattr(torch, _dtype_of(source))
    return {name: kept.get(name, zero.to(dtype)) for name, zero in zeros.items()}


def _size_notes(what: str, sizes: list[str]) -> list[str]:
    if not sizes:
        return []
    return [
        f"sizes that {what}'s code has written into it, to be changed there before it reads this: {'; '.join(sizes)}"
    ]


def _dead_notes(more: Mapping[str, Tensor]) -> list[str]:
    if not any(not tensor.any() for tensor in more.values()):
        return []
    what = DEAD_MASKS if any(DEAD_MASKS in name for name in more) else "language_encoder.pooler."
    return [f"{len(more)} tensors ({what}*) are zeros: the released code makes them and never runs them"]


def _finish(kind: str, source: Path, folder: Path, partial: Path, written: Written, notes: list[str]) -> Exported:
    """What goes along, the word on how to read it, and the mark."""
    copy_files(source, partial, ALONG)
    if kind == "lamed" and not (partial / "tokenizer.model").is_file():
        notes = [*notes, "no sentencepiece file: load the tokenizer with use_fast=True (the released demo says False)"]
    readme = [
        f"# {source.name}, in the layout of the released code ({kind})",
        "",
        HOW[kind],
        "",
        *(f"- {n}" for n in notes),
    ]
    (partial / "README.md").write_text("\n".join([*readme, "", FOOTER, ""]), encoding="utf-8")
    mark(partial, source, kind, tensors=len(written), notes=notes)
    return Exported(folder, len(written), tuple(notes))


HOW = {
    "lamed": (
        "Read it with the classes of the M3D repository (`LaMed/src/model`): "
        "`LamedLlamaForCausalLM.from_pretrained(FOLDER)` (or `LamedPhi3ForCausalLM`). Volumes are prepared beforehand, "
        "as `preprocess.json` says: that code takes arrays in [0, 1]."
    ),
    "m3d-clip": (
        "Read it with `M3DCLIP` of the M3D repository (`LaMed/src/model/CLIP.py`). `logit_scale` is the factor on "
        "similarities itself, as that code uses it."
    ),
    "segvol": (
        "LaMed's `--pretrain_seg_module` and SegVol read a file of torch's. This makes one: "
        "`torch.save({k: v for f in glob.glob('model*.safetensors') for k, v in "
        "safetensors.torch.load_file(f).items()}, 'pytorch_model.bin')`."
    ),
}
FOOTER = "Written by `m3d export`. For research, not for clinical use."
