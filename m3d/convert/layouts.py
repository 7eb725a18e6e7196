"""What a released checkpoint is, told by the names in it, and the model of ours that it becomes.

A tensor's new name may say a folder and a file's stem, ``text_tower/model:embeddings.weight``; without them it goes to
``model*.safetensors`` of the folder itself.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BertModel, CLIPTextModel, PreTrainedConfig

from data_prep.preprocess import Foreground, MinMax, Preprocess
from encoders.published import new_name as clip_name
from m3d.convert.report import NewName, Shape
from m3d.convert.sizes import Shapes, bert_config, clip_text_config, head_config, tower_config
from m3d.convert.source import Source
from m3d.convert.words import read_tokenizer
from m3d.models.clip import M3DCLIPConfig, build_pair, without_pooler
from m3d.models.modeling import build_vision_tower
from m3d.models.name_tower import TEXT_TOWER
from m3d.models.perceiver import projection
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from segvol_head.published import LANDMARK, prefix_of
from segvol_head.published import new_name as seg_name

Preparation = Literal["scans", "m3d-data"]
POSITIONS = "patch_embedding.position_embeddings"
PERCEIVER = "mm_projector."
CLIP_TEXT = "text_encoder.clip_text_model.text_model."
MOST_WORDS = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion can be told.

    Attributes:
        dtype: Of the weights that are written; None keeps each as it is.
        preparation: Of the scans: "scans" are turned as the model expects and cropped, "m3d-data" are M3D's volumes.
        beside: Folder of config.json and tokenizer, where they are not beside the weights.
        lora: Whether LoRA is folded in, or kept beside the language model.
        lora_alpha: What the released scripts set; no file says it.
        vision_heads: Attention heads of the vision towers, where they are not 64 wide.
        text_heads: Those of a BERT or CLIP text tower.
    """

    dtype: torch.dtype | None = None
    preparation: Preparation = "scans"
    beside: Path | None = None
    lora: Literal["merge", "keep"] = "merge"
    lora_alpha: int = 32
    vision_heads: int | None = None
    text_heads: int | None = None


@dataclass(frozen=True)
class Folded:
    """A low-rank pair that is added to a weight: ``weight + scaling * up @ down``."""

    down: str
    up: str
    scaling: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """What a checkpoint becomes; ``save`` writes all but the weights, whose type it is told, into a folder."""

    kind: str
    published: Shapes
    new_name: NewName
    expected: Shapes
    save: Callable[[Path, torch.dtype], None]
    folded: Mapping[str, Folded] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def kind_of(names: Iterable[str], where: Path) -> str:
    """What a checkpoint is: ``lamed``, ``m3d-clip``, ``segvol``, ``perceiver`` or ``vision``.

    Raises:
        ValueError: It is none of them.
    """
    names = list(names)
    if any(name.startswith(("vision_tower.patch", "seg_head.", "perceiver.", "language_model.")) for name in names):
        raise ValueError(f"{where} has our names already: it needs no conversion")
    if any("model.layers." in name for name in names) and any("model.vision_tower." in name for name in names):
        return "lamed"
    if any(name.startswith("vision_encoder.") for name in names):
        return "m3d-clip"
    if any(name.endswith(LANDMARK) for name in names):
        return "segvol"
    if any("mm_projector." in name for name in names):
        return "perceiver"
    if any(name.endswith(POSITIONS) for name in names):
        return "vision"
    raise ValueError(
        f"{where} is no checkpoint of M3D-LaMed, M3D-CLIP or SegVol (its first tensor is {min(names)!r}); known are "
        "their Hugging Face folders, pretrained_ViT.bin, mm_projector.bin and model_with_lora.bin"
    )


def fields_of(source: Source, options: Options) -> dict[str, Any]:
    """What the released config.json says; nothing where there is none.

    Raises:
        ValueError: It is no JSON.
    """
    path = (options.beside or source.folder) / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from None
    return found


def preparation(grid: Iterable[int] | None, options: Options) -> Preprocess:
    """How scans become the model's input: min-max, as the released weights expect.

    The released data has no orientation. Scans are turned as radiologists look at slices from the feet upwards (SPL);
    volumes of M3D-Data pass as they are.
    """
    d, h, w = tuple(grid or ())
    if options.preparation == "m3d-data":
        return Preprocess(grid=(d, h, w), orientation=None, intensity=MinMax(), crop=None)
    return Preprocess(grid=(d, h, w), orientation="SPL", intensity=MinMax(), crop=Foreground())


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def below(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    """Those whose names begin with ``prefix``, which is taken off."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """A ``config.json`` of a part alone, which no class of transformers reads."""
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def clip_layout(source: Source, shapes: Shapes, options: Options) -> Layout:
    """M3D-CLIP: a pair that `m3d.models.clip.load_pair` reads. Its scale is the factor itself (REFERENCE A1.6)."""
    fields = fields_of(source, options)
    tokenizer = read_tokenizer(options.beside or source.folder)
    tokenizer.model_max_length = int(fields.get("max_text_len") or MOST_WORDS)
    text = bert_config(below(shapes, "language_encoder."), heads=options.text_heads)
    vision = tower_config(below(shapes, "vision_encoder."), fields, heads=options.vision_heads)
    config = M3DCLIPConfig(
        vision_config=vision,
        text_config=text,
        shared_width=shapes["mm_vision_proj.weight"][0],
        raw_scale=True,
    )
    with torch.device("meta"):
        model = build_pair(config, without_pooler(BertModel(text)))

    def new_name(name: str) -> str | None:
        return None if name.startswith("language_encoder.pooler.") else clip_name(name)

    def save(folder: Path, dtype: torch.dtype) -> None:
        config.dtype = dtype
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        preparation(vision.image_size, options).write(folder)

    return Layout(kind="m3d-clip", published=shapes, new_name=new_name, expected=shapes_of(model), save=save)


def vision_layout(source: Source, shapes: Shapes, options: Options) -> Layout:
    """A bare 3D ViT (``pretrained_ViT.bin``): what ``init.vision_tower`` takes."""
    start = next(name for name in shapes if name.endswith(POSITIONS)).removesuffix(POSITIONS)
    config = tower_config(below(shapes, start), fields_of(source, options), heads=options.vision_heads)
    with torch.device("meta"):
        tower = build_vision_tower(config)

    def new_name(name: str) -> str | None:
        ours = clip_name(name.removeprefix(start)) if name.startswith(start) else name
        return None if ours is None else f"vision_tower.{ours}"

    def save(folder: Path, dtype: torch.dtype) -> None:
        config.dtype = dtype
        write_config(folder, {"model_type": "m3d_vision_tower", "vision_config": _plain(config)})
        preparation(config.image_size, options).write(folder)

    expected = {f"vision_tower.{name}": shape for name, shape in shapes_of(tower).items()}
    return Layout(kind="vision", published=shapes, new_name=new_name, expected=expected, save=save)


def perceiver_layout(source: Source, shapes: Shapes, options: Options) -> Layout:
    """Stage 1's ``mm_projector.bin``: what ``init.perceiver`` takes, with the input table that was trained with it."""
    start = next(name for name in shapes if PERCEIVER in name).partition(PERCEIVER)[0]
    fields = fields_of(source, options)
    linears = sorted(int(name.split(".")[1]) for name in below(shapes, f"{start}{PERCEIVER}") if "weight" in name)
    kind = "linear" if len(linears) == 1 or linears[1] == 1 else "mlp"
    leaving, entering = shapes[f"{start}{PERCEIVER}projector.0.weight"]
    with torch.device("meta"):
        built = projection(kind, len(linears), entering, leaving)
    expected = {f"perceiver.projector.{name}": shape for name, shape in shapes_of(built).items()}
    table = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
    ours = "language_model.model.embed_tokens.weight"
    if table is not None:
        expected[ours] = shapes[table]
    facts = {
        "model_type": "m3d_perceiver",
        "pooling": fields.get("proj_pooling_type") or "spatial",
        "pool_size": fields.get("proj_pooling_size") or 2,
        "projector": kind,
        "projector_depth": len(linears),
        "width": entering,
        "language_width": leaving,
    }

    def new_name(name: str) -> str | None:
        return ours if name == table else name.replace(f"{start}{PERCEIVER}", "perceiver.")

    def save(folder: Path, dtype: torch.dtype) -> None:
        write_config(folder, {**facts, "dtype": str(dtype).removeprefix("torch.")})

    return Layout(kind="perceiver", published=shapes, new_name=new_name, expected=expected, save=save)


def segvol_layout(source: Source, shapes: Shapes, options: Options) -> Layout:
    """SegVol: head and encoder as `m3d.models.segvol` keeps them, the text tower that reads names beside them."""
    start = prefix_of(shapes)
    bare = below(shapes, start)
    seg = head_config(bare, fields_of(source, options), heads=options.vision_heads)
    text = clip_text_config(below(bare, CLIP_TEXT), heads=options.text_heads)
    tokenizer = read_tokenizer(options.beside or source.folder)
    assert seg.encoder is not None
    config = M3DSegVolConfig(
        vision_config=seg.encoder,
        seg_config=seg,
        text_width=text.hidden_size,
        text_source="clip",
        text_projector="linear",
    )
    with torch.device("meta"):
        model, tower = PromptedSegVol(config), CLIPTextModel(text)
    inside = "text_model." if any(name.startswith("text_model.") for name in tower.state_dict()) else ""
    expected = shapes_of(model) | {f"{TEXT_TOWER}/model:{name}": shape for name, shape in shapes_of(tower).items()}

    def new_name(name: str) -> str | None:
        own = name.removeprefix(start)
        if own.startswith(CLIP_TEXT) and not own.endswith(".position_ids"):
            return f"{TEXT_TOWER}/model:{inside}{own.removeprefix(CLIP_TEXT)}"
        if own.startswith("text_encoder.dim_align."):
            return own.replace("text_encoder.dim_align.", "seg_projector.")
        ours = seg_name(own)
        return None if ours is None else f"seg_head.{ours}"

    def save(folder: Path, dtype: torch.dtype) -> None:
        for one, where in ((config, folder), (text, folder / TEXT_TOWER)):
            one.dtype = dtype
            one.save_pretrained(where)
        tokenizer.save_pretrained(folder / TEXT_TOWER)
        preparation(seg.encoder.image_size if seg.encoder else None, options).write(folder)

    return Layout(kind="segvol", published=shapes, new_name=new_name, expected=expected, save=save)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = config.to_diff_dict()
    return found
